"""csrc/cuda/masked_weights.cu, its PTX executed on the CPU: values, memory safety, races, bytes, planted faults."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import cases
import cuda_kernels as cuda
import pytest
import torch
from cuda_kernels import EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from simulated import cuda_masked_weights as launchers
from torch import Tensor

from fastprune import models, ops
from fastprune.ops import reference

LAYERS = {
    **cases.LAYERS,
    "whole-block": [(3, 8208), (5, 16), (2, 8195)],  # filters of more than 2,048 vectors, the second unaligned
}
PAIRS = list(itertools.product(cases.DTYPES, cases.DTYPES))
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Outcome:
    """What the launches of a call left, and what they cost."""

    tensors: list[Tensor]
    stats: list[Any]


def call(
    inputs: Sequence[Tensor],
    mask: Tensor,
    dtype: torch.dtype,
    feedback: Tensor | None = None,
    backward: bool = False,
    arch: str = "sm_80",
    fault: tuple[str, str, str] | None = None,
    capacity: int | None = None,
    shift: int = 0,
    **options: Any,
) -> Outcome:
    """One call; ``shift`` puts the results so many bytes beside where an allocator would."""
    gpu = Gpu(arch, options, fault, capacity, shift)
    function = launchers.masked_weights_backward if backward else launchers.masked_weights
    return Outcome(function(gpu, inputs, mask, dtype, feedback), gpu.stats)


def assert_same_bits(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for result, want in zip(results, expected, strict=True):
        assert result.dtype == want.dtype
        assert result.stride() == want.stride()
        kind = BITS[result.element_size()]
        assert torch.equal(cuda.in_memory_order(result).view(kind), cuda.in_memory_order(want).view(kind))


def feedback_for(mask: Tensor) -> Tensor:
    factors = torch.rand(len(mask), generator=torch.Generator().manual_seed(4))
    factors[::3] = 0
    return factors


def check(
    shapes: cases.Shapes, source: torch.dtype, target: torch.dtype, layout: str = "contiguous", **options: Any
) -> None:
    """Forward and backward, bit by bit as the reference; one launch each."""
    inputs = cases.random_weights(shapes, source, layout)
    mask = cases.random_mask(shapes)
    forward = call(inputs, mask, target, **options)
    assert_same_bits(forward.tensors, reference.masked_weights(inputs, mask, target, None))
    for feedback in (None, feedback_for(mask)):
        backward = call(inputs, mask, target, feedback, backward=True, **options)
        expected = reference.masked_weights_backward(inputs, mask, target, feedback)
        assert_same_bits(backward.tensors, [e.as_strided(i.shape, i.stride()) for e, i in zip(expected, inputs)])
        assert len(forward.stats) == len(backward.stats) == 1


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_every_pair_of_dtypes(source: torch.dtype, target: torch.dtype) -> None:
    check([(16, 3, 3, 3), (9, 16, 2, 2), (5, 33)], source, target)


@EITHER
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout: str, arch: str) -> None:
    check(LAYERS["mixed"], torch.float32, torch.bfloat16, layout, arch=arch)


@EITHER
def test_filters_of_a_whole_block(arch: str) -> None:
    check(LAYERS["whole-block"], torch.float32, torch.float16, arch=arch)


@pytest.mark.parametrize("layout", ["contiguous", "unaligned"])
def test_results_beside_a_vector(layout: str) -> None:
    # Whatever the weights' alignment, and though PyTorch's allocator does not do it.
    shapes = [(4, 64), (3, 5)]
    weights = cases.random_weights(shapes, torch.float32, layout)
    mask = cases.random_mask(shapes)
    expected = reference.masked_weights(weights, mask, torch.bfloat16, None)
    assert_same_bits(call(weights, mask, torch.bfloat16, shift=2).tensors, expected)


@pytest.mark.parametrize("target", cases.DTYPES, ids=str)
def test_special_values_and_rounding(target: torch.dtype) -> None:
    exact = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        3.4e38,
        -65520.0,
        65519.99,
        1e-40,
        6e-8,
        -2.98e-8,
        1 + 2**-9,
        1 + 3 * 2**-9,
    ]
    weights = [torch.tensor([exact] * 2), torch.tensor([[value] for value in exact])]
    mask = torch.ones(2 + len(exact), dtype=torch.bool)
    assert_same_bits(call(weights, mask, target).tensors, reference.masked_weights(weights, mask, target, None))
    (nan,) = call([torch.full((1, 5), math.nan)], mask[:1], target).tensors
    assert nan.isnan().all()


def test_pruned_filters_are_zero_whatever_they_held() -> None:
    weights = [torch.tensor([[math.nan, -1.0], [math.inf, 1.0], [3.0, 4.0]])]
    mask = torch.tensor([False, False, True])
    (result,) = call(weights, mask, torch.float32).tensors
    assert_same_bits([result], [torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])])
    (gradient,) = call(weights, mask, torch.float32, torch.zeros(3), backward=True).tensors
    assert_same_bits([gradient], [result])


@pytest.mark.parametrize("order", ORDERS[1:], ids=["reverse", "random"])
def test_bits_do_not_depend_on_the_order_of_blocks(order: dict[str, Any]) -> None:
    shapes = LAYERS["many-filters"]
    weights, mask = cases.random_weights(shapes), cases.random_mask(shapes)
    first, other = (call(weights, mask, torch.bfloat16, **options).tensors for options in ({}, order))
    assert_same_bits(other, first)


def test_full_tables_and_several() -> None:
    shapes = [(2, 3)] * cuda.host().capacity()
    check(shapes, torch.float32, torch.float32)
    weights, mask = cases.random_weights(LAYERS["mixed"]), cases.random_mask(LAYERS["mixed"])
    split = call(weights, mask, torch.float16, capacity=2)
    assert len(split.stats) == 3
    assert_same_bits(split.tensors, reference.masked_weights(weights, mask, torch.float16, None))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "target", "backward"),
    [
        (torch.float32, torch.bfloat16, False),
        (torch.float32, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
    ],
    ids=str,
)
def test_bytes_of_resnet50(source: torch.dtype, target: torch.dtype, backward: bool) -> None:
    shapes = [tuple(p.shape) for p in models.create("resnet50").parameters() if p.dim() == 4]
    inputs, mask = cases.random_weights(shapes, source), cases.random_mask(shapes)
    feedback = torch.full((len(mask),), 0.5) if backward else None
    (stats,) = call(inputs, mask, target, feedback, backward, arch="sm_90", **cuda.COUNTING).stats
    read = [x.nbytes if backward else x[m].nbytes for x, m in zip(inputs, mask.split([len(x) for x in inputs]))]
    least = sum(read) + len(mask) + sum(x.numel() * target.itemsize for x in inputs)
    # Pruned filters are not read: beside the kept ones, every mask once and every feedback that counts.
    assert stats.unique_load_bytes == sum(read) + len(mask) + (4 * int((~mask).sum()) if backward else 0)
    assert stats.traffic_ratio(least) <= 1.05
    assert stats.load_efficiency >= 0.95
    assert stats.store_efficiency >= 0.95


@EITHER
def test_budget(arch: str) -> None:
    budget = cuda.budget("masked_weights", arch)
    assert len(budget) == len(PAIRS)
    for name, kernel in budget.items():
        assert kernel.local_bytes == 0
        # Three blocks of 512 threads on a multiprocessor; two of those that read float64.
        assert kernel.registers <= (64 if "kernelId" in name else 42)
    loaded = cuda.module("masked_weights", cuda.BUILT_FROM)
    for source, target in PAIRS:
        kernel = budget[cuda.kernel(loaded, "masked_weights_kernel", [source, target])]
        # 16 bytes of the wider kind at once, four times in flight.
        if source.itemsize >= target.itemsize:
            assert len(cuda.wide(kernel.ptx, "ld.global.nc")) >= 4
        if target.itemsize >= source.itemsize:
            assert len(cuda.wide(kernel.ptx, "st.global.cg")) >= 4


@pytest.mark.parametrize("op", ["masked_weights", "masked_weights_backward"])
def test_serves_cuda_where_it_was_built(op: str) -> None:
    built = torch.version.cuda is not None and find_spec("fastprune._cuda") is not None
    (serving,) = (row for row in ops.backends() if (row.op, row.device) == (op, "cuda"))
    assert serving.implementation == ("cuda" if built else "triton")


# name: (what must be reported, file, text, what it becomes)
FAULTS = {
    "a vector too many": (
        "oob",
        "masked_weights.cu",
        "k + (kInFlight - 1) * step < size",
        "k + (kInFlight - 2) * step < size",
    ),
    "zeros past the end": (
        "race_global|oob",
        "masked_weights.cu",
        "k < size; k += lanes * Width) store",
        "k <= size; k += lanes * Width) store",
    ),
    "filters past the end": (
        "oob",
        "masked_weights.cu",
        "if (place.row >= layer.rows) return;",
        "if (place.row > layer.rows) return;",
    ),
    "vectors where there are none": ("misaligned", "masked_weights.cu", "if (layer.aligned)", "if (true)"),
    "two threads for one element": (
        "were not written",
        "vector.cuh",
        "thread & ((1 << layer.shift) - 1)",
        "thread & ((1 << layer.shift) - 2)",
    ),
}
# One of each class runs with the quick tests.
QUICK_FAULTS = ("a vector too many", "vectors where there are none")


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if name in QUICK_FAULTS else pytest.mark.slow) for name in FAULTS]
)
def test_planted_faults_are_reported(fault: str) -> None:
    shapes = [(9, 64), (7, 27), (5, 3)]
    weights, mask = cases.random_weights(shapes), torch.arange(21) % 2 == 0
    expected, file, old, new = FAULTS[fault]
    with pytest.raises((PtxError, AssertionError), match=expected):
        call(weights, mask, torch.bfloat16, fault=(file, old, new))
