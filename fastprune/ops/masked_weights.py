"""All masked weights of a model in the compute dtype, with feedback to pruned filters."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import define
from .checks import is_filter_major


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
    mask, feedback = ctx.saved_tensors
    # Gradients may arrive in any layout (a convolution's backward chooses); the op wants filter-major ones.
    grads = [grad if is_filter_major(grad) else grad.contiguous() for grad in grads]
    return torch.ops.fastprune.masked_weights_backward(grads, mask, ctx.dtype, feedback), None, None, None


torch.library.register_autograd("fastprune::masked_weights", _backward, setup_context=_setup)
# The backward is linear in the gradients, filter by filter: it is its own backward.
torch.library.register_autograd("fastprune::masked_weights_backward", _backward, setup_context=_setup)


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
    if not weights:
        return []
    return torch.ops.fastprune.masked_weights(weights, mask, dtype or weights[0].dtype, feedback)


class _Written(torch.autograd.Function):
    """Masked weights that are there already, with the gradient of the op that would have made them."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, feedback: Tensor | None, layers: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(mask, feedback)
        ctx.layers, ctx.dtype = layers, tensors[0].dtype
        return tuple(masked.view_as(masked) for masked in tensors[layers:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gradients = _backward(ctx, grads)[0]
        return None, None, None, *gradients, *[None] * ctx.layers


def written_masked_weights(
    weights: Sequence[Tensor], masked: Sequence[Tensor], mask: Tensor, feedback: Tensor | None = None
) -> list[Tensor]:
    """What :func:`masked_weights` returns, where :func:`fastprune.ops.sgd_step_` has written it already.

    Args:
        weights, mask, feedback: as for :func:`masked_weights`.
        masked: its results, one for each of the weights. They are not copied, and must not be written to before the
            backward that follows (autograd says so if they were).

    Returns:
        Views of ``masked`` with :func:`masked_weights`' gradient.
    """
    return list(_Written.apply(mask, feedback, len(weights), *weights, *masked)) if weights else []
