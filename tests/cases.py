"""The one table of cases of the ops' tests: implementations, layer lists, layouts, dtypes and tolerances."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import on_gpu
import simulated
import torch
from torch import Tensor

from fastprune import models, ops

GPU_KINDS = ("cuda", "triton")
ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Implementation:
    """What a test runs: a backend and, for the compiled CPU ops, an instruction set, or the kernels of a GPU.

    The tests give all of them tensors of the CPU.
    """

    name: str
    backend: str
    isa: str | None = None
    gpu: tuple[str, str] | None = None  # the kernels of `cuda` or `triton`, and for which architecture, or `gpu`


REFERENCE = Implementation("reference", "reference")
COMPILED = [Implementation(f"cpu-{isa}", "cpp", isa=isa) for isa in ops.cpu_isas()]
HOST = [REFERENCE, *COMPILED]
# For what does not depend on the instruction set: how the ops are registered.
REGISTERED = [REFERENCE, *COMPILED[-1:]]
# Triton interprets all of a process or nothing.
INTERPRETED = [Implementation("triton-interpreted", "triton")] if os.environ.get("TRITON_INTERPRET") == "1" else []
# The compiled kernels of the GPU, executed on the CPU; and on a GPU where there is one.
SIMULATED = [Implementation(f"{kind}-{arch}", "auto", gpu=(kind, arch)) for kind in GPU_KINDS for arch in ARCHITECTURES]
ON_GPU = [Implementation(f"{kind}-gpu", "auto", gpu=(kind, "gpu")) for kind in GPU_KINDS if torch.cuda.is_available()]
FAST = [*HOST, *ON_GPU]  # of the others, instruction after instruction is executed


@contextmanager
def active(implementation: Implementation) -> Iterator[Implementation]:
    """Run the block on that implementation, then restore what was there."""
    backend, isa = ops.get_backend(), ops.cpu_isa()
    ops.set_backend(implementation.backend)
    if implementation.isa is not None:
        ops.set_cpu_isa(implementation.isa)
    try:
        with serving(implementation):
            yield implementation
    finally:
        ops.set_backend(backend)
        if isa != "none":
            ops.set_cpu_isa(isa)


def serving(implementation: Implementation) -> AbstractContextManager[Any]:
    if implementation.gpu is None:
        return nullcontext()
    kind, arch = implementation.gpu
    return on_gpu.serving(kind) if arch == "gpu" else simulated.serving(kind, simulated.Gpu(arch))


Shapes = Sequence[tuple[int, ...]]

# Sizes lie on and beside the widths of vectors (4 to 16 elements) and of panels of three vectors (12 to 48).
LAYERS: dict[str, Shapes] = {
    "one-filter": [(1, 3, 3, 3)],
    "one-element": [(5, 1, 1, 1), (1, 1), (17, 1)],
    "mixed": [(16, 3, 3, 3), (8, 16, 1, 1), (7, 5, 5, 3), (10, 33), (4, 6, 3), (3, 2, 2, 7)],
    "widths": [(15, 16), (16, 15), (17, 47), (48, 49), (49, 48), (97, 17), (47, 97), (2, 1000)],
    "kernels": [(9, 17, 3, 3), (5, 33, 5, 3), (6, 16, 3, 1), (4, 15, 1, 3), (3, 4, 7, 7), (6, 1, 3, 3)],
    "many-filters": [(600, 2, 3, 3), (257, 4)],
}
RESNET56: Shapes = [
    tuple(parameter.shape) for parameter in models.create("resnet56").parameters() if parameter.dim() == 4
]
ALL_LAYERS = {**LAYERS, "resnet56": RESNET56}

LAYOUTS = ("contiguous", "channels-last", "unaligned")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def layouts_for(implementation: Implementation, *case: object) -> Sequence[str]:
    """Those that a case is run with: all, but one, by the case, where instruction after instruction is executed."""
    if implementation in FAST:
        return LAYOUTS
    return LAYOUTS[zlib.crc32(repr(case).encode()) % len(LAYOUTS) :][:1]


# By the dtype of a result: error allowed as a share of each element, and of the largest one of the tensor.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-11, 1e-11),
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (2**-8, 1e-5),
    torch.float16: (2**-11, 1e-5),
}


def arranged(weight: Tensor, layout: str) -> Tensor:
    """The same values in another layout; `unaligned` is a view one element into its storage."""
    if layout == "channels-last" and weight.dim() == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    if layout == "unaligned":
        storage = weight.new_empty(weight.numel() + 1)
        return storage[1:].view(weight.shape).copy_(weight)
    return weight.clone()


def random_weights(
    shapes: Shapes, dtype: torch.dtype = torch.float32, layout: str = "contiguous", device: str = "cpu", seed: int = 0
) -> list[Tensor]:
    """Normal weights of variance 2 / K with a mean of their own per layer; the same for the same arguments."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(list(shapes)).encode()) + seed)
    weights = []
    for shape in shapes:
        scale = (2 / max(1, torch.Size(shape[1:]).numel())) ** 0.5
        values = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.1
        weights.append(arranged((values * scale).to(dtype), layout).to(device))
    return weights


def integer_weights(shapes: Shapes, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Small whole numbers: sums of them are exact in any order, and scores tie often."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-4, 5, shape, generator=generator).to(dtype) for shape in shapes]


def random_mask(shapes: Shapes, seed: int = 0, share: float = 0.6) -> Tensor:
    """[N] bool, about that share of it True."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.rand(count_filters(shapes), generator=generator) < share


def count_filters(shapes: Shapes) -> int:
    """N."""
    return sum(shape[0] for shape in shapes)


def by_layer(vector: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """An [N] vector cut into layers, each part shaped to broadcast over its weight."""
    parts = vector.split([weight.shape[0] for weight in weights])
    return [part.view(-1, *[1] * (weight.dim() - 1)) for part, weight in zip(parts, weights)]


def assert_near(result: Tensor, expected: Tensor, what: str = "result", computed_in: torch.dtype | None = None) -> None:
    """Judge a result by the tolerance of its dtype (or of a coarser one) against a float64 expectation."""
    assert expected.dtype == torch.float64
    assert result.shape == expected.shape, f"{what}: {result.shape} is not {expected.shape}"
    assert result.isfinite().all(), f"{what} is not finite"
    if expected.numel() == 0:
        return
    relative, of_largest = TOLERANCES[computed_in or result.dtype]
    info = torch.finfo(result.dtype)
    smallest = info.smallest_normal * info.eps  # the step between subnormals
    allowed = relative * expected.abs() + of_largest * expected.abs().max() + smallest
    error = (result.double() - expected).abs()
    worst = int((error - allowed).flatten().argmax())
    assert (error <= allowed).all(), (
        f"{what} of {result.dtype}: {result.flatten()[worst].item()!r} is not "
        f"{expected.flatten()[worst].item()!r} within {allowed.flatten()[worst].item():.3g}"
    )


def assert_same_layout(results: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Fresh tensors with the shapes and strides of the weights."""
    assert len(results) == len(weights)
    for result, weight in zip(results, weights):
        assert result.shape == weight.shape
        assert result.stride() == weight.stride()
        assert result.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
