"""The launcher and the launches of csrc/cuda/decorrelation_gram.cu."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import cuda_kernels as cuda
import numpy as np
import torch
from ptxrun import DevPtr
from torch import Tensor

from fastprune.ops import reference

from .cuda_decorrelation_kinds import Layer, accumulator, layers_of
from .gpu import Gpu, OnCuda

SOURCE = cuda.ROOT / "tests" / "cuda_gram.cpp"
BLOCKS = 7  # of the grid, at most: what runs at once on the simulated GPU
STORAGES = {torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def host() -> ctypes.CDLL:
    """The launcher's layout."""

    def make(path: Any) -> None:
        cuda._run(["c++", "-O1", "-std=c++20", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, SOURCE])

    library = ctypes.CDLL(str(cuda._cache(SOURCE.read_text() + "".join(cuda._sources().values()), ".so", make)))
    library.gram_plan.restype = ctypes.c_void_p
    library.gram_table_bytes.restype = ctypes.c_int64
    return library


def coefficients_of(kind: str, weight: Tensor) -> int:
    return reference.coefficients_like([weight], kind).numel()


def _layout(
    on: OnCuda, kind: str, layers: Sequence[Layer], element_size: int, backward: bool
) -> tuple[list[int], list[bytes]]:
    """What ``gram_sizes`` tells, and the tables."""
    library, error = host(), ctypes.create_string_buffer(256)
    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    array, correlation = (Layer * len(layers))(*layers), kind == "correlation"
    capacity = on.gpu.capacity or library.gram_capacity()
    made = library.gram_plan(array, i64(len(layers)), i64(element_size), correlation, backward, capacity, error)
    if made is None:
        raise RuntimeError(error.value.decode())
    sizes = (i64 * (7 + len(layers)))()
    library.gram_sizes(pointer(made), i64(8 if element_size == 8 else 4), sizes)
    tables = []
    for launch in range(sizes[0]):
        table = ctypes.create_string_buffer(library.gram_table_bytes())
        library.gram_table(pointer(made), i64(launch), table)
        tables.append(table.raw)
    library.gram_free(pointer(made))
    return list(sizes), tables


def _launch(
    on: OnCuda,
    kind: str,
    weights: Sequence[Tensor],
    gradients: Sequence[DevPtr] | None,
    include_diagonal: bool,
    mask: Tensor | None,
    precision: str,
    coefficients: DevPtr,
    scalar: DevPtr,
) -> None:
    data = [on.memory.put(weight) for weight in weights]
    layers = layers_of(weights, data, gradients or [0] * len(weights), lambda weight: coefficients_of(kind, weight))
    dtype = weights[0].dtype
    sizes, tables = _layout(on, kind, layers, dtype.itemsize, gradients is not None)
    launches, counters, scales, parts, slots, penalties, total, *tasks = sizes
    scratch = on.memory.empty(total)
    on.memory.memory.write(scratch, np.zeros(counters, np.uint8))  # the launcher's memset
    level = 0 if dtype == torch.float64 else reference.PRECISIONS.index(precision)
    direction = "backward" if gradients else "forward"
    letter = "d" if dtype == torch.float64 else "f"
    (name,) = (
        entry
        for entry in on.loaded.kernels
        if f"gram_{direction}_kernelI{letter}" in entry and f"PrecisionE{level}E" in entry
    )
    finished = scratch + 4 * launches
    for launch, table in enumerate(tables):
        call = cuda.ptxrun.pack_struct(
            "??iiQQQQQQQQQQ",
            *(kind == "correlation", include_diagonal, STORAGES.get(dtype, 0), len(weights)),
            *(on.memory.put(mask) if mask is not None else 0, coefficients, scalar),
            *(scratch + 4 * launch, finished, finished + 4),
            *(scratch + scales, scratch + parts, scratch + slots, scratch + penalties),
        )
        on.launch(name, min(tasks[launch], BLOCKS), host().gram_threads(), [table, call])


def forward(
    gpu: Gpu, weights: Sequence[Tensor], kind: str, include_diagonal: bool, mask: Tensor | None, precision: str
) -> tuple[Tensor, Tensor]:
    """The penalty and the coefficients."""
    like = reference.coefficients_like(weights, kind)
    dtype = accumulator(weights[0].dtype)
    with gpu.cuda("decorrelation_gram") as on:
        penalty, coefficients = on.memory.empty(dtype.itemsize), on.memory.empty(like.nbytes)
        _launch(on, kind, weights, None, include_diagonal, mask, precision, coefficients, penalty)
        return on.memory.get(penalty, torch.empty(()), dtype), on.memory.get(coefficients, like, like.dtype)


def backward(
    gpu: Gpu,
    grad: Tensor,
    weights: Sequence[Tensor],
    coefficients: Tensor,
    kind: str,
    include_diagonal: bool,
    mask: Tensor | None,
    precision: str,
) -> list[Tensor]:
    """The gradients, with the strides of the weights."""
    with gpu.cuda("decorrelation_gram") as on:
        gradients = [on.memory.empty(weight.nbytes, gpu.shift) for weight in weights]
        saved, scalar = on.memory.put(coefficients), on.memory.put(grad)
        _launch(on, kind, weights, gradients, include_diagonal, mask, precision, saved, scalar)
        return [on.memory.get(out, weight, weight.dtype) for out, weight in zip(gradients, weights)]
