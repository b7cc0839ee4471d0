"""Decorrelation penalties of all layers, forward and backward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import define, differentiate


def _fake(
    weights: Sequence[Tensor], kind: str, include_diagonal: bool, mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    reference.check_decorrelation("decorrelation", weights, kind, mask, precision)
    penalty = weights[0].new_empty((), dtype=reference.accumulation_dtype(weights))
    return penalty, reference.coefficients_like(weights, kind)


def _fake_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    kind: str,
    include_diagonal: bool,
    mask: Tensor | None,
    precision: str,
) -> list[Tensor]:
    reference.check_decorrelation_backward(grad, weights, coefficients, kind, mask, precision)
    return [torch.empty_like(weight) for weight in weights]


define(
    "decorrelation(Tensor[] weights, str kind, bool include_diagonal, Tensor? mask, str precision) -> (Tensor, Tensor)",
    reference.decorrelation,
    _fake,
)
define(
    "decorrelation_backward(Tensor grad, Tensor[] weights, Tensor coefficients, str kind, bool include_diagonal, "
    "Tensor? mask, str precision) -> Tensor[]",
    reference.decorrelation_backward,
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, ctx.kind, ctx.include_diagonal, mask, ctx.precision = inputs
    ctx.has_mask = mask is not None
    ctx.save_for_backward(output[1], *([mask] if ctx.has_mask else []), *weights)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    coefficients, *rest = ctx.saved_tensors
    mask = rest.pop(0) if ctx.has_mask else None
    gradients = torch.ops.fastprune.decorrelation_backward(
        grad, rest, coefficients, ctx.kind, ctx.include_diagonal, mask, ctx.precision
    )
    return gradients, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: list[Tensor]) -> None:
    raise RuntimeError("decorrelation has no second derivative: do not pass create_graph=True through it")


differentiate("decorrelation", _setup, _backward)
differentiate("decorrelation_backward", None, _no_second_derivative)


def decorrelation(
    weights: Sequence[Tensor],
    kind: str = "covariance",
    include_diagonal: bool = True,
    mask: Tensor | None = None,
    precision: str = "highest",
) -> Tensor:
    """A penalty on filters that resemble each other, summed over layers, with its exact gradient.

    With ``W_c`` the rows of ``W.flatten(1)`` less their means, ``K`` elements each, and ``φ`` the golden ratio:

    - ``covariance``: ``Σ_{i≤j} |C_ij|``, ``C = W_c W_cᵀ / (K − 1)``; 0 for ``K = 1``.
    - ``kernel-covariance``: the same for every slice ``W[o, i]`` (``[kh, kw]``, rows as variables, divisor
      ``kw − 1``) of 4-D weights with ``kw > 1``; others give 0.
    - ``correlation``: ``‖P − diag P‖_F / n``, ``P`` the Pearson matrix of the ``n`` kept filters; a filter that is
      constant (``‖w_c‖ ≤ 10⁻⁶ ‖w‖``) has no correlations.
    - ``orthogonality``: ``σ²``, ``σ`` the largest singular value of ``A = WᵀW − I`` by one power iteration from a
      fixed ``u₀[k] = frac((k + 1) / φ) − 1/2``: ``‖A²u₀‖² / ‖Au₀‖²``, differentiated as it is computed.

    Sums are in float32 or better, two-pass, deterministic. The subgradient of ``|x|`` and of norms at 0 is 0, so
    degenerate layers have finite gradients. A single filter has no partner: with the diagonal left out its penalty is
    0, with it, its variance.

    Args:
        weights: as for :func:`fastprune.ops.filter_norms`.
        kind: one of the table.
        include_diagonal: whether the two covariances count ``C_ii``.
        mask: ``[N]`` bool; filters that are False are left out, and their gradient is 0.
        precision: how exact products of matrices need be, as for :func:`torch.set_float32_matmul_precision`:
            ``highest`` (float32), ``high`` (TF32) or ``medium`` (bfloat16). Sums are always in float32, means and
            float64 weights are not rounded, and an implementation may be more exact than it is asked to be: on the
            CPU it is.

    Returns:
        A scalar, float32 (float64 for float64 weights).

    Raises:
        RuntimeError: if an argument is not as described.

    Source:
        ``correlation``: Zhu, Zhou, Li, "Improving Deep Neural Network Sparsity through Decorrelation Regularization",
        IJCAI 2018. ``orthogonality``: Bansal, Chen, Wang, "Can We Gain More from Orthogonality Regularizations",
        NeurIPS 2018.
    """
    if not weights:  # of which no dispatcher could tell the device
        reference.check_decorrelation("decorrelation", weights, kind, mask, precision)
        return torch.zeros(())
    return torch.ops.fastprune.decorrelation(weights, kind, include_diagonal, mask, precision)[0]
