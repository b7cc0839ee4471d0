"""csrc/cuda/sgd_step.cu, its PTX executed on the CPU: values, memory safety, races, orders, bytes, planted faults."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import cases
import cuda_kernels as cuda
import pytest
import torch
from cuda_kernels import EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from simulated.cuda_filter_mask import filter_norms
from simulated.cuda_sgd_step import sgd_step_
from torch import Tensor

from fastprune import models, ops
from fastprune.ops import reference

WHOLE_BLOCK = [(3, 8200), (2, 8193)]  # filters of more than 2,048 vectors, the second unaligned
# Vectors, a scalar, nothing, and runs of one row and a bit, of a vector and a bit.
OTHERS: cases.Shapes = [(16,), (), (37, 221), (0, 5), (16387,)]
HYPER: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.05, "maximize": True},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
}
DEFAULTS: dict[str, Any] = {
    "lr": torch.tensor(0.1),
    "momentum": 0.0,
    "dampening": 0.0,
    "weight_decay": 0.0,
    "nesterov": False,
    "maximize": False,
    "first": False,
    "grad_scale": None,
    "found_inf": None,
    "filter_decay": None,
    "channel_norms": None,
    "ord": 1,
}
PAIRS = list(itertools.product(cases.DTYPES, cases.DTYPES))


@dataclass
class State:
    """What a step reads and writes; `masked` and `norms` hold poison until it has."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    mask: Tensor
    masked: list[Tensor]
    norms: Tensor

    def step(self, gpu: Gpu | None = None, **arguments: Any) -> State:
        """Step a copy, on the simulated GPU or by the reference."""
        after = deepcopy(self)
        arguments = DEFAULTS | {"layers": len(self.masked), "mask": self.mask} | arguments
        arguments |= {"momenta": after.momenta if arguments["momentum"] else []}
        arguments |= {"masked": after.masked, "norms": after.norms}
        step = reference.sgd_step_ if gpu is None else partial(sgd_step_, gpu)
        step(after.params, after.grads, **arguments)
        return after

    def written(self) -> list[Tensor]:
        return [*self.params, *self.momenta, *self.masked, self.norms]


def state_of(
    shapes: cases.Shapes,
    others: cases.Shapes = OTHERS,
    dtype: torch.dtype = torch.float32,
    out: torch.dtype = torch.bfloat16,
    layout: str = "contiguous",
) -> State:
    params, grads, momenta = (cases.random_weights([*shapes, *others], dtype, layout, seed=seed) for seed in range(3))
    masked = [torch.full_like(weight, torch.nan, dtype=out) for weight in params[: len(shapes)]]
    norms = torch.full((cases.count_filters(shapes),), torch.nan)
    return State(params, grads, momenta, cases.random_mask(shapes), masked, norms)


def assert_same(results: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(results) == len(expected)
    assert all(map(torch.equal, results, expected))


def check(state: State, arch: str = "sm_80", options: dict[str, Any] | None = None, **arguments: Any) -> State:
    """Params and momenta as the reference's in float64; masked weights and norms those of these params."""
    gpu = Gpu(arch, options=options or {})
    params, grads, momenta = ([x.double() for x in each] for each in (state.params, state.grads, state.momenta))
    exact = State(params, grads, momenta, state.mask, state.masked, state.norms).step(**arguments)
    result = state.step(gpu, **arguments)
    assert len(gpu.stats) == 1
    for tensor, value in zip([*result.params, *result.momenta], [*exact.params, *exact.momenta], strict=True):
        cases.assert_near(tensor, value)
    assert_same(result.grads, state.grads)
    weights = result.params[: len(result.masked)]
    assert_same(result.masked, reference.masked_weights(weights, state.mask, state.masked[0].dtype, None))
    # Bit by bit those of csrc/cuda/filter_mask.cu.
    norms = filter_norms(Gpu(arch), weights, arguments.get("ord", 1))
    assert torch.equal(result.norms, norms.masked_fill(~norms.isfinite(), torch.nan))
    return result


@pytest.mark.parametrize("hyper", HYPER)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_rule(dtype: torch.dtype, hyper: str) -> None:
    state = state_of([(16, 3, 3, 3), (9, 16, 2, 2)], dtype=dtype)
    decay = torch.rand(len(state.mask), generator=torch.Generator().manual_seed(1))
    lr = torch.full((1,), 0.1, dtype=torch.float64)
    scaled = {"grad_scale": torch.tensor(48.0), "first": hyper == "nesterov"}
    for arguments in ({"ord": 2, "lr": lr}, {**scaled, "filter_decay": decay}):
        check(state, **HYPER[hyper], **arguments)


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=str)
def test_every_pair_of_dtypes(source: torch.dtype, target: torch.dtype) -> None:
    check(state_of([(9, 16, 2, 2), (5, 33)], [(7,)], source, target), **HYPER["nesterov"])


@EITHER
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout: str, arch: str) -> None:
    check(state_of(cases.LAYERS["mixed"], layout=layout), arch, **HYPER["nesterov"])


