"""Every op in plain PyTorch: slow, obvious, float64-capable. This is the definition of right.

The contracts (shapes, dtypes, errors, sources) are the docstrings of the public functions beside this file.
Losses and norms are computed in float64 and rounded once, so that an implementation can be judged by its error.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import DTYPES, check_filter_vector, check_ord, check_rate, check_weights

# A filter whose centred norm is below this share of its norm is constant up to rounding: its correlations are 0.
CONSTANT_FILTER = 1e-6


# ---------------------------------------------------------------------------------------------- filter_mask


def filter_norms(weights: Sequence[Tensor], ord: int) -> Tensor:
    """mean |w| (ord 1) or mean w² (ord 2) of every filter, [N] float32."""
    check_weights("filter_norms", weights)
    check_ord("filter_norms", ord)
    rows = [weight.flatten(1).double() for weight in weights]
    norms = [(row.abs() if ord == 1 else row.square()).mean(1).float() for row in rows]
    for i, norm in enumerate(norms):
        if not norm.isfinite().all():
            raise RuntimeError(f"filter_norms: weights[{i}] has a NaN or Inf: its filter norms are not finite")
    return torch.cat(norms)


def kth_threshold(scores: Tensor, k: int) -> Tensor:
    """``sort(scores)[k]``, a float32 scalar."""
    if scores.dim() != 1 or scores.dtype != torch.float32 or not scores.is_contiguous():
        raise RuntimeError(
            f"kth_threshold: scores must be a contiguous float32 vector, "
            f"got {str(scores.dtype).removeprefix('torch.')} {list(scores.shape)}"
        )
    if not 0 <= k < scores.numel():
        raise RuntimeError(f"kth_threshold: k must be in [0, {scores.numel()}), got {k}")
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
    check_filter_vector("update_filter_masks_", "mask", mask, weights, torch.bool)
    if weights:
        mask.copy_(filter_mask(weights, rate, ord))


# ---------------------------------------------------------------------------------------------- weight_mask


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
        if (
            grad.shape != weight.shape
            or grad.dtype != weight.dtype
            or any(a != b and n > 1 for a, b, n in zip(grad.stride(), weight.stride(), weight.shape))
        ):
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


# ---------------------------------------------------------------------------------------------- masked_weights


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


# ---------------------------------------------------------------------------------------------- decorrelation

DECORRELATION_KINDS = ("covariance", "kernel-covariance", "correlation", "orthogonality")


def check_decorrelation(op: str, weights: Sequence[Tensor], kind: str, mask: Tensor | None) -> None:
    """Raise unless the arguments of ``decorrelation`` are right."""
    check_weights(op, weights)
    if kind not in DECORRELATION_KINDS:
        raise RuntimeError(f"{op}: kind must be one of {', '.join(DECORRELATION_KINDS)}; got {kind}")
    if mask is not None:
        check_filter_vector(op, "mask", mask, weights, torch.bool)


def accumulation_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """The dtype of penalties: float64 for float64 weights, else float32."""
    return torch.float64 if weights and weights[0].dtype == torch.float64 else torch.float32


def coefficients_like(weights: Sequence[Tensor], kind: str) -> Tensor:
    """An empty tensor of the shape and dtype of the forward's second output."""
    if kind in ("covariance", "correlation"):
        size = sum(weight.shape[0] ** 2 for weight in weights)
    else:
        size = sum(2 * weight[0].numel() for weight in weights) if kind == "orthogonality" else 0
    dtype = torch.int8 if kind == "covariance" else accumulation_dtype(weights)
    return weights[0].new_empty(size, dtype=dtype)


