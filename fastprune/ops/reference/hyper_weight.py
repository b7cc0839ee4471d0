"""Generated weights: the slice that is wanted of a linear layer's outputs, and its gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import DTYPES, check_dtype_and_device


def check_hyper_layer(op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: Sequence[int]) -> None:
    """Raise unless the tensors are those of a layer that generates weights of that ``[O, I, kh, kw]``."""
    tensors = [hidden, weight] if bias is None else [hidden, weight, bias]
    check_dtype_and_device(op, f"({', '.join(('hidden', 'weight', 'bias')[: len(tensors)])})", tensors)
    if len(shape) != 4 or min(shape) < 1:
        raise RuntimeError(f"{op}: shape must be [O, I, kh, kw], each at least 1, got {list(shape)}")
    rows = shape[0] * shape[1] * shape[2] * shape[3]
    if rows >= 2**63:
        raise RuntimeError(f"{op}: O·I·kh·kw must be below 2^63, got shape = {list(shape)}")
    if hidden.dim() != 1 or hidden.numel() == 0 or not hidden.is_contiguous():
        raise RuntimeError(f"{op}: hidden must be a contiguous [H] with H at least 1, got {list(hidden.shape)}")
    if weight.shape != (rows, hidden.numel()) or not weight.is_contiguous():
        raise RuntimeError(
            f"{op}: weight must be a contiguous [O·I·kh·kw, H] = [{rows}, {hidden.numel()}], got {list(weight.shape)}"
        )
    if bias is not None and (bias.shape != (rows,) or not bias.is_contiguous()):
        raise RuntimeError(f"{op}: bias must be a contiguous [O·I·kh·kw] = [{rows}], got {list(bias.shape)}")


def check_hyper_weight(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_channels: int,
    in_channels: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Raise unless the arguments of ``hyper_weight`` are right."""
    op = "hyper_weight"
    check_hyper_layer(op, hidden, weight, bias, shape)
    if not 1 <= out_channels <= shape[0]:
        raise RuntimeError(f"{op}: out_channels must be in [1, O] = [1, {shape[0]}], got {out_channels}")
    if not 1 <= in_channels <= shape[1]:
        raise RuntimeError(f"{op}: in_channels must be in [1, I] = [1, {shape[1]}], got {in_channels}")
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise RuntimeError(f"{op}: dtype must be one of float32, float64, bfloat16, float16; got {name}")


def check_hyper_weight_backward(grad: Tensor, hidden: Tensor, weight: Tensor, shape: Sequence[int]) -> None:
    """Raise unless the arguments of ``hyper_weight_backward`` are right."""
    op = "hyper_weight_backward"
    check_hyper_layer(op, hidden, weight, None, shape)
    check_dtype_and_device(op, "(grad)", [grad])
    if grad.device != weight.device:
        raise RuntimeError(f"{op}: grad must be on the device of weight")
    within = grad.dim() == 4 and grad.shape[2:] == tuple(shape[2:]) and grad.numel() > 0
    if not within or grad.shape[0] > shape[0] or grad.shape[1] > shape[1]:
        raise RuntimeError(
            f"{op}: grad must be [out, in, kh, kw] within shape = {list(shape)}, not empty, got {list(grad.shape)}"
        )
    if not grad.is_contiguous() and not grad.is_contiguous(memory_format=torch.channels_last):
        raise RuntimeError(f"{op}: grad must be contiguous or channels_last, got strides {list(grad.stride())}")


def hyper_weight(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_channels: int,
    in_channels: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """``weight · hidden + bias`` where it is in the slice, ``[out, in, kh, kw]`` in ``dtype``."""
    check_hyper_weight(hidden, weight, bias, out_channels, in_channels, shape, dtype)
    rows = weight.view(*shape, -1)[:out_channels, :in_channels]
    products = rows.double() @ hidden.double() + bias.view(*shape)[:out_channels, :in_channels].double()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return products.to(dtype, copy=True).contiguous(memory_format=memory_format)


def hyper_weight_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias; 0 where a row is not in the slice."""
    check_hyper_weight_backward(grad, hidden, weight, shape)
    out_channels, in_channels = grad.shape[:2]
    rows = weight.view(*shape, -1)[:out_channels, :in_channels]
    grads = grad.double()
    grad_hidden = torch.einsum("oiyx,oiyxh->h", grads, rows.double()).to(hidden.dtype)
    grad_weight, grad_bias = torch.zeros_like(weight), weight.new_zeros(len(weight))
    grad_weight.view(*shape, -1)[:out_channels, :in_channels] = (grads.unsqueeze(-1) * hidden.double()).to(weight.dtype)
    grad_bias.view(*shape)[:out_channels, :in_channels] = grads.to(weight.dtype)
    return grad_hidden, grad_weight, grad_bias