@EITHER
def test_filters_of_a_whole_block(arch: str) -> None:
    check(state_of(WHOLE_BLOCK), arch, **HYPER["dampening"])


@pytest.mark.slow
@EITHER
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_filters_of_a_whole_block_in_every_pair_of_dtypes(layout: str, arch: str) -> None:
    for (source, target), ord in itertools.product(PAIRS, (1, 2)):
        check(state_of(WHOLE_BLOCK, OTHERS, source, target, layout), arch, ord=ord, **HYPER["nesterov"])


@EITHER
def test_bits_do_not_depend_on_the_order_of_blocks(arch: str) -> None:
    state = state_of([*cases.LAYERS["many-filters"], *WHOLE_BLOCK])
    first, *others = [state.step(Gpu(arch, options=order), **HYPER["nesterov"]) for order in ORDERS]
    for other in others:
        assert_same(other.written(), first.written())


def test_masked_weights_beside_a_vector() -> None:
    # Whatever the params' alignment, and though PyTorch's allocator does not do it.
    state = state_of([(4, 64), (3, 5)])
    assert_same(state.step(Gpu("sm_80", shift=2)).written(), state.step(Gpu("sm_80")).written())


def test_norms_that_float32_cannot_sum() -> None:
    # 67 times the largest bfloat16 is beyond float32; its mean is not. What the step wrote is read again.
    weights = [torch.full((3, size), 3.3e38, dtype=torch.bfloat16) for size in (1, 8, 67, 9000)]
    weights[2][1, 66] = math.inf
    weights[3][2, 8999] = math.nan
    state = State(weights, [torch.zeros_like(w) for w in weights], [], torch.ones(12).bool(), [], torch.empty(12))
    norms = state.step(Gpu("sm_80"), layers=4).norms
    assert norms.isnan().nonzero().flatten().tolist() == [7, 11]
    assert (norms[~norms.isnan()] == weights[0][0].float()).all()


def test_found_inf_moves_no_more_than_it_must() -> None:
    state = state_of(cases.LAYERS["mixed"])
    scale, gpu = torch.full((1,), 8.0), Gpu("sm_80")
    after = state.step(gpu, found_inf=torch.ones(()), grad_scale=scale, **HYPER["nesterov"])
    assert_same([*after.params, *after.momenta], [*state.params, *state.momenta])
    weights = state.params[: len(state.masked)]
    assert_same(after.masked, ops.masked_weights(weights, state.mask, torch.bfloat16))
    assert torch.equal(after.norms, ops.filter_norms(weights))
    # Neither gradients nor momenta are read, and nothing but the masked weights and the norms is written.
    (stats,) = gpu.stats
    assert stats.unique_store_bytes == sum(x.nbytes for x in after.masked) + after.norms.nbytes
    assert stats.unique_load_bytes == sum(x.nbytes for x in state.params) + len(state.mask) + 12
    kept = state.step(Gpu("sm_80"), found_inf=torch.zeros(()), grad_scale=scale)
    assert_same(kept.params, state.step(Gpu("sm_80"), grad_scale=scale).params)


def test_a_first_step_reads_no_momentum_and_a_pruned_filter_is_zero() -> None:
    state = state_of([(2, 3), (4, 64)])
    state.momenta = [torch.full_like(momentum, torch.nan) for momentum in state.momenta]
    state.params[0].fill_(math.inf)
    state.mask = torch.tensor([False, True, True, True, False, False])
    after = state.step(Gpu("sm_80"), first=True, momentum=0.9, dampening=0.5)
    assert_same(after.momenta, state.grads)
    pruned = torch.cat([after.masked[0][:1].flatten(), after.masked[1][2:].flatten()])
    assert not pruned.any()
    assert not pruned.signbit().any()


def test_outputs_are_wanted_one_by_one() -> None:
    shapes = cases.LAYERS["mixed"]
    state = state_of(shapes)
    whole, gpu = state.step(Gpu("sm_80")), Gpu("sm_80")
    lists: list[list[Tensor]] = [[x.clone() for x in state.params] for _ in range(3)]
    norms, masked = torch.empty_like(state.norms), [torch.empty_like(x) for x in state.masked]
    wanted: Sequence[dict[str, Any]] = ({"norms": norms}, {"masked": masked}, {"layers": 0, "mask": None})
    for params, outputs in zip(lists, wanted):
        arguments = {"layers": len(shapes), "mask": state.mask, "masked": [], "norms": None} | outputs
        sgd_step_(gpu, params, state.grads, [], **(DEFAULTS | arguments))
        assert_same(params, whole.params)
    assert_same([norms, *masked], [whole.norms, *whole.masked])


def test_one_launch_whatever_the_network() -> None:
    for name, depth in (("resnet50", 161), ("resnet56", 173), ("resnet152", 467)):
        shapes = [tuple(p.shape) for p in models.create(name).parameters()]
        assert len(shapes) == depth
        runs = [(512, 0, 512, 512, s[0], math.prod(s[1:])) if len(s) == 4 else (512, 0, math.prod(s)) for s in shapes]
        assert len(cuda.plan(runs, 4, 0).grids) == 1
    check(state_of([(2, 3)] * 2, [(3,)] * (cuda.host().capacity() - 2)))


