"""csrc/cuda/decorrelation_orthogonality.cu, its PTX executed on the CPU: values, races, tasks, bytes, faults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cases
import cuda_kernels as cuda
import pytest
import torch
from cuda_kernels import ARCHITECTURES, EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu, cuda_decorrelation_kinds
from simulated import cuda_decorrelation_orthogonality as launchers
from torch import Tensor

from fastprune import models
from fastprune.ops import reference
from fastprune.ops.reference.decorrelation import start_vector

SOURCE = "decorrelation_orthogonality"
# Rows of one element, of parts of a warp, of a warp, several warps and more than a block, with and without a tail.
SHAPES = [(300, 1), (16, 3, 3, 3), (9, 17, 2, 2), (40, 200), (3, 2051)]
LAYERS = {**cases.LAYERS, "every-width": SHAPES}


@dataclass(frozen=True)
class Outcome:
    """What a forward and a backward left, and what their launches cost."""

    penalty: Tensor
    coefficients: Tensor
    gradients: list[Tensor]
    stats: list[Any]

    def tensors(self) -> list[Tensor]:
        return [self.penalty, self.coefficients, *self.gradients]


def call(weights: list[Tensor], mask: Tensor | None = None, arch: str = "sm_80", **options: Any) -> Outcome:
    gpu = Gpu(arch, options, options.pop("fault", None), options.pop("capacity", None), options.pop("shift", 0))
    penalty, coefficients = launchers.forward(gpu, weights, mask)
    grad = torch.tensor(0.5, dtype=penalty.dtype)
    return Outcome(penalty, coefficients, launchers.backward(gpu, grad, weights, coefficients, mask), gpu.stats)


def check(
    shapes: cases.Shapes, dtype: torch.dtype, layout: str = "contiguous", masked: bool = False, **options: Any
) -> Outcome:
    weights = cases.random_weights(shapes, dtype, layout)
    mask = cases.random_mask(shapes) if masked else None
    outcome = call(weights, mask, **options)
    doubles = [weight.double() for weight in weights]
    penalty, coefficients = reference.decorrelation(doubles, "orthogonality", True, mask, "highest")
    half = torch.tensor(0.5, dtype=torch.float64)
    gradients = reference.decorrelation_backward(half, doubles, coefficients, "orthogonality", True, mask, "highest")
    cases.assert_near(outcome.penalty, penalty, "penalty")
    for i, (gradient, want) in enumerate(zip(outcome.gradients, gradients)):
        assert gradient.stride() == weights[i].stride()
        cases.assert_near(gradient, want, f"gradient {i}")
    return outcome


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_launch_forward_and_one_backward(dtype: torch.dtype, arch: str) -> None:
    assert len(check(SHAPES, dtype, arch=arch).stats) == 2


@pytest.mark.parametrize("layout", ["channels-last", pytest.param("unaligned", marks=pytest.mark.slow)])
def test_layouts(layout: str) -> None:
    check(LAYERS["mixed"], torch.float32, layout, masked=True)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("layers", sorted(LAYERS.keys() - cases.LAYERS.keys()))
def test_layers_of_its_own(layers: str, layout: str, arch: str) -> None:
    for dtype in cases.DTYPES:
        for masked in (False, True):
            check(LAYERS[layers], dtype, layout, masked, arch=arch)


@pytest.mark.slow
def test_results_beside_a_vector() -> None:
    check(SHAPES, torch.float32, shift=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_start_vector_is_the_references(dtype: torch.dtype) -> None:
    # Of weights that are 0, a is -u.
    for shape, layout in (((1, 100_000), "contiguous"), ((2, 7, 3, 5), "channels-last")):
        weight = cases.arranged(torch.zeros(shape, dtype=dtype), layout)
        coefficients = launchers.forward(Gpu("sm_80"), [weight], None)[1]
        start = cases.arranged(start_vector(weight[:1]).to(dtype).view(1, *shape[1:]), layout)
        assert torch.equal(-coefficients[: start.numel()], cuda.in_memory_order(start))


def test_pruned_filters_are_not_read() -> None:
    shapes = [(16, 3, 3, 3), (40, 200)]
    weights, mask = cases.random_weights(shapes), cases.random_mask(shapes)
    spoiled = [w.clone() for w in weights]
    for weight, kept in zip(spoiled, mask.split([len(w) for w in weights])):
        weight[~kept] = torch.nan
    assert all(map(torch.equal, call(spoiled, mask).tensors(), call(weights, mask).tensors()))


@pytest.mark.parametrize("order", ORDERS[1:], ids=["reverse", "random"])
def test_bits_do_not_depend_on_the_order_of_blocks(order: dict[str, Any]) -> None:
    weights = cases.random_weights([(130, 40), (9, 300), (40, 65)])
    assert all(map(torch.equal, call(weights, **order).tensors(), call(weights).tensors()))


@pytest.mark.parametrize("processors", [1, 40])
def test_tasks_end_on_any_number_of_blocks(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = cases.random_weights([(130, 40), (9, 300), (40, 65)])
    expected = call(weights).tensors()
    monkeypatch.setattr(launchers, "PROCESSORS", processors)
    for batch in (None, 1):
        assert all(map(torch.equal, call(weights, batch=batch).tensors(), expected))


@pytest.mark.slow
def test_more_layers_than_a_table_has() -> None:
    capacity = cuda_decorrelation_kinds.host().orthogonality_capacity()
    check([(2, 3)] * (capacity + 2), torch.float32)
    assert len(check(LAYERS["mixed"], torch.float32, capacity=2).stats) == 6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_resnet50(dtype: torch.dtype) -> None:
    # The second of four stages, 13 layers.
    shapes = [tuple(p.shape) for n, p in models.create("resnet50").named_parameters() if p.dim() == 4 and "layer2" in n]
    weights = cases.random_weights(shapes, dtype)
    forward, backward = call(weights, arch="sm_90").stats
    read = sum(weight.nbytes for weight in weights)
    # Forward every weight is read twice in each of two passes, the second time within a few microseconds; backward
    # so in the first, and once in the second. On top of that come vectors, float32, from the first cache: one for
    # eight rows in such a pass, and twice four of them for four rows when the gradient is formed.
    vectors = 4 // dtype.itemsize
    assert forward.global_load_bytes <= (4.25 + 0.3 * vectors) * read
    assert backward.global_load_bytes <= (3.25 + 2.25 * vectors) * read
    assert backward.global_store_bytes <= (1 + 0.1 * vectors) * read
    for stats in (forward, backward):
        assert stats.load_efficiency >= 0.95
        assert stats.store_efficiency >= 0.95
        assert stats.bank_conflicts <= 0.05 * stats.shared_wavefronts


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_100", "sm_120"])
def test_budget(arch: str) -> None:
    budget = cuda.budget(SOURCE, arch)
    assert len(budget) == 2 * len(cases.DTYPES)
    for name, kernel in budget.items():
        assert kernel.local_bytes == 0, name
        assert kernel.registers <= 128
        if "kernelIf" in name:
            assert len(cuda.wide(kernel.ptx, "ld.global.nc")) >= 8


# name: (what must be reported, file, text, what it becomes)
FAULTS = {
    "no barrier before the warps' sums are read": (
        "race_shared",
        "decorrelation_orthogonality.cuh",
        "  __syncthreads();\n  if (thread < kWarps",
        "  if (thread < kWarps",
    ),
    "no barrier before the columns are read": (
        "race_shared|uninit_shared",
        "decorrelation_orthogonality.cuh",
        "  __syncthreads();\n  const A* flat",
        "  const A* flat",
    ),
    "no fence before a stage is published": (
        "race_global",
        "tasks.cuh",
        "  __threadfence();\n  __syncthreads();\n  if (threadIdx.x == 0) *const_cast",
        "  __syncthreads();\n  if (threadIdx.x == 0) *const_cast",
    ),
    "no fence before the ticket": ("race_global", "reduce.cuh", "__threadfence();  // what this thread wrote", "//"),
    "no wait for the vector": (
        "race_global|uninit_global",
        "decorrelation_orthogonality.cu",
        "    wait_for(progress, stage.stage);\n    apply_rows",
        "    apply_rows",
    ),
    "never published": (
        "nothing can run: .* spin",
        "decorrelation_orthogonality.cu",
        "      publish(progress, 2);\n    } else",
        "    } else",
    ),
    "one slot for all": (
        "race_global|uninit_global",
        "decorrelation_orthogonality.cu",
        "second ? a : u, slots + static_cast<int64_t>(part) * layer.stride);",
        "second ? a : u, slots);",
    ),
    "a row past the end": (
        "oob",
        "decorrelation_orthogonality.cuh",
        "if (row < layer.filters &&",
        "if (row <= layer.filters &&",
    ),
    "an element past the end": ("oob", "decorrelation_orthogonality.cuh", "k + i < size ?", "k + i <= size ?"),
    "half of a warp": (
        "mask|lane",
        "decorrelation_orthogonality.cuh",
        "other = __shfl_xor_sync(kWholeWarp,",
        "other = __shfl_xor_sync(0xffffu,",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, file, old, new = FAULTS[fault]
    with pytest.raises((PtxError, AssertionError), match=expected):
        call(cases.random_weights([(600, 40), (30, 1, 3, 3), (70, 300)]), fault=(file, old, new))
