"""What the launches of csrc/cuda/decorrelation_orthogonality.cu and decorrelation_kernel_covariance.cu share."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cuda_kernels as cuda
import torch
from torch import Tensor

from .gpu import OnCuda

SOURCE = cuda.ROOT / "tests" / "cuda_decorrelation_kinds.cpp"
PROCESSORS = 12  # of the simulated GPU


class Layer(ctypes.Structure):
    """DecorrelationLayer of csrc/decorrelation.h."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("gradient", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("filters", "size", "first", "coefficients")),
        ("sizes", ctypes.c_int64 * 3),
        ("strides", ctypes.c_int64 * 3),
    ]


@functools.cache
def host() -> ctypes.CDLL:
    """The layouts that the launchers compute."""

    def make(path: Any) -> None:
        cuda._run(["c++", "-O1", "-std=c++20", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, SOURCE])

    key = SOURCE.read_text() + "".join(cuda._sources().values())
    library = ctypes.CDLL(str(cuda._cache(key, ".so", make)))
    for kind in ("orthogonality", "kernel_covariance"):
        getattr(library, f"{kind}_plan").restype = ctypes.c_void_p
        getattr(library, f"{kind}_table").restype = ctypes.c_int64
    return library


@dataclass(frozen=True)
class Plan:
    """The launches of a call: sizes as the library gives them, and the tables of layers."""

    sizes: list[int]
    tables: list[bytes]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def layers_of(
    weights: Sequence[Tensor], data: Sequence[int], gradients: Sequence[int], coefficients: Callable[[Tensor], int]
) -> list[Layer]:
    """What ``describe_decorrelation`` makes of the weights."""
    layers, first, index = [], 0, 0
    for weight, at, gradient in zip(weights, data, gradients):
        filters, size = weight.shape[0], weight[0].numel()
        sizes, strides = [size, 1, 1], [1, 1, 1]
        if weight.dim() == 4:
            sizes, strides = list(weight.shape[1:]), list(weight.stride()[1:])
        numbers = (ctypes.c_int64 * 3)(*sizes), (ctypes.c_int64 * 3)(*strides)
        layers.append(Layer(int(at), int(gradient), filters, size, first, index, *numbers))
        first += filters
        index += coefficients(weight)
    return layers


def plan(on: OnCuda, kind: str, layers: Sequence[Layer], element_size: int, backward: bool) -> Plan:
    """Lay out the layers."""
    library, error = host(), ctypes.create_string_buffer(256)

    def call(name: str) -> Any:
        return getattr(library, f"{kind}_{name}")

    i64, pointer = ctypes.c_int64, ctypes.c_void_p
    capacity = on.gpu.capacity or call("capacity")()
    array = (Layer * len(layers))(*layers)
    made = call("plan")(array, i64(len(layers)), i64(element_size), backward, capacity, error)
    if made is None:
        raise RuntimeError(error.value.decode())
    made = pointer(made)
    sizes = (i64 * (4 + len(layers)))()  # a few, and one for each launch
    call("sizes")(made, i64(8 if element_size == 8 else 4), sizes)
    tables = []
    for launch in range(sizes[0]):
        table = ctypes.create_string_buffer(call("table")(made, i64(launch), None))
        call("table")(made, i64(launch), table)
        tables.append(table.raw)
    call("free")(made)
    return Plan(list(sizes), tables)
