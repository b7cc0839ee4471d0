"""The penalties on filters that resemble each other, and their gradients."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_filter_vector, check_weights

# A filter whose centred norm is below this share of its norm is constant up to rounding: its correlations are 0.
CONSTANT_FILTER = 1e-6
DECORRELATION_KINDS = ("covariance", "kernel-covariance", "correlation", "orthogonality")
PRECISIONS = ("highest", "high", "medium")
ENTRIES_PER_WORD = 16  # of the packed coefficients of a covariance


def check_decorrelation(op: str, weights: Sequence[Tensor], kind: str, mask: Tensor | None, precision: str) -> None:
    """Raise unless the arguments of ``decorrelation`` are right."""
    check_weights(op, weights)
    if kind not in DECORRELATION_KINDS:
        raise RuntimeError(f"{op}: kind must be one of {', '.join(DECORRELATION_KINDS)}; got {kind}")
    if mask is not None:
        check_filter_vector(op, "mask", mask, weights, torch.bool)
    if precision not in PRECISIONS:
        raise RuntimeError(f"{op}: precision must be one of {', '.join(PRECISIONS)}; got {precision}")
    kept = 0
    for weight in weights:
        kept += count_coefficients(weight, kind)
        if kept >= 2**63:
            raise RuntimeError(f"{op}: the coefficients of {weight.shape[0]} filters are more than 2^63")


def accumulation_dtype(weights: Sequence[Tensor]) -> torch.dtype:
    """The dtype of penalties: float64 for float64 weights, else float32."""
    return torch.float64 if weights and weights[0].dtype == torch.float64 else torch.float32


def coefficients_like(weights: Sequence[Tensor], kind: str) -> Tensor:
    """An empty tensor of the shape and dtype of the forward's second output."""
    size = sum(count_coefficients(weight, kind) for weight in weights)
    dtype = torch.int32 if kind == "covariance" else accumulation_dtype(weights)
    return weights[0].new_empty(size, dtype=dtype)


def count_coefficients(weight: Tensor, kind: str) -> int:
    """How many of a layer the forward keeps."""
    filters = weight.shape[0]
    if kind == "covariance":
        return filters * words_per_row(filters)
    if kind == "correlation":
        return filters * filters
    return 2 * (weight.numel() // filters) if kind == "orthogonality" else 0


def check_decorrelation_backward(
    grad: Tensor, weights: Sequence[Tensor], coefficients: Tensor, kind: str, mask: Tensor | None, precision: str
) -> None:
    """Raise unless the arguments of ``decorrelation_backward`` are right."""
    check_decorrelation("decorrelation_backward", weights, kind, mask, precision)
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


def words_per_row(filters: int) -> int:
    """The length of a packed row."""
    return (filters + ENTRIES_PER_WORD - 1) // ENTRIES_PER_WORD


def pack_signs(signs: Tensor) -> Tensor:
    """[F, F] of 0, 1, 2 and −1 as int32 [F, words_per_row(F)]: two bits each, the lowest first; −1 is 3."""
    codes = torch.nn.functional.pad(signs.int() & 3, (0, -signs.shape[1] % ENTRIES_PER_WORD))
    shifts = torch.arange(0, 2 * ENTRIES_PER_WORD, 2, dtype=torch.int32, device=signs.device)
    words = codes.view(signs.shape[0], words_per_row(signs.shape[1]), ENTRIES_PER_WORD) << shifts
    return words.sum(2, dtype=torch.int32)


def unpack_signs(words: Tensor, filters: int) -> Tensor:
    """What ``pack_signs`` was given, as float64."""
    shifts = torch.arange(0, 2 * ENTRIES_PER_WORD, 2, dtype=torch.int32, device=words.device)
    codes = (words.view(filters, -1, 1) >> shifts & 3).flatten(1)[:, :filters]
    return torch.where(codes == 3, -1, codes).double()


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
    weights: Sequence[Tensor], kind: str, include_diagonal: bool, mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """The penalty of all layers, and what the backward needs of it."""
    check_decorrelation("decorrelation", weights, kind, mask, precision)
    total = weights[0].new_zeros((), dtype=torch.float64)
    saved = []
    for weight, kept in zip(weights, kept_rows(weights, mask)):
        w = weight.double()
        if kind == "covariance":
            penalty, signs = covariance(w, kept, include_diagonal)
            coefficients = pack_signs(signs)
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
    precision: str,
) -> list[Tensor]:
    """``grad · ∂R/∂W`` for every layer, with the dtype and strides of the weights."""
    check_decorrelation_backward(grad, weights, coefficients, kind, mask, precision)
    sizes = [coefficients_like([weight], kind).numel() for weight in weights]
    out = []
    for weight, kept, part in zip(weights, kept_rows(weights, mask), coefficients.split(sizes)):
        w = weight.double()
        rows = w.flatten(1)
        f = rows.shape[0]
        if kind == "covariance":
            centred = rows - rows.mean(1, keepdim=True)
            gradient = unpack_signs(part, f) @ centred / max(rows.shape[1] - 1, 1)
        elif kind == "correlation":
            unit, inverse = unit_rows(rows, kept)
            pearson = part.double().view(f, f)
            norm = (-pearson.diagonal().sum()).sqrt()
            scale = torch.where(norm > 0, 2 / (torch.where(norm > 0, norm, 1) * kept.sum().clamp(min=1)), 0)
            gradient = scale * inverse[:, None] * (pearson @ unit)
        elif kind == "orthogonality":
            gradient = orthogonality_gradient(rows * kept[:, None], start_vector(weight), *part.double().chunk(2))
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
