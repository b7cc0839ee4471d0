"""How important each filter is: the norms of the ops, the geometric median, or what a user computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from . import ops

ScoreFunction = Callable[[str, Tensor], Tensor]
Importance = Literal["l1", "l2", "fpgm"] | ScoreFunction
ORDS = {"l1": 1, "l2": 2}


def check_importance(importance: Importance) -> None:
    """Raise ValueError for what is not an importance."""
    if importance not in ("l1", "l2", "fpgm") and not callable(importance):
        raise ValueError(
            f"importance must be l1, l2, fpgm, or a function of a layer's name and weight [F, ...] that returns its "
            f"filters' scores [F]; got {importance!r}"
        )


@torch.no_grad()
def scores(weights: Mapping[str, Tensor], importance: Importance) -> Tensor:
    """The importance of every filter of a model.

    Args:
        weights: by layer name, ``[F, ...]``, in model order, on one device.
        importance: ``l1`` or ``l2``, see :func:`fastprune.ops.filter_norms`; ``fpgm``, see :func:`fpgm`; or a function
            of a layer's name and weight that returns ``[F]`` floating-point scores, the larger the more important.

    Returns:
        ``[N]`` float32, ``N = Σ F``, layer by layer.

    Raises:
        RuntimeError: naming the layer, for a weight or a score that is NaN or Inf. On a GPU nobody waits to see.
        ValueError: naming the layer, for a function's result of another shape or dtype.
    """
    if isinstance(importance, str) and importance in ORDS:
        return ops.filter_norms(list(weights.values()), ORDS[importance])
    function = fpgm if importance == "fpgm" else importance
    assert callable(function)
    found = [_checked(name, weight, function(name, weight)) for name, weight in weights.items()]
    return torch.cat(found)


def _checked(name: str, weight: Tensor, result: Tensor) -> Tensor:
    if not isinstance(result, Tensor) or result.shape != weight.shape[:1] or not result.is_floating_point():
        was = f"{list(result.shape)} of {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"layer {name}: importance must return [{len(weight)}] floating-point scores, got {was}")
    if result.device.type == "cpu" and not result.isfinite().all():
        raise RuntimeError(f"layer {name}: a filter's score is NaN or Inf")
    return result.detach().to(weight.device, torch.float32)


def fpgm(name: str, weight: Tensor) -> Tensor:
    """How far each filter lies from the others of its layer: those near the geometric median can be replaced by them.

    ``s_i = Σ_j ‖w_i − w_j‖₂ / (F √K)``: the mean distance, by ``√K`` so that layers of any width compare in a global
    threshold as the L2 norms of their elements would. Distances come of the Gram matrix of the centred filters, in
    float64, since they are differences of its entries.

    Args:
        name: not used; it makes this a function of the form that users give.
        weight: ``[F, ...]``.

    Returns:
        ``[F]`` float32.

    Source:
        He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR 2019.
    """
    rows = weight.detach().double().flatten(1)
    if rows.numel() == 0:
        return rows.new_zeros(len(rows), dtype=torch.float32)
    rows = rows - rows.mean(0)
    gram = rows @ rows.T
    squares = gram.diagonal()
    squared = squares[:, None] + squares[None, :] - 2 * gram
    # What is left of equal filters by rounding is no distance: a share of the largest of the two squares.
    noise = 8 * torch.finfo(torch.float64).eps * torch.maximum(squares[:, None], squares[None, :])
    distances = torch.where(squared > noise, squared, 0).sqrt()
    return (distances.mean(1) / rows.shape[1] ** 0.5).float()
