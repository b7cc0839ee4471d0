"""The rivals: plain PyTorch as a good user writes it, and the original way, both written afresh.

"The original way" is how the first published code of the method works (design notes, section 1): every layer makes
a round trip through numpy, scores are sorted there, and the masks, expanded to the shape of the weights, are
written filter by filter from Python. Its decorrelation term is detached: it has a value, but no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same by `torch.compile`, for these very shapes and as if nothing had been compiled before."""
    torch.compiler.reset()
    return torch.compile(call, dynamic=False)


# ------------------------------------------------------------------------------------------- filter masks


def pytorch_masks(weights: list[Tensor], rate: float) -> Tensor:
    """[N] bool; one reduction per layer, one selection for the model, nothing leaves the device."""
    scores = torch.cat([weight.abs().mean((1, 2, 3)) for weight in weights])
    return scores > scores.kthvalue(int(len(scores) * rate) + 1).values


def pytorch_norms(weights: list[Tensor]) -> Tensor:
    """[N], mean |w| of every filter, with `torch.linalg.vector_norm`, which makes no copy of the absolute values."""
    return torch.cat([torch.linalg.vector_norm(weight, 1, (1, 2, 3)) / weight[0].numel() for weight in weights])


def pytorch_vector_norm_masks(weights: list[Tensor], rate: float) -> Tensor:
    """The masks by those norms."""
    scores = pytorch_norms(weights)
    return scores > scores.kthvalue(int(len(scores) * rate) + 1).values


def pytorch_topk_masks(weights: list[Tensor], rate: float) -> Tensor:
    """The masks by `torch.topk` instead of `kthvalue`: the threshold is the least of the N - k largest."""
    scores = torch.cat([weight.abs().mean((1, 2, 3)) for weight in weights])
    return scores > scores.topk(len(scores) - int(len(scores) * rate), sorted=False).values.min()


def original_importances(weights: list[Tensor]) -> list[np.ndarray]:
    """mean |w| of every filter, layer by layer in numpy."""
    return [np.abs(weight.detach().cpu().numpy()).mean(axis=(1, 2, 3)) for weight in weights]


def original_norms(weights: list[Tensor]) -> Tensor:
    """The same as one [N] tensor."""
    return torch.from_numpy(np.concatenate(original_importances(weights)))


def original_masks(weights: list[Tensor], rate: float, masks: list[Tensor]) -> None:
    """Write the layers' masks, float32 and shaped like the weights, filter by filter."""
    importances = original_importances(weights)
    scores = np.sort(np.concatenate(importances))
    threshold = scores[int(len(scores) * rate)]
    for importance, mask in zip(importances, masks):
        for f, kept in enumerate(importance > threshold):
            mask[f] = 1.0 if kept else 0.0


# ----------------------------------------------------------------------------------------- masked weights


class _StraightThrough(torch.autograd.Function):
    """W · mask in another dtype; the gradient passes as it is."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        return (weight * mask).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].float(), None, None


def pytorch_masked(weights: list[Tensor], masks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """One call per layer; `masks` are [F, 1, 1, 1]."""
    return [_StraightThrough.apply(weight, mask, dtype) for weight, mask in zip(weights, masks)]


class _ForeachStraightThrough(torch.autograd.Function):
    """W · mask of all layers in another dtype, by `torch._foreach_*`; the gradients pass as they are."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, masks: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(_foreach_cast(torch._foreach_mul(weights, masks), dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_foreach_cast(grads, torch.float32)


