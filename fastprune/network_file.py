"""Networks in one file, without pickle: tensors as safetensors, and the architecture as JSON in the header.

The tensors have the names of the network's `state_dict`, so that any reader of safetensors finds them. The header's
metadata has one key, `fastprune.network`: the architecture (see architecture), what the inputs look like, and what the
user added; with a checksum of the file, as checkpoints have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .architecture import ArchitectureError, build, describe, tensors_of
from .checkpoint import CheckpointError, read_sealed, write_sealed
from .graph import trace
from .layer_kinds import DTYPES

__all__ = ["NetworkFileError", "example_inputs", "is_network_file", "load", "save"]

_KEY = "fastprune.network"
_VERSION = 1
_LARGEST_INPUT = 2**28  # elements


class NetworkFileError(ValueError):
    """A saved network cannot be read; the message names the file and what is wrong with it."""


def save(
    model: nn.Module,
    path: str | Path,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model`` to ``path``: what :func:`load` needs to make it again, without the code that defined it.

    What is saved is its graph (see :func:`fastprune.graph.trace`): layers of ``torch.nn``, :class:`MaskedConv2d` with
    their masks, functions and tensors; the list is ``fastprune/layer_kinds.py``. Hooks, and what :func:`compact`
    reports, are not.

    Args:
        model: any that torch.fx traces; a compact one, too. Not changed.
        path: of the file, in an existing folder; replaced if it is there.
        example_input: a tensor or a tuple of them, whose shapes and dtypes are kept for exports.
        info: JSON values to be kept with it, such as class names or the mean and deviation of the images.

    Raises:
        ValueError: if the model cannot be traced, has a part that no saved network may have, or shares a parameter
            between layers.
        TypeError: for info that JSON cannot hold.
        OSError: where writing fails; what was there before stays as it was.
    """
    network = trace(model)
    tensors = tensors_of(network)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        _check_unshared(tensors)
        architecture = describe(network)
        build(json.loads(json.dumps(architecture)), plain)  # what cannot be loaded is not written
    except ArchitectureError as error:
        raise ValueError(f"{type(model).__name__} cannot be saved: {error}") from error
    inputs = (example_input,) if isinstance(example_input, Tensor) else example_input or ()
    content = {
        "architecture": architecture,
        "inputs": [{"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for x in inputs],
        "info": dict(info or {}),
    }
    write_sealed(Path(path), plain, _KEY, {"version": _VERSION}, content, "saved network")


def _check_unshared(tensors: Mapping[str, Tensor]) -> None:
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = owners.setdefault(id(tensor), name)
        if other != name:
            raise ArchitectureError(f"{other} and {name} are one tensor, which the file would make two of")


def load(path: str | Path, device: torch.device | str = "cpu") -> fx.GraphModule:
    """Return the network that :func:`save` wrote, in eval mode.

    Nothing that the file says is executed: it can only choose among known layers and functions. Memory is taken for the
    tensors that are in it and for nothing else.

    Returns:
        A ``GraphModule`` with the tensors, bit by bit; its ``meta`` has ``inputs`` and ``info`` as they were saved.

    Raises:
        NetworkFileError: for a missing, unreadable, truncated, damaged or foreign file, of another version or with a
            description that :func:`save` does not write.
    """
    try:
        stored, tensors = read_sealed(Path(path), _KEY, _VERSION, "saved network")
        network = build(stored.get("architecture"), tensors)
        inputs, info = stored.get("inputs"), stored.get("info")
        if not isinstance(info, dict) or not isinstance(inputs, list) or not all(map(_is_input, inputs)):
            raise ArchitectureError("it does not say what its inputs are")
    except CheckpointError as error:
        raise NetworkFileError(str(error)) from error
    except ArchitectureError as error:
        raise NetworkFileError(f"{path} is no network that fastprune saves: {error}") from error
    network.meta["inputs"], network.meta["info"] = inputs, info
    return network.to(device)


def example_inputs(network: fx.GraphModule) -> tuple[Tensor, ...]:
    """Return zeros like the example input that a loaded network was saved with; () where it was saved without."""
    inputs = network.meta.get("inputs", [])
    return tuple(torch.zeros(entry["shape"], dtype=DTYPES[entry["dtype"]]) for entry in inputs)


def is_network_file(path: Path) -> bool:
    """Whether it is a file that :func:`save` may have written, by its header."""
    try:
        with open(path, "rb") as file:
            return _KEY.encode() in file.read(200)
    except OSError:
        return False


def _is_input(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"shape", "dtype"} or type(entry["dtype"]) is not str:
        return False
    shape = entry["shape"]
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**31 for n in shape):
        return False
    return entry["dtype"] in DTYPES and torch.Size(shape).numel() <= _LARGEST_INPUT
