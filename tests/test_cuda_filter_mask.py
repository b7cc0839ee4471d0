"""csrc/cuda/filter_mask.cu, its PTX executed on the CPU: values, memory safety, races, order, bytes, planted faults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import cases
import cuda_kernels as cuda
import numpy as np
import pytest
import torch
from cuda_kernels import ARCHITECTURES, EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from simulated import cuda_filter_mask as launchers
from torch import Tensor

from fastprune import models, ops

LAYERS = {
    **cases.LAYERS,
    "whole-block": [(3, 8200), (5, 16), (2, 8193)],  # filters of more than 2,048 vectors, the second unaligned
}
QUICK = ("mixed", "one-element", "whole-block")


@dataclass(frozen=True)
class Outcome:
    """What the launches of a call left, and what they cost."""

    scores: Tensor
    mask: Tensor  # empty where only the norms were wanted
    stats: list[Any]


def call(
    weights: Sequence[Tensor],
    rate: float | None = None,
    ord: int = 1,
    mask: Tensor | None = None,
    arch: str = "sm_80",
    fault: tuple[str, str, str] | None = None,
    capacity: int | None = None,
    **options: Any,
) -> Outcome:
    """filter_norms, and with a rate filter_mask, or update_filter_masks_ of a given mask; the cost of the last."""
    gpu = Gpu(arch, options, fault, capacity)
    scores = launchers.filter_norms(gpu, weights, ord)
    if rate is None:
        return Outcome(scores, torch.empty(0, dtype=torch.bool), gpu.stats)
    gpu.stats.clear()
    if mask is None:
        return Outcome(scores, launchers.filter_mask(gpu, weights, rate, ord), gpu.stats)
    updated = mask.clone()
    launchers.update_filter_masks_(gpu, weights, rate, ord, updated)
    return Outcome(scores, updated, gpu.stats)


def expected_norms(weights: Sequence[Tensor], ord: int) -> Tensor:
    rows = [weight.reshape(len(weight), -1).double() for weight in weights]
    return torch.cat([(row.abs() if ord == 1 else row.square()).mean(1) for row in rows])


def expected_mask(scores: Tensor, rate: float) -> Tensor:
    return scores > scores.sort().values[int(len(scores) * rate)]


def check(weights: Sequence[Tensor], rate: float, **options: Any) -> Outcome:
    """Norms within half a unit in the last place or so, and the mask of the rule; one launch."""
    for ord in (1, 2):
        outcome = call(weights, rate, ord, **options)
        expected = expected_norms(weights, ord)
        ulp = torch.from_numpy(np.spacing(expected.float().numpy())).double()
        assert ((outcome.scores.double() - expected).abs() <= 0.5001 * ulp).all()
        assert torch.equal(outcome.mask, expected_mask(outcome.scores, rate))
        assert len(outcome.stats) == 1
    return outcome


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layers", QUICK)
def test_norms_and_mask(layers: str, arch: str) -> None:
    check(cases.random_weights(LAYERS[layers]), 0.6, arch=arch)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype, layout: str) -> None:
    check(cases.random_weights(LAYERS["mixed"], dtype, layout), 0.5, arch="sm_90")


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.999])
def test_masks_are_identical_to_the_references(rate: float) -> None:
    # Sums of whole numbers are exact, so the scores are the same, ties included.
    weights = cases.integer_weights(LAYERS["mixed"])
    outcome = call(weights, rate)
    assert torch.equal(outcome.scores, ops.filter_norms(weights))
    assert torch.equal(outcome.mask, ops.filter_mask(weights, rate))


def test_equal_filters_all_go_whatever_their_sizes() -> None:
    assert not call([torch.full((6, 4, 3, 3), 0.3), torch.full((5, 7), -0.3)], 0.0).mask.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [info.smallest_normal / 4, -info.smallest_normal / 4, info.max, info.min, -0.0]
    weights = [torch.tensor([value] * size, dtype=dtype)[None] for value in values for size in (1, 8, 67)]
    # 67 times the largest bfloat16 is beyond float32; its mean is not.
    assert torch.equal(call(weights).scores, expected_norms(weights, 1).float())


@EITHER
def test_bits_do_not_depend_on_the_order_of_blocks_and_atomics(arch: str) -> None:
    weights = cases.random_weights([*LAYERS["many-filters"], *LAYERS["whole-block"]])
    first, *others = [call(weights, 0.6, arch=arch, **order) for order in ORDERS]
    assert len({stats.blocks for outcome in (first, *others) for stats in outcome.stats}) == 1
    for other in others:
        assert torch.equal(other.scores, first.scores)
        assert torch.equal(other.mask, first.mask)


def test_bits_do_not_depend_on_the_alignment() -> None:
    shapes = [(9, 64), (4, 100, 3, 3), (2, 8200)]
    scores = [call(cases.random_weights(shapes, layout=layout)).scores for layout in ("contiguous", "unaligned")]
    assert torch.equal(*scores)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_mask_survives_weights_that_are_not_finite(bad: float) -> None:
    weights = cases.random_weights([(4, 3, 3, 3), (3, 70), (5, 2)])
    weights[1][2, 69] = bad
    old = cases.random_mask([(12, 1)])
    updated = call(weights, 0.5, mask=old)
    assert torch.equal(updated.mask, old)
    assert updated.scores.isfinite().tolist() == [i != 6 for i in range(12)]
    assert call(weights, 0.5).mask.all()


def test_update_overwrites_the_mask() -> None:
    weights = cases.random_weights(LAYERS["mixed"])
    old = cases.random_mask(LAYERS["mixed"])
    outcome = call(weights, 0.5, mask=old)
    assert torch.equal(outcome.mask, expected_mask(outcome.scores, 0.5))


def test_one_launch_for_as_many_layers_as_a_table_has() -> None:
    weights = cases.random_weights([(2, 3)] * cuda.host().capacity())
    check(weights, 0.4, arch="sm_90")


def test_layers_beyond_a_table_take_another_launch_and_one_mask() -> None:
    weights = cases.random_weights(LAYERS["mixed"])
    outcome = call(weights, 0.4, capacity=2)
    whole = call(weights, 0.4)
    assert len(outcome.stats) == 3
    assert torch.equal(outcome.scores, whole.scores)
    assert torch.equal(outcome.mask, whole.mask)


def test_too_many_filters_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"at most \d+ filters"):
        cuda.plan([(0, 0, 2**30, 1), (0, 0, 2**30, 1)], 4, 0)


@pytest.mark.parametrize("op", ["filter_norms", "kth_threshold", "filter_mask", "update_filter_masks_"])
def test_serves_cuda_where_it_was_built(op: str) -> None:
    built = torch.version.cuda is not None and find_spec("fastprune._cuda") is not None
    (serving,) = (row for row in ops.backends() if (row.op, row.device) == (op, "cuda"))
    assert serving.implementation == ("cuda" if built else "triton")


def kth(scores: Tensor, k: int, arch: str = "sm_80") -> float:
    return launchers.kth_threshold(Gpu(arch), scores, k).item()


@EITHER
def test_kth_threshold(arch: str) -> None:
    generator = torch.Generator().manual_seed(3)
    many = torch.randn(3001, generator=generator)
    ties = torch.randint(-3, 4, (600,), generator=generator).float()
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e-45, -1e-45, 3.4e38, -3.4e38, 1.0])
    for scores in (many, ties, special, torch.tensor([-2.5])):
        ordered = scores.sort().values
        for k in {0, len(scores) // 3, len(scores) - 1}:
            assert kth(scores, k, arch) == ordered[k].item()


@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_kth_threshold_of_nan_is_nan(nan: float) -> None:
    assert math.isnan(kth(torch.tensor([1.0, nan, 2.0]), 0))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_more_filters_than_65536(arch: str) -> None:
    weights = cases.random_weights([(40000, 1), (30000, 1)])
    outcome = call(weights, 0.6, arch=arch)
    assert torch.equal(outcome.mask, expected_mask(torch.cat(weights).flatten().abs(), 0.6))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_resnet50(dtype: torch.dtype) -> None:
    shapes = [tuple(p.shape) for p in models.create("resnet50").parameters() if p.dim() == 4]
    weights = cases.random_weights(shapes, dtype)
    (stats,) = call(weights, 0.6, arch="sm_90", **cuda.COUNTING).stats
    least = sum(weight.nbytes for weight in weights) + cases.count_filters(shapes)
    assert stats.traffic_ratio(least) <= 1.05
    assert stats.bytes_moved / stats.sector_bytes >= 0.95
    assert stats.bank_conflicts <= 0.05 * stats.shared_wavefronts


@pytest.mark.parametrize(
    "arch", ["sm_80", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_90", "sm_100", "sm_120"))]
)
def test_budget(arch: str) -> None:
    budget = cuda.budget("filter_mask", arch)
    assert len(budget) == len(cases.DTYPES) + 1
    for name, kernel in budget.items():
        assert kernel.local_bytes == 0
        assert kernel.shared_bytes <= 34 * 1024
        if "filter_mask_kernel" in name:
            assert kernel.registers <= 42  # three blocks of 512 threads on a multiprocessor
            # Four vectors in flight, for both orders of the norm.
            assert len(cuda.wide(kernel.ptx, "ld.global.nc")) >= 8


# name: (what must be reported, file, text, what it becomes)
FAULTS = {
    "no barrier before the digits are counted": (
        "race_shared",
        "select.cuh",
        "scratch.counts[i / 32][i % 32] = 0;\n    __syncthreads();",
        "scratch.counts[i / 32][i % 32] = 0;",
    ),
    "no barrier before the totals are read": (
        "race_shared",
        "select.cuh",
        "    __syncthreads();\n    if (threadIdx.x < 32) find_digit",
        "    if (threadIdx.x < 32) find_digit",
    ),
    "no barrier before the warps' sums are read": (
        "race_shared",
        "reduce.cuh",
        "sums[threadIdx.x / 32] = x;\n  __syncthreads();",
        "sums[threadIdx.x / 32] = x;",
    ),
    "no fence before the ticket": (
        "race_global",
        "reduce.cuh",
        "  __threadfence();  // what this thread",
        "  // what this thread",
    ),
    "no fence after the ticket": ("race_global", "reduce.cuh", "if (last) __threadfence();", ""),
    "a tail one too long": (
        "oob",
        "vector.cuh",
        "return left < Width ? static_cast<int32_t>(left) : Width",
        "return Width",
    ),
    "a vector too many": (
        "oob",
        "norm.cuh",
        "k < size; k += lanes * kWidth)\n      part",
        "k <= size; k += lanes * kWidth)\n      part",
    ),
    "filters past the end": (
        "oob",
        "filter_mask.cu",
        "const bool real = place.row < place.layer.rows",
        "const bool real = true",
    ),
    "half of the warp's mask": (
        "outside its member mask",
        "reduce.cuh",
        "kWholeWarp = 0xffffffffu",
        "kWholeWarp = 0x0000ffffu",
    ),
    "vectors where there are none": (
        "misaligned",
        "norm.cuh",
        "const bool aligned = place.layer.aligned;",
        "const bool aligned = true;",
    ),
    "a mask entry too many": ("oob", "filter_mask.cu", "i < to.n; i += kThreads", "i <= to.n; i += kThreads"),
}
# One of each class runs with the quick tests.
QUICK_FAULTS = {
    "no barrier before the digits are counted",
    "no fence before the ticket",
    "a tail one too long",
    "half of the warp's mask",
}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if name in QUICK_FAULTS else pytest.mark.slow) for name in FAULTS]
)
def test_planted_faults_are_reported(fault: str) -> None:
    # Filters that fill and do not fill a warp, a vector, a block.
    weights = cases.random_weights([(300, 2, 3, 3), (3, 8200), (7, 27), (5, 3)])
    expected, file, old, new = FAULTS[fault]
    with pytest.raises(PtxError, match=expected):
        call(weights, 0.6, fault=(file, old, new))
