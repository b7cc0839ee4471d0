"""Masked weights and their straight-through gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import DTYPES, check_filter_vector, check_weights


def per_filter(vector: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Split an [N] vector by layer, each part shaped to broadcast over its weight."""
    parts = vector.split([weight.shape[0] for weight in weights])
    return [part.view(-1, *[1] * (weight.dim() - 1)) for part, weight in zip(parts, weights)]


def check_masked_weights(
    op: str, weights: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None
) -> None:
    """Raise unless the arguments of ``masked_weights`` (or of its backward) are right."""
    check_weights(op, weights)
    if dtype not in DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise RuntimeError(f"{op}: dtype must be one of float32, float64, bfloat16, float16; got {name}")
    check_filter_vector(op, "mask", mask, weights, torch.bool)
    if feedback is not None:
        check_filter_vector(op, "feedback", feedback, weights, torch.float32)


def masked_weights(
    weights: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None
) -> list[Tensor]:
    """``W ⊙ mask`` in ``dtype``: pruned filters are exactly 0, whatever they held."""
    check_masked_weights("masked_weights", weights, mask, dtype, feedback)
    zero = torch.zeros((), device=mask.device, dtype=dtype)
    return [torch.where(m, w.to(dtype), zero) for w, m in zip(weights, per_filter(mask, weights))]


def masked_weights_backward(
    grads: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None
) -> list[Tensor]:
    """The gradient as it is for kept filters, times ``feedback`` (1 if None) for pruned ones, in ``dtype``."""
    check_masked_weights("masked_weights_backward", grads, mask, dtype, feedback)
    if feedback is None:
        return [grad.to(dtype, copy=True) for grad in grads]
    compute = torch.float64 if grads and grads[0].dtype == torch.float64 else torch.float32
    scale = torch.where(mask, torch.ones_like(feedback), feedback).to(compute)
    scaled = [torch.where(s == 0, 0, grad.to(compute) * s) for grad, s in zip(grads, per_filter(scale, grads))]
    return [grad.to(dtype) for grad in scaled]
