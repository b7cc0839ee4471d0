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
from .graph import trace
from .nn import MaskedConv2d

__all__ = ["MissingPackageError", "onnx_bytes", "onnx_session", "pt2_bytes", "require", "without_masks"]


class MissingPackageError(RuntimeError):
    """An optional package is not installed; the message says which, and how to get it."""


def require(*packages: str, what: str) -> None:
    """Raise MissingPackageError if one of the packages is missing, saying that `what` needs it."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingPackageError(f"{what} needs {' and '.join(missing)}: pip install 'fastprune[export]'")


@torch.no_grad()
def without_masks(model: nn.Module) -> fx.GraphModule:
    """Return the model in eval mode, with zeros in the weights where its masks were: ordinary convolutions only.

    Raises:
        ValueError: for a model that cannot be traced.
    """
    network = copy.deepcopy(trace(model))
    for name, weight in effective_weights(network, {}).items():
        module = network.get_submodule(name)
        if isinstance(module, MaskedConv2d):
            module.weight.copy_(weight)
            del module.mask, module.feedback
            module.__class__ = nn.Conv2d  # type: ignore[assignment]
    return network.eval()


def onnx_bytes(model: nn.Module, example_input: Tensor) -> bytes:
    """Return the model in eval mode as an ONNX file, with inputs `images` `[batch, …]` and outputs `logits`.

    Raises:
        MissingPackageError: without onnx and onnxscript.
        ValueError: for a model that cannot be traced, or is larger than the 2 GB that one file can be.
    """
    require("onnx", "onnxscript", what="ONNX")
    network = without_masks(model).cpu()
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
        ValueError: for a model that cannot be traced.
    """
    network = without_masks(model).to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        program = torch.export.export(
            network,
            (_two(example_input).to(example_input.device),),
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _two(example_input: Tensor) -> Tensor:
    """A batch of two: an exporter takes a batch of one for a constant."""
    return torch.zeros((2, *example_input.shape[1:]), dtype=example_input.dtype)
