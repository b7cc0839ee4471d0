"""Decorrelation regularisation: a callable term of the loss."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from . import ops
from .arguments import finite_number
from .nn import MaskedConv2d, is_listed, listed_of

Kind = Literal["covariance", "kernel-covariance", "correlation", "orthogonality"]
Precision = Literal["highest", "high", "medium"]


class Decorrelation:
    """``alpha · R`` over the dense weights of all convolutions of a model: ``loss = criterion(...) + decorrelation()``.

    Args:
        model: its ``Conv2d`` weights are looked up now, and read at every call.
        kind: see :func:`fastprune.ops.decorrelation`.
        alpha: the factor of the penalty.
        include_diagonal: whether the covariances count variances.
        include_pruned: False restricts it to the filters that masks keep.
        ignore: names or modules to leave out, as for :func:`fastprune.nn.mask_convolutions`.
        precision: of products of matrices, see :func:`fastprune.ops.decorrelation`.

    Raises:
        ValueError: for an unknown kind or precision, an alpha that is negative or not finite, an entry of ``ignore``
            that names nothing, or a model without convolutions.
        TypeError: for an alpha that is no number, or an ``ignore`` that is no list.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Kind = "covariance",
        alpha: float = 1.0,
        include_diagonal: bool = True,
        include_pruned: bool = True,
        ignore: Iterable[str | nn.Module] = (),
        precision: Precision = "highest",
    ) -> None:
        if kind not in ops.DECORRELATION_KINDS:
            raise ValueError(f"kind must be one of {', '.join(ops.DECORRELATION_KINDS)}; got {kind!r}")
        alpha = finite_number("alpha", alpha)
        if alpha < 0:
            raise ValueError(f"alpha must not be negative, got {alpha}")
        if precision not in ops.PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(ops.PRECISIONS)}; got {precision!r}")
        ignore = listed_of(model, "ignore", ignore)
        self.kind, self.alpha, self.precision = kind, alpha, precision
        self.include_diagonal, self.include_pruned = include_diagonal, include_pruned
        self.layers = [
            module
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and not is_listed(name, module, ignore)
        ]
        if not self.layers:
            raise ValueError("the model has no Conv2d to decorrelate")

    def __call__(self) -> Tensor:
        """``alpha · R``, a scalar with a gradient."""
        return self.alpha * self.penalty()

    def penalty(self) -> Tensor:
        """``R``, a scalar with a gradient."""
        mask = None if self.include_pruned else torch.cat([self._filter_mask(layer) for layer in self.layers])
        weights = [layer.weight for layer in self.layers]
        return ops.decorrelation(weights, self.kind, self.include_diagonal, mask, self.precision)

    @staticmethod
    def _filter_mask(layer: nn.Conv2d) -> Tensor:
        if not isinstance(layer, MaskedConv2d):
            return torch.ones(layer.out_channels, dtype=torch.bool, device=layer.weight.device)
        return layer.mask if layer.mask.dim() == 1 else layer.mask.flatten(1).any(1)
