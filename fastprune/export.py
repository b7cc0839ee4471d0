"""``python -m fastprune.export``: a trained network, small, in a file that other programs read, and checked there."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from . import network_file, run_folder
from .checkpoint import write_atomically
from .compact import compact
from .cost import cost
from .formats import MissingPackageError, onnx_bytes, onnx_session, pt2_bytes, require, without_masks
from .inputs import one_batch
from .latency import latency
from .memory import is_out_of_memory, shortage
from .network_file import NetworkFileError
from .run_folder import RunError
from .train import CHECKPOINT

__all__ = ["CheckFailedError", "Options", "check", "export", "main"]

Format = Literal["onnx", "pt2", "safetensors"]
_TOLERANCE = 1e-4  # of the largest output; float32 sums in another order
_Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Options:
    """Export a trained network: without its pruned filters, for any batch size, checked where it will run."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, or a file that fastprune.save wrote."""
    format: Format = "onnx"
    """onnx; pt2 (torch.export, which torch.export.load reads); safetensors (which fastprune.load reads)."""
    out: Path | None = None
    """The file; network.<format> in the run's folder, or beside the file, if not given."""
    compact: bool = True
    """Remove what is pruned. Without, pruned weights are zeros."""
    round_to: int = 1
    """Channels come in multiples of it."""
    check: bool = False
    """Compare what the file computes with the network it was made of."""
    batch: tuple[int, ...] = (1, 2, 7)
    """Batch sizes of the check."""
    latency: bool = False
    """Measure the network before and after, in eager mode, compiled, and in ONNX Runtime."""
    image_size: int | None = None
    """Side of the images in pixels, where the run does not say it."""

    def __post_init__(self) -> None:
        if self.round_to < 1:
            raise ValueError(f"--round-to must be at least 1, got {self.round_to}")
        if not self.batch or min(self.batch) < 1:
            raise ValueError(f"--batch must be at least 1, got {' '.join(map(str, self.batch)) or 'none'}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"--image-size must be at least 1, got {self.image_size}")

    @property
    def path(self) -> Path:
        """The file to write."""
        folder = self.source if self.source.is_dir() else self.source.parent
        return self.out or folder / f"network.{self.format}"


class CheckFailedError(RuntimeError):
    """A file computes something else than the network it was made of."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 1 for what cannot be exported or fails the check."""
    words = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(Options, args=words, prog="python -m fastprune.export")
    try:
        export(options)
    except (RunError, NetworkFileError, MissingPackageError, CheckFailedError, ValueError, OSError) as error:
        print(f"fastprune.export: error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"fastprune.export: error: {shortage(error)}", file=sys.stderr)
        return 1
    return 0


def export(options: Options) -> Path:
    """Do what the command does, and return the file.

    Raises:
        RunError, NetworkFileError: for a source that cannot be used.
        ValueError: for a network that cannot be exported, or a file that would replace its source.
        MissingPackageError: naming what to install.
        CheckFailedError: after the check; the file is there, to be looked at.
        OSError: where it cannot be written.
    """
    _require(options)
    path = options.path
    if path.resolve() == options.source.resolve() or path.name == CHECKPOINT:
        raise ValueError(f"{path} would replace what is exported: choose another --out")
    model, example, info = _load(options)
    if options.format != "safetensors" or options.latency or options.check:
        one_batch(model, example)
    small = compact(model, example, options.round_to) if options.compact else model
    _write(without_masks(small), path, options.format, example, info)
    before, after = cost(model, example, masked=False), cost(small, example, masked=False)
    print(f"{path}: {path.stat().st_size:,} bytes")
    for what, old, new in (("parameters", before.parameters, after.parameters), ("MACs", before.macs, after.macs)):
        print(f"  {what}: {old:,} -> {new:,} ({new / old:.1%})")
    if options.latency:
        print(latency({"before": model, "exported": small}, example))
    if options.check:
        check(path, options.format, model, example, options.batch)
    return path


def _require(options: Options) -> None:
    """Fail before the work, not after it."""
    if options.format == "onnx":
        require("onnx", "onnxscript", what="--format onnx")
        if options.check:
            require("onnxruntime", what="--check of --format onnx")
    if options.latency:
        require("onnx", "onnxscript", "onnxruntime", what="--latency")


def _load(options: Options) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return the network, an example input, and what is known of it."""
    if options.source.is_dir():
        config, model = run_folder.load_network(options.source)
        shape = run_folder.image_shape(options.source, config, options.image_size)
        statistics = run_folder.image_statistics(options.source, config)
        return model, torch.zeros(1, *shape), {"model": config.model, **statistics}
    network = network_file.load(options.source)
    examples = network_file.example_inputs(network)
    if options.image_size is not None:
        examples = (torch.zeros(1, 3, options.image_size, options.image_size),)
    if not examples:
        raise ValueError(f"{options.source} was saved without an example input: give --image-size")
    return network, examples[0] if len(examples) == 1 else examples, network.meta["info"]


def _write(network: nn.Module, path: Path, kind: Format, example: Any, info: dict[str, Any]) -> None:
    if kind == "safetensors":
        network_file.save(network, path, example, info)
        return
    content = onnx_bytes(network, example) if kind == "onnx" else pt2_bytes(network, example)
    write_atomically(path, [content], what="the exported network")


@torch.no_grad()
def check(path: Path, kind: Format, model: nn.Module, example: Tensor, batches: Sequence[int]) -> float:
    """Run a file on random images of each batch size, print the differences, and return the worst of them.

    Args:
        path, kind: what was exported.
        model: what it has to equal.
        example: one of its inputs.
        batches: sizes.

    Returns:
        The largest difference as a share of the largest output.

    Raises:
        CheckFailedError: if it is above 1e-4, or the file gives other shapes.
        ValueError: for a model that returns anything but one tensor.
        MissingPackageError: without ONNX Runtime where it is needed.
    """
    call = _reader(path, kind)
    model.eval()
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        images = torch.randn((batch, *example.shape[1:]), generator=generator).to(example.dtype)
        expected, found = model(images), call(images)
        if not isinstance(expected, Tensor):
            raise ValueError(f"a check is of a model that returns one tensor, not a {type(expected).__name__}")
        if expected.shape != found.shape:
            raise CheckFailedError(
                f"{path} maps {list(images.shape)} to {list(found.shape)}, not {list(expected.shape)}"
            )
        difference = float((found - expected).abs().max())
        share = difference / max(float(expected.abs().max()), 1e-12)
        print(f"  batch {batch}: differs by at most {difference:.2e} ({share:.1e} of the largest output)")
        worst = share if not share <= worst else worst  # a NaN is the worst of all
    if not worst <= _TOLERANCE:
        raise CheckFailedError(f"{path} differs by {worst:.1e} of the largest output, more than {_TOLERANCE:g}")
    print(f"  checked: the worst difference is {worst:.1e} of the largest output")
    return worst


def _reader(path: Path, kind: Format) -> _Call:
    """Return what the file computes."""
    if kind == "safetensors":
        return network_file.load(path)
    if kind == "pt2":
        return torch.export.load(io.BytesIO(path.read_bytes())).module()
    session = onnx_session(path.read_bytes())
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


if __name__ == "__main__":
    sys.exit(main())
