"""All masked weights of a model in the compute dtype, with feedback to pruned filters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import define, differentiate
from .checks import is_filter_major
from .transforms import in_forward_mode


def _fake(weights: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None) -> list[Tensor]:
    reference.check_masked_weights("masked_weights", weights, mask, dtype, feedback)
    return [torch.empty_like(weight, dtype=dtype) for weight in weights]


_ARGUMENTS = "Tensor mask, ScalarType dtype, Tensor? feedback) -> Tensor[]"
define(f"masked_weights(Tensor[] weights, {_ARGUMENTS}", reference.masked_weights, _fake)
define(f"masked_weights_backward(Tensor[] grads, {_ARGUMENTS}", reference.masked_weights_backward, _fake)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, mask, _, feedback = inputs
    ctx.save_for_backward(mask, feedback)
    ctx.dtype = weights[0].dtype


def _backward(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    mask, feedback = ctx.saved_tensors  # once: activation checkpointing hands them out once
    return _gradients(grads, mask, feedback, ctx.dtype), None, None, None


def _gradients(grads: Sequence[Tensor], mask: Tensor, feedback: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    # Gradients may arrive in any layout (a convolution's backward chooses); the op wants filter-major ones.
    grads = [grad if is_filter_major(grad) else grad.contiguous() for grad in grads]
    return torch.ops.fastprune.masked_weights_backward(grads, mask, dtype, feedback)


differentiate("masked_weights", _setup, _backward)
# The backward is linear in the gradients, filter by filter: it is its own backward.
differentiate("masked_weights_backward", _setup, _backward)


def masked_weights(
    weights: Sequence[Tensor], mask: Tensor, dtype: torch.dtype | None = None, feedback: Tensor | None = None
) -> list[Tensor]:
    """``W ⊙ mask`` for all layers in one call, cast to the compute dtype on the way.

    The gradient is straight-through: it goes to the dense ``W``, to pruned filters too, so that a filter can come back;
    for pruned filters it is multiplied by ``feedback`` (where that is 0 it is 0, whatever came).

    Args:
        weights: as for :func:`fastprune.ops.filter_norms`.
        mask: ``[N]`` bool, contiguous, True for kept filters.
        dtype: of the results; the weights' own by default.
        feedback: ``[N]`` float32 factors for the gradients of pruned filters; None means 1.

    Returns:
        Fresh tensors with the shapes and strides of ``weights``; pruned filters are exactly 0.

    Raises:
        RuntimeError: if an argument is not as described.

    Source:
        Lin et al., "Dynamic Model Pruning with Feedback", ICLR 2020.
    """
    dtype = dtype or (weights[0].dtype if weights else torch.float32)
    if not weights:
        reference.check_masked_weights("masked_weights", weights, mask, dtype, feedback)
        return []
    return torch.ops.fastprune.masked_weights(weights, mask, dtype, feedback)


class _MaskedWeight(torch.autograd.Function):
    """One layer of the op, or what was written in its place, with the op's gradient."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, mask: Tensor, dtype: torch.dtype, feedback: Tensor | None, written: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(mask, feedback)
        ctx.dtype = weight.dtype
        if written is not None:
            return written.view_as(written)
        with torch._C._AutoDispatchBelowAutograd():
            return torch.ops.fastprune.masked_weights([weight], mask, dtype, feedback)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        mask, feedback = ctx.saved_tensors
        if feedback is None and grad.dtype == ctx.dtype:
            return grad, None, None, None, None
        if torch.is_grad_enabled() or in_forward_mode():  # for a second derivative
            return _gradients([grad], mask, feedback, ctx.dtype)[0], None, None, None, None
        with torch._C._AutoDispatchBelowAutograd():
            return _gradients([grad], mask, feedback, ctx.dtype)[0], None, None, None, None


def is_transformed() -> bool:
    """Whether a compiler, a tracer or a function transform (``torch.func``) looks on, which custom functions stop."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or bool(torch._C._are_functorch_transforms_active())
        or in_forward_mode()
    )


def masked_weight(
    weight: Tensor, mask: Tensor, dtype: torch.dtype, feedback: Tensor | None = None, written: Tensor | None = None
) -> Tensor:
    """:func:`masked_weights` of one layer, for that layer's forward: the host gets through it in half the time.

    For compilers, tracers and function transforms it is the op itself.

    Args:
        weight, mask, dtype, feedback: as for :func:`masked_weights`, of one layer.
        written: the result, where :func:`fastprune.ops.sgd_step_` has written it already. It is not copied, and must
            not be written to before the backward that follows (autograd says so if it was).

    Returns:
        The masked weight: a fresh tensor, or a view of ``written``.

    Raises:
        RuntimeError: as :func:`masked_weights`.
    """
    if is_transformed():
        return masked_weights([weight], mask, dtype, feedback)[0]
    return _MaskedWeight.apply(weight, mask, dtype, feedback, written)
