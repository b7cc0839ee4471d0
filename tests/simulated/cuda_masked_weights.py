"""The launcher and the launches of csrc/cuda/masked_weights.cu."""

from __future__ import annotations

from collections.abc import Sequence

import cuda_kernels as cuda
import torch
from torch import Tensor

from fastprune.ops import reference

from .gpu import Gpu


def _scale(
    gpu: Gpu, inputs: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None, backward: bool
) -> list[Tensor]:
    with gpu.cuda("masked_weights") as on:
        outs = [on.memory.empty(x.numel() * dtype.itemsize, gpu.shift) for x in inputs]
        runs = [(on.memory.put(x), out, x.shape[0], x[0].numel()) for x, out in zip(inputs, outs)]
        plan = cuda.plan(runs, inputs[0].element_size(), dtype.itemsize, gpu.capacity)
        factors = on.memory.put(feedback) if backward and feedback is not None else 0
        packed = cuda.ptxrun.pack_struct("QQf", on.memory.put(mask), factors, 1.0 if backward else 0.0)
        name = cuda.kernel(on.loaded, "masked_weights_kernel", [inputs[0].dtype, dtype])
        for grid in plan.grids:
            on.launch(name, grid.blocks, cuda.host().threads(), [grid.table, packed])
        return [on.memory.get(out, torch.empty_like(x, dtype=dtype), dtype) for out, x in zip(outs, inputs)]


def masked_weights(
    gpu: Gpu, weights: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None
) -> list[Tensor]:
    reference.check_masked_weights("masked_weights", weights, mask, dtype, feedback)
    return _scale(gpu, weights, mask, dtype, feedback, backward=False)


def masked_weights_backward(
    gpu: Gpu, grads: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None
) -> list[Tensor]:
    reference.check_masked_weights("masked_weights_backward", grads, mask, dtype, feedback)
    return _scale(gpu, grads, mask, dtype, feedback, backward=True)
