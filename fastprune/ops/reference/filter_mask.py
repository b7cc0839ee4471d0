"""The rule of the filter mask: norms, the global threshold, what is above it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_filter_vector, check_ord, check_rate, check_scores, check_weights


def norms_of(weight: Tensor, ord: int) -> Tensor:
    """mean |w| (ord 1) or mean w² (ord 2) of a layer's filters, [F] float32."""
    row = weight.flatten(1).double()
    return (row.abs() if ord == 1 else row.square()).mean(1).float()


def filter_norms(weights: Sequence[Tensor], ord: int) -> Tensor:
    """The norms of every filter, [N] float32."""
    check_weights("filter_norms", weights)
    check_ord("filter_norms", ord)
    norms = [norms_of(weight, ord) for weight in weights]
    for i, norm in enumerate(norms):
        if not norm.isfinite().all():
            raise RuntimeError(f"filter_norms: weights[{i}] has a NaN or Inf: its filter norms are not finite")
    return torch.cat(norms)


def kth_threshold(scores: Tensor, k: int) -> Tensor:
    """``sort(scores)[k]``, a float32 scalar."""
    check_scores("kth_threshold", scores, k)
    if scores.isnan().any():
        raise RuntimeError("kth_threshold: scores have a NaN")
    return scores.sort().values[k].clone()


def filter_mask(weights: Sequence[Tensor], rate: float, ord: int) -> Tensor:
    """``filter_norms > sort(filter_norms)[int(N · rate)]``, [N] bool."""
    check_rate("filter_mask", rate)
    scores = filter_norms(weights, ord)
    return scores > kth_threshold(scores, int(scores.numel() * rate))


def update_filter_masks_(weights: Sequence[Tensor], rate: float, ord: int, mask: Tensor) -> None:
    """Write ``filter_mask(weights, rate, ord)`` into ``mask``."""
    check_rate("update_filter_masks_", rate)
    check_weights("update_filter_masks_", weights)
    check_ord("update_filter_masks_", ord)
    check_filter_vector("update_filter_masks_", "mask", mask, weights, torch.bool)
    if weights:
        mask.copy_(filter_mask(weights, rate, ord))
