"""The launchers and the launches of csrc/cuda/filter_mask.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cuda_kernels as cuda
import numpy as np
import torch
from torch import Tensor

from fastprune.ops import checks

from .gpu import Gpu, OnCuda


def _launch(on: OnCuda, plan: cuda.Plan, dtype: torch.dtype, ord: int, scores: int, selection: Sequence[Any]) -> None:
    name = cuda.kernel(on.loaded, "filter_mask_kernel", [dtype])
    packed = cuda.ptxrun.pack_struct("Q?QIii", *selection)
    for grid in plan.grids:
        on.launch(name, grid.blocks, cuda.host().threads(), [grid.table, ord, scores, packed])


def _plan(on: OnCuda, weights: Sequence[Tensor]) -> cuda.Plan:
    runs = [(on.memory.put(weight), 0, weight.shape[0], weight[0].numel()) for weight in weights]
    return cuda.plan(runs, weights[0].element_size(), 0, on.gpu.capacity)


def filter_norms(gpu: Gpu, weights: Sequence[Tensor], ord: int) -> Tensor:
    checks.check_weights("filter_norms", weights)
    checks.check_ord("filter_norms", ord)
    with gpu.cuda("filter_mask") as on:
        plan = _plan(on, weights)
        scores = on.memory.empty(4 * plan.filters)
        _launch(on, plan, weights[0].dtype, ord, scores, [0] * 6)
        return on.memory.get(scores, torch.empty(plan.filters), torch.float32)


def _select(gpu: Gpu, weights: Sequence[Tensor], rate: float, ord: int, mask: Tensor | None) -> Tensor:
    with gpu.cuda("filter_mask") as on:
        plan = _plan(on, weights)
        n = plan.filters
        scratch = on.memory.empty(4 * (n + 1))
        ticket = scratch + 4 * n
        scratch.mem.write(ticket, np.zeros(1, np.uint32))  # the launcher's memset
        target = on.memory.empty(n) if mask is None else on.memory.put(mask)
        selection = [target, mask is None, ticket, plan.blocks, n, cuda.host().rank_of(n, rate)]
        _launch(on, plan, weights[0].dtype, ord, scratch, selection)
        return on.memory.get(target, torch.empty(n), torch.bool)


def filter_mask(gpu: Gpu, weights: Sequence[Tensor], rate: float, ord: int) -> Tensor:
    checks.check_rate("filter_mask", rate)
    checks.check_weights("filter_mask", weights)
    return _select(gpu, weights, rate, ord, None)


def update_filter_masks_(gpu: Gpu, weights: Sequence[Tensor], rate: float, ord: int, mask: Tensor) -> None:
    checks.check_ord("update_filter_masks_", ord)
    checks.check_filter_vector("update_filter_masks_", "mask", mask, weights, torch.bool)
    if weights:
        mask.copy_(_select(gpu, weights, rate, ord, mask))


def kth_threshold(gpu: Gpu, scores: Tensor, k: int) -> Tensor:
    checks.check_scores("kth_threshold", scores, k)
    with gpu.cuda("filter_mask") as on:
        result = on.memory.empty(4)
        args = [on.memory.put(scores), scores.numel(), k, result]
        on.launch("kth_threshold_kernel", 1, cuda.host().threads(), args)
        return on.memory.get(result, torch.empty(()), torch.float32)
