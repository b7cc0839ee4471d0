"""The filter rule over single weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_rate, check_weights, same_layout


def weight_scores(weight: Tensor, grad: Tensor | None, importance: str) -> Tensor:
    """The importance of every single weight, float32, shaped like ``weight``."""
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.to(compute)
    if importance == "l1":
        return w.abs().float()
    if importance == "l2":
        return w.square().float()
    assert grad is not None
    g = grad.to(compute)
    return (g if importance == "grad" else w * g).abs().float()


def check_weight_mask(weights: Sequence[Tensor], rate: float, importance: str, grads: Sequence[Tensor]) -> None:
    """Raise unless the arguments of ``weight_mask`` are right."""
    check_rate("weight_mask", rate)
    check_weights("weight_mask", weights)
    if importance not in ("l1", "l2", "grad", "taylor"):
        raise RuntimeError(f"weight_mask: importance must be l1, l2, grad or taylor, got {importance}")
    needed = len(weights) if importance in ("grad", "taylor") else 0
    if len(grads) != needed:
        raise RuntimeError(f"weight_mask: importance {importance} takes {needed} gradients, got {len(grads)}")
    for i, (weight, grad) in enumerate(zip(weights, grads)):
        if grad.dtype != weight.dtype or not same_layout(grad, weight):
            raise RuntimeError(f"weight_mask: grads[{i}] must have the shape, dtype and strides of weights[{i}]")


def weight_mask(weights: Sequence[Tensor], rate: float, importance: str, grads: Sequence[Tensor]) -> list[Tensor]:
    """The filter rule over all single weights; bool masks shaped like the weights."""
    check_weight_mask(weights, rate, importance, grads)
    padded: list[Tensor | None] = [*grads] or [None] * len(weights)
    scores = [weight_scores(w, g, importance) for w, g in zip(weights, padded)]
    for i, score in enumerate(scores):
        if not score.isfinite().all():
            raise RuntimeError(f"weight_mask: weights[{i}] has a NaN or Inf: its importances are not finite")
    every = torch.cat([score.flatten() for score in scores])
    threshold = every.sort().values[int(every.numel() * rate)]
    return [score > threshold for score in scores]