def _foreach_cast(tensors: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    results = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(results, tensors)
    return results


def pytorch_foreach_masked(weights: list[Tensor], masks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """All layers in a few launches; `masks` are as large as the weights, else it would be a launch for each."""
    return list(_ForeachStraightThrough.apply(dtype, masks, *weights))


def original_masked(weights: list[Tensor], masks: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same with masks as large as the weights."""
    return pytorch_masked(weights, masks, dtype)


# ------------------------------------------------------------------------------------- generated weights


def original_hyper(
    hidden: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], out_channels: int, in_channels: int
) -> Tensor:
    """All weights of the widest layer are generated, and then sliced."""
    generated = torch.nn.functional.linear(hidden, weight, bias).view(shape)
    return generated[:out_channels, :in_channels].contiguous()


def pytorch_hyper(
    hidden: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], out_channels: int, in_channels: int
) -> Tensor:
    """The rows that are wanted are sliced, and generate what is wanted."""
    rows = weight.view(*shape, -1)[:out_channels, :in_channels]
    return rows @ hidden + bias.view(shape)[:out_channels, :in_channels]


# ------------------------------------------------------------------------------------------ decorrelation


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(-1, keepdim=True)
    return torch.matmul(centred, centred.mT) / max(rows.shape[-1] - 1, 1)


def pytorch_covariance(weights: list[Tensor]) -> Tensor:
    """Σ over layers and i ≤ j of |C_ij|, by autograd's ops."""
    return torch.stack([_covariance(weight.flatten(1)).abs().triu().sum() for weight in weights]).sum()


def pytorch_cov(weights: list[Tensor]) -> Tensor:
    """The same by `torch.cov`."""
    return torch.stack([torch.cov(weight.flatten(1)).abs().triu().sum() for weight in weights]).sum()


def pytorch_kernel_covariance(weights: list[Tensor]) -> Tensor:
    """The same for every slice W[o, i], in one batched product per layer."""
    layers = [weight.flatten(0, 1) for weight in weights if weight.shape[3] > 1]
    return torch.stack([_covariance(slices).abs().triu().sum() for slices in layers]).sum()


def pytorch_correlation(weights: list[Tensor]) -> Tensor:
    """Σ over layers of ‖P − diag P‖_F / n."""
    terms = []
    for weight in weights:
        rows = weight.flatten(1)
        unit = torch.nn.functional.normalize(rows - rows.mean(1, keepdim=True))
        pearson = unit @ unit.T
        terms.append((pearson - pearson.diag().diag()).norm() / len(rows))
    return torch.stack(terms).sum()


def pytorch_corrcoef(weights: list[Tensor]) -> Tensor:
    """The same by `torch.corrcoef`."""
    pearsons = [torch.corrcoef(weight.flatten(1)) for weight in weights]
    return torch.stack([(pearson - pearson.diag().diag()).norm() / len(pearson) for pearson in pearsons]).sum()


def pytorch_orthogonality(weights: list[Tensor]) -> Tensor:
    """Σ over layers of σ² by one power iteration, with vectors only: WᵀW is never formed."""
    terms = []
    for weight in weights:
        rows = weight.flatten(1)
        steps = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64, device=rows.device)
        start = ((steps * ((5**0.5 - 1) / 2)).frac() - 0.5).to(rows.dtype)
        once = rows.T @ (rows @ start) - start
        twice = rows.T @ (rows @ once) - once
        terms.append(twice.square().sum() / once.square().sum())
    return torch.stack(terms).sum()


def original_covariance(weights: list[Tensor]) -> Tensor:
    """The value alone, by `np.cov` layer by layer."""
    total = 0.0
    for weight in weights:
        rows = weight.detach().cpu().numpy().reshape(len(weight), -1)
        total += float(np.triu(np.abs(np.cov(rows))).sum())
    return torch.tensor(total)


# ----------------------------------------------------------------------------------- masks of single weights


def pytorch_weight_masks(weights: list[Tensor], rate: float) -> list[Tensor]:
    """Bool masks under one threshold over all |w|."""
    scores = [weight.abs() for weight in weights]
    every = torch.cat([score.flatten() for score in scores])
    threshold = every.kthvalue(int(len(every) * rate) + 1).values
    return [score > threshold for score in scores]


def pytorch_topk_weight_masks(weights: list[Tensor], rate: float) -> list[Tensor]:
    """The same by `torch.topk`."""
    scores = [weight.abs() for weight in weights]
    every = torch.cat([score.flatten() for score in scores])
    threshold = every.topk(len(every) - int(len(every) * rate), sorted=False).values.min()
    return [score > threshold for score in scores]


def pytorch_foreach_weight_masks(weights: list[Tensor], rate: float) -> list[Tensor]:
    """The same with the importances by `torch._foreach_abs`."""
    scores = torch._foreach_abs(weights)
    every = torch.cat([score.flatten() for score in scores])
    threshold = every.kthvalue(int(len(every) * rate) + 1).values
    return [score > threshold for score in scores]


def original_weight_masks(weights: list[Tensor], rate: float) -> list[Tensor]:
    """float32 masks, by a sort of all importances in numpy."""
    importances = [np.abs(weight.detach().cpu().numpy()) for weight in weights]
    every = np.sort(np.concatenate([importance.ravel() for importance in importances]))
    threshold = every[int(len(every) * rate)]
    masks = [torch.from_numpy((importance > threshold).astype(np.float32)) for importance in importances]
    return [mask.to(weight.device) for mask, weight in zip(masks, weights)]
