"""The launcher and the launches of csrc/cuda/sgd_step.cu and sgd_step_channels.cu."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import cuda_kernels as cuda
import torch
from torch import Tensor

from fastprune.ops.checks import channels_of
from fastprune.ops.reference import SgdStep

from .gpu import Gpu

SOURCE = cuda.ROOT / "tests" / "cuda_sgd_step_channels.cpp"


def sgd_step_(gpu: Gpu, *arguments: Any, **named: Any) -> None:
    step = SgdStep(*arguments, **named)
    step.check()
    if not step.params:
        return
    launch_step(gpu, step)
    if step.channel_norms is not None:
        launch_channels(gpu, step, step.channel_norms)


def launch_step(gpu: Gpu, step: SgdStep) -> None:
    dtype, out = step.params[0].dtype, step.masked[0].dtype if step.masked else torch.float32
    with gpu.cuda("sgd_step") as on:
        addresses = {id(tensor): on.memory.put(tensor) for tensor in (*step.params, *step.momenta)}
        addresses |= {id(tensor): on.memory.empty(tensor.nbytes, gpu.shift) for tensor in step.masked}
        measured = 0 if step.norms is None else on.memory.empty(step.norms.nbytes)

        def at(tensors: Sequence[Tensor], i: int) -> int:
            return addresses[id(tensors[i])] if i < len(tensors) else 0

        runs = [
            (
                *(at(step.params, i), on.memory.put(step.grads[i]), at(step.momenta, i), at(step.masked, i)),
                *((len(param), param[0].numel()) if i < step.layers else (0, param.numel())),
            )
            for i, param in enumerate(step.params)
        ]
        plan = cuda.plan(runs, dtype.itemsize, 0, gpu.capacity)
        lr, *scalars = (
            0 if tensor is None else on.memory.put(tensor)
            for tensor in (step.lr, step.grad_scale, step.found_inf, step.filter_decay)
        )
        settings = cuda.ptxrun.pack_struct(
            f"3{'d' if dtype == torch.float64 else 'f'}4?4Q",
            *(step.momentum, 1 - step.dampening, step.weight_decay),
            *(step.nesterov, step.first, step.maximize, step.lr.dtype == torch.float64, lr, *scalars),
        )
        kept = on.memory.put(step.mask) if step.masked and step.mask is not None else 0
        outputs = cuda.ptxrun.pack_struct("2Qi", kept, measured, step.ord)
        name = cuda.kernel(on.loaded, "sgd_step_kernel", [dtype, out])
        for grid in plan.grids:
            on.launch(name, grid.blocks, cuda.host().threads(), [grid.table, settings, outputs])
        for tensor in (*step.params, *step.momenta, *step.masked):
            if tensor.numel():
                tensor.copy_(on.memory.get(addresses[id(tensor)], tensor, tensor.dtype))
        if step.norms is not None and step.norms.numel():
            step.norms.copy_(on.memory.get(measured, step.norms, torch.float32))


class Run(ctypes.Structure):
    """ChannelRun of csrc/cuda/sgd_step_channels.h."""

    _fields_ = [("weight", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("rows", "channels", "inner"))]


@functools.cache
def host() -> ctypes.CDLL:
    """The layout that the launcher computes."""

    def make(path: Any) -> None:
        cuda._run(["c++", "-O1", "-std=c++20", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, SOURCE])

    key = SOURCE.read_text() + "".join(cuda._sources().values())
    library = ctypes.CDLL(str(cuda._cache(key, ".so", make)))
    library.channel_launches.restype = ctypes.c_int64
    return library


def channel_grids(weights: Sequence[Tensor], addresses: Sequence[int], capacity: int | None = None) -> list[cuda.Grid]:
    """The launches over the input channels of these weights."""
    runs = (Run * len(weights))(*(Run(int(at), *channels_of(weight)) for weight, at in zip(weights, addresses)))
    most = capacity or host().channel_capacity()
    table_bytes = ctypes.c_int64()
    count = host().channel_launches(runs, ctypes.c_int64(len(runs)), most, ctypes.byref(table_bytes), None)
    size = table_bytes.value
    blocks, tables = (ctypes.c_int64 * count)(), ctypes.create_string_buffer(max(1, count * size))
    host().channel_launches(runs, ctypes.c_int64(len(runs)), most, blocks, tables)
    return [cuda.Grid(blocks[i], tables.raw[i * size : (i + 1) * size]) for i in range(count)]


def launch_channels(gpu: Gpu, step: SgdStep, norms: Tensor) -> None:
    with gpu.cuda("sgd_step_channels") as on:
        addresses = [on.memory.put(weight) for weight in step.weights]
        measured = on.memory.empty(norms.nbytes)
        name = cuda.kernel(on.loaded, "channel_norms_kernel", [step.params[0].dtype])
        for grid in channel_grids(step.weights, addresses, gpu.capacity):
            on.launch(name, grid.blocks, cuda.host().threads(), [grid.table, measured, step.ord])
        if norms.numel():
            norms.copy_(on.memory.get(measured, norms, torch.float32))
