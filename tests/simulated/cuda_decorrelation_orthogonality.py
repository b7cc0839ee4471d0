"""The launcher and the launches of csrc/cuda/decorrelation_orthogonality.cu."""

from __future__ import annotations

from collections.abc import Sequence

import cuda_kernels as cuda
import numpy as np
import torch
from torch import Tensor

from .cuda_decorrelation_kinds import PROCESSORS, Plan, accumulator, layers_of, plan
from .gpu import Gpu, OnCuda

SOURCE = "decorrelation_orthogonality"


def _layout(on: OnCuda, weights: Sequence[Tensor], gradients: Sequence[int]) -> Plan:
    layers = layers_of(weights, [on.memory.put(w) for w in weights], gradients, lambda weight: 2 * weight[0].numel())
    backward = gradients[0] != 0
    return plan(on, "orthogonality", layers, weights[0].element_size(), backward)


def _launch(
    on: OnCuda, name: str, layout: Plan, weights: Sequence[Tensor], mask: Tensor | None, pointers: Sequence[int]
) -> None:
    launches, norms, counters, counter_bytes, *tasks = layout.sizes
    scratch = on.memory.empty(counters + counter_bytes)
    scratch.mem.write(scratch + counters, np.zeros(counter_bytes, np.uint8))  # the launcher's memset
    full_name = cuda.kernel(on.loaded, name, [weights[0].dtype])
    for launch, table in enumerate(layout.tables):
        finished = scratch + counters + 4 * launches
        work = [
            *(on.memory.put(mask) if mask is not None else 0, *pointers, scratch, scratch + norms),
            *(scratch + counters + 4 * launch, finished, finished + 4, len(weights)),
        ]
        blocks = min(PROCESSORS, tasks[launch])
        packed = cuda.ptxrun.pack_struct("QQQQQQQQQQi", *work)
        on.launch(full_name, blocks, cuda.host().threads(), [table, packed])


def forward(gpu: Gpu, weights: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The penalty, and a and b of every layer."""
    dtype = accumulator(weights[0].dtype)
    like = torch.empty(sum(2 * weight[0].numel() for weight in weights))
    with gpu.cuda(SOURCE) as on:
        layout = _layout(on, weights, [0] * len(weights))
        penalty, coefficients = on.memory.empty(dtype.itemsize), on.memory.empty(like.numel() * dtype.itemsize)
        _launch(on, "orthogonality_kernel", layout, weights, mask, [coefficients, 0, 0, penalty])
        return on.memory.get(penalty, torch.empty(()), dtype), on.memory.get(coefficients, like, dtype)


def backward(
    gpu: Gpu, grad: Tensor, weights: Sequence[Tensor], coefficients: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """The gradients, with the strides of the weights."""
    with gpu.cuda(SOURCE) as on:
        gradients = [on.memory.empty(weight.nbytes, gpu.shift) for weight in weights]
        layout = _layout(on, weights, gradients)
        pointers = [0, on.memory.put(coefficients), on.memory.put(grad), 0]
        _launch(on, "orthogonality_backward_kernel", layout, weights, mask, pointers)
        return [on.memory.get(out, weight, weight.dtype) for out, weight in zip(gradients, weights)]
