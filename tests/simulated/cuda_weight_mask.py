"""The launcher and the launches of csrc/cuda/weight_mask.cu."""

from __future__ import annotations

from collections.abc import Sequence

import cuda_kernels as cuda
import torch
from torch import Tensor

from fastprune.ops import reference

from .gpu import Gpu

FORMULAS = {"l1": 0, "grad": 0, "l2": 1, "taylor": 2}


def weight_mask(
    gpu: Gpu, weights: Sequence[Tensor], rate: float, importance: str, grads: Sequence[Tensor]
) -> list[Tensor]:
    reference.check_weight_mask(weights, rate, importance, grads)
    host, formula = cuda.host(), FORMULAS[importance]
    with gpu.cuda("weight_mask") as on:
        masks = [on.memory.empty(weight.numel(), gpu.shift) for weight in weights]
        first = grads if importance == "grad" else weights
        runs = [
            (on.memory.put(a), on.memory.put(grads[i]) if importance == "taylor" else 0, mask, 0, a.numel())
            for i, (a, mask) in enumerate(zip(first, masks))
        ]
        plan = cuda.plan(runs, weights[0].element_size(), 0, gpu.capacity)
        selection = on.memory.put(torch.zeros(host.weight_selection_bytes(), dtype=torch.uint8))
        rank = host.rank_of(sum(weight.numel() for weight in weights), rate)
        passes = []
        for i in range(host.weight_passes()):
            digit = (host.weight_digit_shift(i), host.weight_digit_bits(i), host.weight_digit_first(i))
            passes.append(("weight_counts_kernel", [cuda.ptxrun.pack_struct("4iIQ", i, *digit, plan.blocks, rank)]))
        for kernel, arguments in (*passes, ("weight_mask_kernel", [])):
            name = cuda.kernel(on.loaded, kernel, [weights[0].dtype])
            for grid in plan.grids:
                on.launch(name, grid.blocks, host.threads(), [grid.table, formula, *arguments, selection])
        like = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
        return [on.memory.get(mask, tensor, torch.bool) for mask, tensor in zip(masks, like)]
