"""The launcher and the launches of csrc/cuda/decorrelation_kernel_covariance.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cuda_kernels as cuda
import numpy as np
import torch
from torch import Tensor

from .cuda_decorrelation_kinds import Plan, accumulator, layers_of, plan
from .gpu import Gpu, OnCuda

SOURCE = "decorrelation_kernel_covariance"


def _layout(on: OnCuda, weights: Sequence[Tensor], gradients: Sequence[int]) -> Plan:
    layers = layers_of(weights, [on.memory.put(weight) for weight in weights], gradients, lambda weight: 0)
    return plan(on, "kernel_covariance", layers, weights[0].element_size(), gradients[0] != 0)


def _work(on: OnCuda, mask: Tensor | None, *others: Any) -> bytes:
    return cuda.ptxrun.pack_struct("QQQQQi?", on.memory.put(mask) if mask is not None else 0, *others)


def forward(gpu: Gpu, weights: Sequence[Tensor], include_diagonal: bool, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The penalty, and no coefficients."""
    dtype = accumulator(weights[0].dtype)
    with gpu.cuda(SOURCE) as on:
        layout = _layout(on, weights, [0] * len(weights))
        launches, blocks, ticket, *grids = layout.sizes
        penalty = on.memory.empty(dtype.itemsize)
        if launches == 0:
            penalty.mem.write(penalty, np.zeros(dtype.itemsize, np.uint8))  # the launcher's memset
        else:
            scratch = on.memory.empty(ticket + 4)
            scratch.mem.write(scratch + ticket, np.zeros(1, np.uint32))  # the launcher's memset
            work = _work(on, mask, 0, penalty, scratch, scratch + ticket, blocks, include_diagonal)
            name = cuda.kernel(on.loaded, "kernel_covariance_kernel", [weights[0].dtype])
            for launch, table in enumerate(layout.tables):
                args = [table, work, sum(grids[:launch])]
                on.launch(name, grids[launch], cuda.host().threads(), args)
        return on.memory.get(penalty, torch.empty(()), dtype), torch.empty(0, dtype=dtype)


def backward(
    gpu: Gpu, grad: Tensor, weights: Sequence[Tensor], include_diagonal: bool, mask: Tensor | None
) -> list[Tensor]:
    """The gradients, with the strides of the weights."""
    with gpu.cuda(SOURCE) as on:
        gradients = [on.memory.empty(weight.nbytes, gpu.shift) for weight in weights]
        layout = _layout(on, weights, gradients)
        work = _work(on, mask, on.memory.put(grad), 0, 0, 0, 0, include_diagonal)
        name = cuda.kernel(on.loaded, "kernel_covariance_backward_kernel", [weights[0].dtype])
        for table, blocks in zip(layout.tables, layout.sizes[3:]):
            on.launch(name, blocks, cuda.host().threads(), [table, work])
        return [on.memory.get(out, weight, weight.dtype) for out, weight in zip(gradients, weights)]
