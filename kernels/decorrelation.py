"""decorrelation and its backward: contracts in fastprune/ops/decorrelation.py. One launch each, for all layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprune.ops import reference

from . import gram, gram_gradient, kernel_covariance, orthogonality
from .tables import Call


def decorrelation(
    weights: Sequence[Tensor], kind: str, include_diagonal: bool, mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """The penalty of all layers, and the coefficients of its gradient."""
    reference.check_decorrelation("decorrelation", weights, kind, mask, precision)
    coefficients = reference.coefficients_like(weights, kind)
    penalty = weights[0].new_empty((), dtype=reference.accumulation_dtype(weights))
    call = Call(weights, kind, include_diagonal, mask, precision)
    with torch.cuda.device_of(penalty):
        if kind == "kernel-covariance":
            kernel_covariance.forward(call, penalty)
        elif kind == "orthogonality":
            orthogonality.forward(call, coefficients, penalty)
        else:
            gram.forward(call, coefficients, penalty)
    return penalty, coefficients


def decorrelation_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    kind: str,
    include_diagonal: bool,
    mask: Tensor | None,
    precision: str,
) -> list[Tensor]:
    """The gradients of all layers, slices of one tensor."""
    reference.check_decorrelation_backward(grad, weights, coefficients, kind, mask, precision)
    call = Call(weights, kind, include_diagonal, mask, precision)
    with torch.cuda.device_of(grad):
        if kind == "kernel-covariance":
            return kernel_covariance.backward(call, grad)
        if kind == "orthogonality":
            return orthogonality.backward(call, grad, coefficients)
        return gram_gradient.backward(call, grad, coefficients)
