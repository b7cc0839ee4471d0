"""The mask of kept single weights: unstructured pruning."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from ._backend import define


def _fake(weights: Sequence[Tensor], rate: float, importance: str, grads: Sequence[Tensor]) -> list[Tensor]:
    reference.check_weight_mask(weights, rate, importance, grads)
    return [torch.empty_like(weight, dtype=torch.bool) for weight in weights]


define(
    "weight_mask(Tensor[] weights, float rate, str importance, Tensor[] grads) -> Tensor[]",
    reference.weight_mask,
    _fake,
)


@torch.no_grad()
def weight_mask(
    weights: Sequence[Tensor], rate: float, importance: str = "l1", grads: Sequence[Tensor] = ()
) -> list[Tensor]:
    """The single weights to keep under one global threshold.

    ``t = sort(s)[int(P · rate)]`` over the importances ``s`` of all ``P`` weights of the model; a weight is kept when
    ``s > t``, strictly.
    Importances are float32 (products of float32 in float32).

    Args:
        weights: as for :func:`fastprune.ops.filter_norms`.
        rate: the share of weights to prune, ``0 <= rate < 1``.
        importance: ``l1`` (``|w|``), ``l2`` (``w²``), ``grad`` (``|g|``) or ``taylor`` (``|w · g|``).
        grads: the gradients ``g``, with the shapes, dtype and strides of ``weights``; only for ``grad`` and ``taylor``.

    Returns:
        Bool masks with the shapes and strides of ``weights``, True for kept weights.

    Raises:
        RuntimeError: naming ``weights[i]``, if an importance is NaN or Inf, or an argument is not as described. The
            compiled CUDA op cannot raise for importances without waiting for the device: it then keeps every weight.

    Source:
        ``|w · g|``: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019.
    """
    if not weights:
        reference.check_weight_mask(weights, rate, importance, grads)
        return []
    return torch.ops.fastprune.weight_mask(weights, rate, importance, grads)