def kept_rows(weights: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Per layer, a [F] bool of the filters that take part."""
    if mask is None:
        return [weight.new_ones(weight.shape[0], dtype=torch.bool) for weight in weights]
    return list(mask.split([weight.shape[0] for weight in weights]))


def covariance(weight: Tensor, kept: Tensor, include_diagonal: bool) -> tuple[Tensor, Tensor]:
    """Σ_{i≤j} |C_ij|, and ∂/∂C made symmetric: sign(C_ij), 2·sign on the diagonal."""
    rows = weight.flatten(1)
    degrees = rows.shape[1] - 1
    if degrees == 0:
        return rows.new_zeros(()), rows.new_zeros(rows.shape[0], rows.shape[0])
    centred = (rows - rows.mean(1, keepdim=True)) * kept[:, None]
    cov = centred @ centred.T / degrees
    counted = cov if include_diagonal else cov - cov.diagonal().diag()
    return counted.abs().triu().sum(), counted.sign() + counted.sign().diagonal().diag()


def correlation(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """‖P − diag P‖_F / n, and off-diagonal P with −Σ_j P_ij² on the diagonal."""
    rows = weight.flatten(1)
    unit = unit_rows(rows, kept)[0]
    pearson = unit @ unit.T
    pearson = pearson - pearson.diagonal().diag()
    squares = pearson.square().sum(1)
    return squares.sum().sqrt() / kept.sum().clamp(min=1), pearson - squares.diag()


def unit_rows(rows: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Centred rows over their norms, and 1 / norm; both 0 for filters that are constant or left out."""
    centred = rows - rows.mean(1, keepdim=True)
    norm = centred.norm(dim=1)
    used = kept & (norm > CONSTANT_FILTER * rows.norm(dim=1))
    inverse = torch.where(used, 1 / torch.where(used, norm, 1), 0)
    return centred * inverse[:, None], inverse


def kernel_covariance(weight: Tensor, kept: Tensor, include_diagonal: bool) -> tuple[Tensor, Tensor]:
    """Σ over the slices W[o, i] of Σ_{i≤j} |C_ij|, rows as variables; and ∂/∂W."""
    if weight.dim() != 4 or weight.shape[3] == 1:
        return weight.new_zeros(()), torch.zeros_like(weight)
    degrees = weight.shape[3] - 1
    centred = (weight - weight.mean(3, keepdim=True)) * kept[:, None, None, None]
    cov = centred @ centred.transpose(2, 3) / degrees
    if not include_diagonal:
        cov = cov - torch.diag_embed(cov.diagonal(dim1=2, dim2=3))
    sign = cov.sign() + torch.diag_embed(cov.sign().diagonal(dim1=2, dim2=3))
    return cov.abs().triu().sum(), sign @ centred / degrees


def start_vector(weight: Tensor) -> Tensor:
    """The fixed start of the power iteration, [K]: the Weyl sequence frac((k + 1)/φ) − 1/2, φ the golden ratio."""
    steps = torch.arange(1, weight[0].numel() + 1, dtype=torch.float64, device=weight.device)
    return (steps * ((math.sqrt(5) - 1) / 2)).frac() - 0.5


def orthogonality(weight: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """σ² = ‖A a‖² / ‖a‖² with A = WᵀW − I, a = A u₀; and [a, b = A a]."""
    rows = weight.flatten(1) * kept[:, None]
    u = start_vector(weight).to(rows.dtype)
    a = rows.T @ (rows @ u) - u
    b = rows.T @ (rows @ a) - a
    aa = a @ a
    return torch.where(aa > 0, b @ b / torch.where(aa > 0, aa, 1), 0), torch.cat([a, b])


def decorrelation(
    weights: Sequence[Tensor], kind: str, include_diagonal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The penalty of all layers, and what the backward needs of it."""
    check_decorrelation("decorrelation", weights, kind, mask)
    total = weights[0].new_zeros((), dtype=torch.float64)
    saved = []
    for weight, kept in zip(weights, kept_rows(weights, mask)):
        w = weight.double()
        if kind == "covariance":
            penalty, coefficients = covariance(w, kept, include_diagonal)
        elif kind == "correlation":
            penalty, coefficients = correlation(w, kept)
        elif kind == "orthogonality":
            penalty, coefficients = orthogonality(w, kept)
        else:
            penalty, coefficients = kernel_covariance(w, kept, include_diagonal)[0], w.new_empty(0)
        total = total + penalty
        saved.append(coefficients.flatten())
    out = coefficients_like(weights, kind)
    return total.to(accumulation_dtype(weights)), torch.cat(saved).to(out.dtype)


def decorrelation_backward(
    grad: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    kind: str,
    include_diagonal: bool,
    mask: Tensor | None,
) -> list[Tensor]:
    """``grad · ∂R/∂W`` for every layer, with the dtype and strides of the weights."""
    check_decorrelation("decorrelation_backward", weights, kind, mask)
    expected = coefficients_like(weights, kind)
    if coefficients.shape != expected.shape or coefficients.dtype != expected.dtype:
        raise RuntimeError(
            f"decorrelation_backward: coefficients must be the forward's, "
            f"{str(expected.dtype).removeprefix('torch.')} {list(expected.shape)}, "
            f"got {str(coefficients.dtype).removeprefix('torch.')} {list(coefficients.shape)}"
        )
    accumulator = accumulation_dtype(weights)
    if grad.dtype != accumulator or grad.numel() != 1:
        raise RuntimeError(
            f"decorrelation_backward: grad must be a scalar of {str(accumulator).removeprefix('torch.')}, "
            f"got {str(grad.dtype).removeprefix('torch.')} {list(grad.shape)}"
        )
    sizes = [coefficients_like([weight], kind).numel() for weight in weights]
    out = []
    for weight, kept, part in zip(weights, kept_rows(weights, mask), coefficients.double().split(sizes)):
        w = weight.double()
        rows = w.flatten(1)
        f = rows.shape[0]
        if kind == "covariance":
            centred = rows - rows.mean(1, keepdim=True)
            gradient = part.view(f, f) @ centred / max(rows.shape[1] - 1, 1)
        elif kind == "correlation":
            unit, inverse = unit_rows(rows, kept)
            norm = (-part.view(f, f).diagonal().sum()).sqrt()
            scale = torch.where(norm > 0, 2 / (torch.where(norm > 0, norm, 1) * kept.sum().clamp(min=1)), 0)
            gradient = scale * inverse[:, None] * (part.view(f, f) @ unit)
        elif kind == "orthogonality":
            gradient = orthogonality_gradient(rows * kept[:, None], start_vector(weight), *part.chunk(2))
        else:
            gradient = kernel_covariance(w, kept, include_diagonal)[1]
        like = torch.empty_like(weight)
        out.append(like.copy_((gradient * grad.double()).view(weight.shape)))
    return out


def orthogonality_gradient(rows: Tensor, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """∂(‖b‖²/‖a‖²)/∂W for a = A u, b = A a, A = WᵀW − I: every A applied adds W(x yᵀ + y xᵀ)."""
    aa = a @ a
    if aa == 0:
        return torch.zeros_like(rows)
    db = 2 * b / aa
    da = rows.T @ (rows @ db) - db - 2 * (b @ b) / aa**2 * a
    pairs = [(db, a), (a, db), (da, u), (u, da)]
    return sum((torch.outer(rows @ x, y) for x, y in pairs), torch.zeros_like(rows))
