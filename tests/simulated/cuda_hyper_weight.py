"""The launcher and the launches of csrc/cuda/hyper_weight.cu."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cuda_kernels as cuda
import numpy as np
import torch
from ptxrun.module import Module
from torch import Tensor

from fastprune.ops import reference

from .gpu import Gpu

SOURCE = cuda.ROOT / "tests" / "cuda_hyper_weight.cpp"


@functools.cache
def host() -> ctypes.CDLL:
    """The layouts that the launcher computes."""

    def make(path: Any) -> None:
        cuda._run(["c++", "-O1", "-std=c++20", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, SOURCE])

    key = SOURCE.read_text() + "".join(cuda._sources().values())
    library = ctypes.CDLL(str(cuda._cache(key, ".so", make)))
    library.geometry.restype = ctypes.c_int64
    library.divide.argtypes = [ctypes.c_uint32, ctypes.c_int64]
    library.divide.restype = ctypes.c_uint32
    return library


@dataclass(frozen=True)
class Geometry:
    """The kernels' parameter, and their grids."""

    packed: bytes
    tiles: int
    panels: int  # the backward's blocks in x
    blocks: int  # and, of each panel, in y
    slots: int
    columns: int  # of a slot
    places: int  # in shared memory, of a tile


def geometry(
    shape: Sequence[int], widths: Sequence[int], size: int, by_tap: bool, element_size: int, aligned: bool
) -> Geometry:
    """Lay out the slice of ``widths`` (out, in) of a layer of that ``shape`` (O, I, kh, kw) and hidden size."""
    filters, channels, height, width = shape
    taps = height * width
    sizes = (ctypes.c_int64 * 6)(size, filters, channels * taps, taps, *widths)
    packed, numbers = ctypes.create_string_buffer(512), (ctypes.c_int64 * 6)()
    error = ctypes.create_string_buffer(256)
    by_tap = by_tap and taps > 1 and widths[1] > 1
    made = host().geometry(sizes, by_tap, ctypes.c_int64(element_size), aligned, packed, numbers, error)
    if made == 0:
        raise RuntimeError(error.value.decode())
    return Geometry(packed.raw[:made], *numbers)


def kernel(loaded: Module, name: str, dtypes: Sequence[torch.dtype]) -> str:
    """The mangled name of one instance of a kernel."""
    first, other = (cuda._TYPES[dtype] for dtype in dtypes)
    second = rf"(?:{other}|S\d*_)" if other == first else other
    (found,) = (entry for entry in loaded.kernels if re.search(rf"\d{name}I{first}{second}E", entry))
    return found


def hyper_weight(
    gpu: Gpu,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_channels: int,
    in_channels: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    reference.check_hyper_weight(hidden, weight, bias, out_channels, in_channels, shape, dtype)
    with gpu.cuda("hyper_weight") as on:
        tensors = [on.memory.put(tensor) for tensor in (hidden, weight, bias)]
        widths = (out_channels, in_channels)
        aligned = int(tensors[1]) % 16 == 0
        made = geometry(shape, widths, len(hidden), channels_last, weight.element_size(), aligned)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        result = torch.empty(*widths, *shape[2:], dtype=dtype, memory_format=memory_format)
        out = on.memory.empty(result.nbytes, gpu.shift)
        name = kernel(on.loaded, "hyper_weight_kernel", [weight.dtype, dtype])
        on.launch(name, made.tiles, host().threads(), [made.packed, *tensors, out])
        return on.memory.get(out, result, dtype)


def hyper_weight_backward(
    gpu: Gpu, grad: Tensor, hidden: Tensor, weight: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    reference.check_hyper_weight_backward(grad, hidden, weight, shape)
    results = [torch.empty_like(hidden), torch.empty_like(weight), weight.new_empty(len(weight))]
    with gpu.cuda("hyper_weight") as on:
        tensors = [on.memory.put(tensor) for tensor in (grad, hidden, weight)]
        outs = [on.memory.empty(result.nbytes, gpu.shift) for result in results]
        aligned = int(tensors[2]) % 16 == 0 and int(outs[1]) % 16 == 0
        by_tap = not grad.is_contiguous()
        made = geometry(shape, grad.shape[:2], len(hidden), by_tap, weight.element_size(), aligned)
        tickets = 8 * made.slots * made.columns
        scratch = on.memory.empty(tickets + (made.panels + 1) // 2 * 8)
        scratch.mem.write(scratch + tickets, np.zeros(made.panels, np.uint32))  # the launcher's memset
        gradients = cuda.ptxrun.pack_struct("5Q", *outs, scratch, scratch + tickets)
        name = kernel(on.loaded, "hyper_weight_backward_kernel", [weight.dtype, grad.dtype])
        grid = (made.panels, made.blocks)
        on.launch(name, grid, host().threads(), [made.packed, *tensors, gradients, made.slots])
        to_hidden, to_weight, to_bias = (on.memory.get(out, x, weight.dtype) for out, x in zip(outs, results))
        return to_hidden, to_weight, to_bias
