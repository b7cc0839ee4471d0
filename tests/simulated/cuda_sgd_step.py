"""The launcher and the launches of csrc/cuda/sgd_step.cu."""

from __future__ import annotations

from collections.abc import Sequence

import cuda_kernels as cuda
import torch
from torch import Tensor

from fastprune.ops import reference

from .gpu import Gpu


def sgd_step_(
    gpu: Gpu,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    layers: int,
    mask: Tensor | None,
    masked: Sequence[Tensor],
    norms: Tensor | None,
    ord: int,
) -> None:
    reference.check_sgd_step(
        params, grads, momenta, momentum, dampening, nesterov, grad_scale, found_inf, layers, mask, masked, norms, ord
    )
    dtype, out = params[0].dtype, masked[0].dtype if masked else torch.float32
    with gpu.cuda("sgd_step") as on:
        addresses = {id(tensor): on.memory.put(tensor) for tensor in (*params, *momenta)}
        addresses |= {id(tensor): on.memory.empty(tensor.nbytes, gpu.shift) for tensor in masked}
        measured = 0 if norms is None else on.memory.empty(norms.nbytes)

        def at(tensors: Sequence[Tensor], i: int) -> int:
            return addresses[id(tensors[i])] if i < len(tensors) else 0

        runs = [
            (
                *(at(params, i), on.memory.put(grads[i]), at(momenta, i), at(masked, i)),
                *((len(param), param[0].numel()) if i < layers else (0, param.numel())),
            )
            for i, param in enumerate(params)
        ]
        plan = cuda.plan(runs, dtype.itemsize, 0, gpu.capacity)
        scalars = [0 if scalar is None else on.memory.put(scalar) for scalar in (grad_scale, found_inf)]
        step = cuda.ptxrun.pack_struct(
            f"4{'d' if dtype == torch.float64 else 'f'}3?2Q",
            *(lr, momentum, 1 - dampening, weight_decay, nesterov, first, maximize, *scalars),
        )
        kept = on.memory.put(mask) if masked and mask is not None else 0
        outputs = cuda.ptxrun.pack_struct("2Qi", kept, measured, ord)
        name = cuda.kernel(on.loaded, "sgd_step_kernel", [dtype, out])
        for grid in plan.grids:
            on.launch(name, grid.blocks, cuda.host().threads(), [grid.table, step, outputs])
        for tensor in (*params, *momenta, *masked):
            if tensor.numel():
                tensor.copy_(on.memory.get(addresses[id(tensor)], tensor, tensor.dtype))
        if norms is not None and norms.numel():
            norms.copy_(on.memory.get(measured, norms, torch.float32))