def test_params_beyond_a_table_take_another_launch() -> None:
    state, gpu = state_of(cases.LAYERS["mixed"], [(5,), (0,), (4, 3)]), Gpu("sm_80", capacity=2)
    assert_same(state.step(gpu).written(), state.step(Gpu("sm_80")).written())
    assert len(gpu.stats) == 4


def test_params_without_filters_are_spread_over_blocks_and_empty_ones_over_none() -> None:
    gpu = Gpu("sm_80")
    state = state_of([], [(100, 500), (0, 3), (10,)])
    state.step(gpu, ord=1, layers=0)
    (stats,) = gpu.stats
    assert stats.blocks == 4 + 1
    assert cuda.plan([(0, 0, 0)], 4, 0).grids == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("dtype", "compute"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=str
)
def test_bytes_of_resnet50(dtype: torch.dtype, compute: torch.dtype) -> None:
    params = [tuple(p.shape) for p in models.create("resnet50").parameters()]
    shapes, others = ([s for s in params if (len(s) == 4) == filters] for filters in (True, False))
    gpu = Gpu("sm_90", cuda.COUNTING)
    after = state_of(shapes, others, dtype, compute).step(gpu, **HYPER["nesterov"])
    (stats,) = gpu.stats
    read = sum(x.nbytes for x in (*after.params, *after.grads, *after.momenta, after.mask, DEFAULTS["lr"]))
    written = sum(x.nbytes for x in after.written())
    assert (stats.unique_load_bytes, stats.unique_store_bytes) == (read, written)
    assert stats.traffic_ratio(read + written) <= 1.05
    assert stats.load_efficiency >= 0.95
    assert stats.store_efficiency >= 0.95
    assert stats.bank_conflicts <= 0.05 * stats.shared_wavefronts


@pytest.mark.parametrize(
    "arch", ["sm_80", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_90", "sm_100", "sm_120"))]
)
def test_budget(arch: str) -> None:
    budget = cuda.budget("sgd_step", arch)
    assert len(budget) == len(PAIRS)
    for name, kernel in budget.items():
        assert kernel.local_bytes == 0
        assert kernel.registers <= 64  # two blocks of 512 threads on a multiprocessor
        # Two vectors of each tensor in flight; of params of 16 bits, one.
        together = 1 if re.search(r"kernelI(6__half|13__nv_bfloat16)", name) else 2
        assert len(cuda.wide(kernel.ptx, "ld.global.nc")) >= together
        assert len(cuda.wide(kernel.ptx, "ld.global")) >= 2 * together
        assert len(cuda.wide(kernel.ptx, "st.global.cg")) >= 2 * together


def test_serves_cuda_where_it_was_built() -> None:
    built = torch.version.cuda is not None and find_spec("fastprune._cuda") is not None
    (serving,) = (row for row in ops.backends() if (row.op, row.device) == ("sgd_step_", "cuda"))
    assert serving.implementation == ("cuda" if built else "triton")


# name: (what must be reported, file, text, what it becomes)
FAULTS = {
    "no barrier before the warps' sums are read": (
        "race_shared",
        "reduce.cuh",
        "sums[threadIdx.x / 32] = x;\n  __syncthreads();",
        "sums[threadIdx.x / 32] = x;",
    ),
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
    "rows past the end": ("oob", "vector.cuh", "if (place.row >= layer.rows) return {0, 0};", ""),
    "runs without their end": ("oob", "vector.cuh", "min(row_size, layer.size - begin)", "row_size"),
    "vectors where there are none": ("misaligned", "vector.cuh", "place.layer.aligned ? size", "true ? size"),
    "half of the warp's mask": (
        "outside its member mask",
        "reduce.cuh",
        "kWholeWarp = 0xffffffffu",
        "kWholeWarp = 0x0000ffffu",
    ),
    "two threads for one vector": (
        "were not written|race_global",
        "vector.cuh",
        "thread & ((1 << layer.shift) - 1)",
        "thread & ((1 << layer.shift) - 2)",
    ),
}
# Those of the headers run with the quick tests of filter_mask; there is no ticket here that a fence could precede.
QUICK_FAULTS = {"vectors together past the end"}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if name in QUICK_FAULTS else pytest.mark.slow) for name in FAULTS]
)
def test_planted_faults_are_reported(fault: str) -> None:
    # Filters that fill and do not fill a warp, a vector, a block; a sum that is done twice.
    state = state_of([(3, 8200), (9, 64), (7, 27), (300, 2, 3, 3)], [(5,), (19,), (16390,)])
    state.params[0][1, 5] = math.inf
    expected, file, old, new = FAULTS[fault]
    with pytest.raises((PtxError, AssertionError), match=expected):
        state.step(Gpu("sm_80", fault=(file, old, new)), **HYPER["dampening"])
