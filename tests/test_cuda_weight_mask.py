"""csrc/cuda/weight_mask.cu, its PTX executed on the CPU: masks, launches, races, orders, bytes, planted faults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

import cases
import cuda_kernels as cuda
import pytest
import torch
from cuda_kernels import EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from simulated.cuda_weight_mask import weight_mask
from torch import Tensor

from fastprune import models, ops
from fastprune.ops import reference

# Layers of several blocks, of one, and of less than a vector.
SHAPES: cases.Shapes = [(130, 301), (9, 16, 3, 3), (3, 1), (70, 513)]
LAUNCHES = 4  # three digits, and the masks


def check(weights: Sequence[Tensor], rate: float, importance: str = "l1", arch: str = "sm_80") -> None:
    """Exactly the reference's masks, by four launches."""
    grads = [weight.flip(0).contiguous() for weight in weights] if importance in ("grad", "taylor") else []
    gpu = Gpu(arch)
    results = weight_mask(gpu, weights, rate, importance, grads)
    assert all(map(torch.equal, results, reference.weight_mask(weights, rate, importance, grads)))
    assert len(gpu.stats) == LAUNCHES


@pytest.mark.parametrize("importance", ["l1", "l2", "grad", "taylor"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_dtype_and_importance(dtype: torch.dtype, importance: str) -> None:
    check(cases.random_weights([(9, 16, 3, 3), (40, 301)], dtype), 0.6, importance)


@EITHER
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout: str, arch: str) -> None:
    check(cases.random_weights(SHAPES, layout=layout), 0.55, arch=arch)


def test_masks_beside_a_vector() -> None:
    weights = cases.random_weights(SHAPES)
    (whole, beside) = (weight_mask(Gpu("sm_80", shift=shift), weights, 0.4, "l1", ()) for shift in (0, 1))
    assert all(map(torch.equal, beside, whole))


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.999])
def test_ties_and_ranks_at_the_ends_of_bins(rate: float) -> None:
    # Few values, whose counts fill bins and leave gaps, in all three digits.
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-40, 1.0, 1 + 2**-23, -1 - 2**-13, 1.5, 2.0, 3.4028234e38])
    generator = torch.Generator().manual_seed(0)
    check([values[torch.randint(len(values), (7, 301), generator=generator)], values[:, None].clone()], rate)


def test_the_largest_float_is_finite() -> None:
    largest = torch.finfo(torch.float32).max
    (mask,) = weight_mask(Gpu("sm_80"), [torch.tensor([[1.0, largest, -largest, 2.0]])], 0.25, "l1", ())
    assert mask.tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_every_weight_is_kept_where_an_importance_is_not_finite(bad: float) -> None:
    weights = cases.random_weights(SHAPES)
    weights[1][2, 3, 1, 1] = bad
    for rate in (0.0, 0.9, 0.999999):  # whether the threshold itself is finite or not
        assert all(mask.all() for mask in weight_mask(Gpu("sm_80"), weights, rate, "l1", ()))
    big = [torch.full((2, 2), 1e30)]
    assert weight_mask(Gpu("sm_80"), big, 0.5, "l2", ())[0].all()  # the square is beyond float32


@EITHER
def test_masks_do_not_depend_on_the_order_of_blocks_and_atomics(arch: str) -> None:
    weights = cases.random_weights(SHAPES)
    first, *others = [weight_mask(Gpu(arch, options=order), weights, 0.6, "l1", ()) for order in ORDERS]
    for other in others:
        assert all(map(torch.equal, other, first))


def test_as_many_launches_for_any_number_of_layers() -> None:
    check(cases.random_weights([(2, 3)] * 100), 0.4)


