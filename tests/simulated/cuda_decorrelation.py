"""csrc/cuda/launchers/decorrelation.cpp: the checks, and the launchers of the kinds."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastprune.ops import reference

from . import cuda_decorrelation_gram as gram
from . import cuda_decorrelation_kernel_covariance as kernel_covariance
from . import cuda_decorrelation_orthogonality as orthogonality
from .gpu import Gpu


def decorrelation(
    gpu: Gpu, weights: Sequence[Tensor], kind: str, include_diagonal: bool, mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    reference.check_decorrelation("decorrelation", weights, kind, mask, precision)
    if kind == "kernel-covariance":
        return kernel_covariance.forward(gpu, weights, include_diagonal, mask)
    if kind == "orthogonality":
        return orthogonality.forward(gpu, weights, mask)
    return gram.forward(gpu, weights, kind, include_diagonal, mask, precision)


def decorrelation_backward(
    gpu: Gpu,
    grad: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    kind: str,
    include_diagonal: bool,
    mask: Tensor | None,
    precision: str,
) -> list[Tensor]:
    reference.check_decorrelation("decorrelation_backward", weights, kind, mask, precision)
    if kind == "kernel-covariance":
        return kernel_covariance.backward(gpu, grad, weights, include_diagonal, mask)
    if kind == "orthogonality":
        return orthogonality.backward(gpu, grad, weights, coefficients, mask)
    return gram.backward(gpu, grad, weights, coefficients, kind, include_diagonal, mask, precision)
