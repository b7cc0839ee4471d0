"""Filter importance, the global threshold and the mask of kept filters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._backend import define
from .checks import check_filter_vector, check_ord, check_rate, check_scores, check_weights, count_filters


def _fake_norms(weights: Sequence[Tensor], ord: int) -> Tensor:
    check_weights("filter_norms", weights)
    check_ord("filter_norms", ord)
    return weights[0].new_empty(count_filters(weights), dtype=torch.float32)


def _fake_mask(weights: Sequence[Tensor], rate: float, ord: int) -> Tensor:
    check_rate("filter_mask", rate)
    return torch.empty_like(_fake_norms(weights, ord), dtype=torch.bool)


def _fake_threshold(scores: Tensor, k: int) -> Tensor:
    check_scores("kth_threshold", scores, k)
    return scores.new_empty(())


def _fake_update(weights: Sequence[Tensor], rate: float, ord: int, mask: Tensor) -> None:
    check_rate("update_filter_masks_", rate)
    check_ord("update_filter_masks_", ord)
    check_weights("update_filter_masks_", weights)
    check_filter_vector("update_filter_masks_", "mask", mask, weights, torch.bool)


define("filter_norms(Tensor[] weights, int ord) -> Tensor", reference.filter_norms, _fake_norms)
define("kth_threshold(Tensor scores, int k) -> Tensor", reference.kth_threshold, _fake_threshold)
define("filter_mask(Tensor[] weights, float rate, int ord) -> Tensor", reference.filter_mask, _fake_mask)
define(
    "update_filter_masks_(Tensor[] weights, float rate, int ord, Tensor(a!) mask) -> ()",
    reference.update_filter_masks_,
    _fake_update,
)


@torch.no_grad()
def filter_norms(weights: Sequence[Tensor], ord: int = 1) -> Tensor:
    """Importance of every filter of a model.

    Args:
        weights: all layers' weights ``[F, C, kh, kw]`` (or any ``[F, ...]``) in model order; one dtype (float32,
            float64, bfloat16, float16), one device, contiguous or channels_last.
        ord: 1 for ``mean |w|``, 2 for ``mean w²``, over the ``K = C·kh·kw`` elements of a filter.

    Returns:
        ``[N]`` float32, ``N = Σ F``, layer by layer. Not differentiable.

    Raises:
        RuntimeError: naming ``weights[i]``, if it holds a NaN or Inf or is not as described. The compiled CUDA op
            does not wait for the device to find out: it gives the norms of such filters as they are, not finite.

    Source:
        L1 norms: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017.
    """
    if not weights:
        check_ord("filter_norms", ord)
        return torch.empty(0)
    return torch.ops.fastprune.filter_norms(weights, ord)


@torch.no_grad()
def kth_threshold(scores: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest score (0-based), ``sort(scores)[k]``, without sorting and without leaving the device.

    Args:
        scores: ``[N]`` float32, contiguous, no NaN.
        k: ``0 <= k < N``.

    Returns:
        A float32 scalar tensor.

    Raises:
        RuntimeError: if ``k`` is out of range or a score is NaN; the compiled CUDA op then returns NaN.
    """
    return torch.ops.fastprune.kth_threshold(scores, k)


@torch.no_grad()
def filter_mask(weights: Sequence[Tensor], rate: float, ord: int = 1) -> Tensor:
    """The filters to keep under one global threshold.

    ``t = sort(s)[int(N · rate)]`` over the importances ``s`` of all layers; a filter is kept when ``s > t``, strictly:
    at least ``int(N · rate) + 1`` filters are pruned, and filters that tie with the threshold go together. So rate 0
    prunes the least important filter, and a model whose filters are all equal loses every one.

    Args:
        weights: as for :func:`filter_norms`.
        rate: the share of filters to prune, ``0 <= rate < 1``.
        ord: as for :func:`filter_norms`.

    Returns:
        ``[N]`` bool, True for kept filters.

    Raises:
        RuntimeError: as :func:`filter_norms`, and if ``rate`` is out of range. The compiled CUDA op cannot raise for
            weights that are not finite without waiting for the device: it then keeps every filter. Where you wait
            anyway, ask ``filter_norms(weights).isfinite().all()``.
    """
    if not weights:
        check_rate("filter_mask", rate)
        check_ord("filter_mask", ord)
        return torch.empty(0, dtype=torch.bool)
    return torch.ops.fastprune.filter_mask(weights, rate, ord)


@torch.no_grad()
def update_filter_masks_(weights: Sequence[Tensor], rate: float, mask: Tensor, ord: int = 1) -> Tensor:
    """:func:`filter_mask` written into ``mask`` (``[N]`` bool): the form for training loops.

    It allocates nothing on a CPU; on CUDA, ``4 (N + 1)`` bytes from PyTorch's cache.

    Returns:
        ``mask``.

    Raises:
        RuntimeError: as :func:`filter_mask`. Where weights are not finite, the compiled CUDA op leaves ``mask`` as it
            was.
    """
    torch.ops.fastprune.update_filter_masks_(weights, rate, ord, mask)
    return mask
