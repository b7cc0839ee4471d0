"""The weights that a layer of a PruningNet generates for one choice of widths, and nothing but those."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import define, differentiate


def _fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_channels: int,
    in_channels: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    reference.check_hyper_weight(hidden, weight, bias, out_channels, in_channels, shape, dtype)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    size = (out_channels, in_channels, *shape[2:])
    return torch.empty(size, dtype=dtype, device=weight.device, memory_format=memory_format)


def _fake_backward(grad: Tensor, hidden: Tensor, weight: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_hyper_weight_backward(grad, hidden, weight, shape)
    return torch.empty_like(hidden), torch.empty_like(weight), weight.new_empty(len(weight))


define(
    "hyper_weight(Tensor hidden, Tensor weight, Tensor bias, SymInt out_channels, SymInt in_channels, int[] shape, "
    "ScalarType dtype, bool channels_last) -> Tensor",
    reference.hyper_weight,
    _fake,
)
define(
    "hyper_weight_backward(Tensor grad, Tensor hidden, Tensor weight, int[] shape) -> (Tensor, Tensor, Tensor)",
    reference.hyper_weight_backward,
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, weight, *_, ctx.shape, _, _ = inputs
    ctx.save_for_backward(hidden, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # A gradient may arrive in any layout (a convolution's backward chooses).
    if not grad.is_contiguous() and not grad.is_contiguous(memory_format=torch.channels_last):
        grad = grad.contiguous()
    gradients = torch.ops.fastprune.hyper_weight_backward.default(grad, *ctx.saved_tensors, ctx.shape)
    return *gradients, None, None, None, None, None


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.shape = inputs
    ctx.save_for_backward(*tensors)


def _backward_backward(ctx: Any, to_hidden: Tensor, to_weight: Tensor, to_bias: Tensor) -> tuple[Any, ...]:
    """The gradients are bilinear in (grad, hidden) and in (grad, weight): the two ops give their gradients, too."""
    grad, hidden, weight = ctx.saved_tensors
    sizes = grad.shape[0], grad.shape[1], ctx.shape, grad.dtype, not grad.is_contiguous()
    to_hidden, to_weight, to_bias = to_hidden.contiguous(), to_weight.contiguous(), to_bias.contiguous()
    generate, differentiate = torch.ops.fastprune.hyper_weight, torch.ops.fastprune.hyper_weight_backward
    of_grad = generate(to_hidden, weight, to_bias, *sizes) + generate(
        hidden, to_weight, torch.zeros_like(to_bias), *sizes
    )
    of_hidden = differentiate(grad, hidden, to_weight, ctx.shape)[0]
    of_weight = differentiate(grad, to_hidden, weight, ctx.shape)[1]
    return of_grad, of_hidden, of_weight, None


differentiate("hyper_weight", _setup, _backward)
differentiate("hyper_weight_backward", _setup_backward, _backward_backward)


def hyper_weight(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    out_channels: int,
    in_channels: int,
    shape: Sequence[int],
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """The convolution weight that a linear layer generates, of which only the wanted slice is computed.

    ``(weight · hidden + bias).view(O, I, kh, kw)[:out_channels, :in_channels]``, in the compute dtype, with sums in
    float32 (float64 for float64). Rows of ``weight`` and ``bias`` outside of the slice are not read.

    The gradients are those of this formula: of ``hidden``, and of the rows of ``weight`` and ``bias`` in the slice;
    they are 0 in the other rows. Each is a fresh tensor of full size, which every optimizer can take, in which every
    element is written once; beyond them nothing of the size of ``weight`` is needed. They are not added into an
    existing buffer: autograd takes them as ``.grad`` where there is none (``zero_grad(set_to_none=True)``, PyTorch's
    default), and adds them where there is one. Derivatives may be taken again.

    Args:
        hidden: ``[H]``, contiguous; cast where its dtype is not that of ``weight``, as autocast may have made it.
        weight: ``[O·I·kh·kw, H]``, contiguous, as that of ``nn.Linear(H, O·I·kh·kw)``: row
            ``((o·I + i)·kh + y)·kw + x`` makes element ``[o, i, y, x]``. float32, float64, bfloat16 or float16.
        bias: ``[O·I·kh·kw]`` of the same dtype, contiguous.
        out_channels: 1 to O.
        in_channels: 1 to I (of a depthwise convolution, 1).
        shape: ``(O, I, kh, kw)``, of the widest weight.
        dtype: of the result; the weight's own by default.
        memory_format: of the result: ``torch.contiguous_format`` or ``torch.channels_last``.

    Returns:
        A fresh ``[out_channels, in_channels, kh, kw]``.

    Raises:
        RuntimeError: if an argument is not as described.
        ValueError: if the memory format is another.

    Source:
        Liu et al., "MetaPruning: Meta Learning for Automatic Neural Network Channel Pruning", ICCV 2019.
    """
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"hyper_weight: memory_format must be torch.contiguous_format or torch.channels_last, got {memory_format}"
        )
    return torch.ops.fastprune.hyper_weight.default(
        hidden.to(weight.dtype),
        weight,
        bias,
        out_channels,
        in_channels,
        shape,
        dtype or weight.dtype,
        memory_format == torch.channels_last,
    )
