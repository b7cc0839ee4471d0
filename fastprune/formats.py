"""A model as other programs take it: ONNX, and PyTorch's exported programs, both for any batch size."""

from __future__ import annotations

import copy
import io
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, fx, nn

from .channels import effective_weights
from .graph import read_by_forward, shape, trace
from .inputs import one_batch
from .nn import MaskedConv2d, unmask_

__all__ = ["MissingPackageError", "onnx_bytes", "onnx_session", "pt2_bytes", "require", "without_masks"]


class MissingPackageError(RuntimeError):
    """An optional package is not installed; the message says which, and how to get it."""


def require(*packages: str, what: str) -> None:
    """Raise MissingPackageError if one of the packages is missing, saying that `what` needs it."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingPackageError(f"{what} needs {' and '.join(missing)}: pip install 'fastprune[export]'")


@torch.no_grad()
def without_masks(model: nn.Module, example_input: Any = None) -> fx.GraphModule:
    """Return the model in eval mode, with zeros in the weights where its masks were: ordinary convolutions only.

    Raises:
        ValueError: for a model that cannot be traced, or does not run on the example input, if there is one, and for a
            masked convolution whose weight the forward also reads by itself.
    """
    network = copy.deepcopy(trace(model, example_input))
    read = read_by_forward(network.graph)
    for name, weight in effective_weights(network, {}).items():
        module = network.get_submodule(name)
        if isinstance(module, MaskedConv2d):
            if name in read:
                raise ValueError(
                    f"{name} is masked, and the forward also reads its weight by itself, which no mask reaches: call "
                    f"pruner.remove() before the export"
                )
            module.weight = nn.Parameter(weight, module.weight.requires_grad)  # its own: it may have been tied
            unmask_(module)
    return network.eval()


def onnx_bytes(model: nn.Module, example_input: Tensor) -> bytes:
    """Return the model in eval mode as an ONNX file, with inputs `images` `[batch, …]` and outputs `logits`.

    Raises:
        MissingPackageError: without onnx and onnxscript.
        ValueError: for a model that cannot be traced, does not run on the example input, is no function of one tensor
            that gives one tensor, or is larger than the 2 GB that one file can be.
    """
    require("onnx", "onnxscript", what="ONNX")
    network = _of_one_tensor(model, example_input, "ONNX", also_gives_one=True).cpu()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter itself
        program = torch.onnx.export(
            network,
            (_two(example_input),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    proto = program.model_proto
    if proto.ByteSize() >= 2**31:
        raise ValueError(f"the model has {proto.ByteSize():,} bytes, and one ONNX file at most 2 GB")
    return proto.SerializeToString()


def onnx_session(model: bytes, threads: int | None = None) -> Any:
    """Return an ONNX Runtime session of it on the CPU; `threads` of an op, torch's number if None.

    Raises:
        MissingPackageError: without onnxruntime.
    """
    require("onnxruntime", what="ONNX Runtime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def pt2_bytes(model: nn.Module, example_input: Tensor) -> bytes:
    """Return the model in eval mode as `torch.export.save` writes it.

    Raises:
        ValueError: for a model that cannot be traced, or does not run on the one tensor that it is to take.
    """
    network = _of_one_tensor(model, example_input, "pt2").to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        program = torch.export.export(
            network,
            (_two(example_input).to(example_input.device),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _of_one_tensor(model: nn.Module, example_input: Tensor, what: str, also_gives_one: bool = False) -> fx.GraphModule:
    """:func:`without_masks`, of a model that takes one tensor."""
    network = without_masks(model, one_batch(model, example_input))
    (output,) = (node for node in network.graph.nodes if node.op == "output")
    given = output.args[0]
    if also_gives_one and (not isinstance(given, fx.Node) or shape(given) is None):
        raise ValueError(
            f"an export to {what} is of a model that returns one tensor, and {type(model).__name__} returns {given}: "
            f"wrap it in a module that returns one"
        )
    return network


def _two(example_input: Tensor) -> Tensor:
    """A batch of two: an exporter takes a batch of one for a constant."""
    return torch.zeros((2, *example_input.shape[1:]), dtype=example_input.dtype)