def test_layers_beyond_a_table_take_more_launches_and_one_threshold() -> None:
    weights, gpu = cases.random_weights(SHAPES), Gpu("sm_80", capacity=3)
    results = weight_mask(gpu, weights, 0.4, "l1", ())
    assert all(map(torch.equal, results, reference.weight_mask(weights, 0.4, "l1", ())))
    assert len(gpu.stats) == 2 * LAUNCHES


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_bytes_of_resnet50() -> None:
    shapes = [tuple(p.shape) for p in models.create("resnet50").parameters() if p.dim() == 4]
    weights, gpu = cases.random_weights(shapes), Gpu("sm_90", cuda.COUNTING)
    results = weight_mask(gpu, weights, 0.9, "l1", ())
    assert all(map(torch.equal, results, reference.weight_mask(weights, 0.9, "l1", ())))
    total = sum(weight.numel() for weight in weights)
    # Four times the weights and the masks once; besides, what each thread asks of the threshold, and what each block
    # hands over of its counts.
    moved = sum(stats.bytes_moved for stats in gpu.stats)
    assert moved <= 1.05 * (4 * 4 * total + total)
    assert moved >= 0.95 * sum(stats.sector_bytes for stats in gpu.stats)
    first, second, third, _ = gpu.stats
    assert first.bank_conflicts == second.bank_conflicts == 0
    assert third.bank_conflicts <= 1e-5 * third.shared_wavefronts


@pytest.mark.parametrize(
    "arch", ["sm_80", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_90", "sm_100", "sm_120"))]
)
def test_budget(arch: str) -> None:
    budget = cuda.budget("weight_mask", arch)
    assert len(budget) == 2 * len(cases.DTYPES)
    for name, kernel in budget.items():
        assert kernel.local_bytes == 0
        assert kernel.registers <= 64  # two blocks of 512 threads on a multiprocessor
        assert kernel.shared_bytes <= 33 * 1024
        assert len(cuda.wide(kernel.ptx, "ld.global.nc")) >= 2  # two vectors in flight
        # The masks of a vector's weights are one store.
        widths = {"kernelId": "u16", "kernelIf": "u32"}
        (width,) = [widths[kind] for kind in widths if kind in name] or ["v2.u32"]
        assert "counts" in name or f"st.global.cg.{width}" in kernel.ptx


def test_serves_cuda_where_it_was_built() -> None:
    built = torch.version.cuda is not None and find_spec("fastprune._cuda") is not None
    (serving,) = (row for row in ops.backends() if (row.op, row.device) == ("weight_mask", "cuda"))
    assert serving.implementation == ("cuda" if built else "triton")


# name: (what must be reported, file, text, what it becomes)
FAULTS = {
    "no barrier before the counting": (
        "race_shared",
        "weight_mask.cu",
        "counts.clear();\n  __syncthreads();",
        "counts.clear();",
    ),
    "no barrier after the counting": (
        "race_shared",
        "weight_mask.cu",
        "  __syncthreads();\n  counts.add_to",
        "  counts.add_to",
    ),
    "no fence before the ticket": (
        "race_global",
        "reduce.cuh",
        "  __threadfence();  // what this thread",
        "  // what this thread",
    ),
    "no fence after the ticket": ("race_global", "reduce.cuh", "if (last) __threadfence();", ""),
    "a vector too many": ("oob|race_global", "vector.cuh", "? size - Width : -1", "? size : -1"),
    "vectors together past the end": (
        "oob|race_global",
        "vector.cuh",
        "k + (InFlight - 1) * stride <= last",
        "k <= last",
    ),
    "an element too many": (
        "oob|race_global",
        "vector.cuh",
        "return left < Width ? static_cast<int32_t>(left) : Width",
        "return left < Width ? static_cast<int32_t>(left) + 1 : Width",
    ),
    "a word too many": (
        "oob",
        "weight_mask.cu",
        "i < (columns ? bins * 16 : bins); i += kThreads",
        "i <= (columns ? bins * 16 : bins); i += kThreads",
    ),
    "vectors where there are none": ("misaligned", "vector.cuh", "place.layer.aligned ? size", "true ? size"),
    "half of the warp's mask": (
        "outside its member mask",
        "reduce.cuh",
        "kWholeWarp = 0xffffffffu",
        "kWholeWarp = 0x0000ffffu",
    ),
}
# The other classes are quick with the tests of filter_mask.
QUICK_FAULTS = {"no barrier after the counting", "no fence before the ticket"}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if name in QUICK_FAULTS else pytest.mark.slow) for name in FAULTS]
)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, file, old, new = FAULTS[fault]
    # In this order, the block that is last is not the one that last read what it then writes.
    options = {"atomic_order": "reverse"}
    weights = cases.random_weights([*SHAPES, (5, 3)], layout="unaligned" if "vectors where" in fault else "contiguous")
    with pytest.raises(PtxError, match=expected):
        weight_mask(Gpu("sm_80", options, (file, old, new)), weights, 0.6, "l1", ())
