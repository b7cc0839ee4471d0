"""kernels/filter_mask.py, what Triton makes of it executed on the CPU: exactness, ties, bytes, planted faults."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
import triton_compiled
from cuda_kernels import COUNTING, EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from torch import Tensor
from triton_compiled import call, planted, ptx_of

from fastprune.kernels import layers
from fastprune.ops import reference

SHAPES = [(9, 64), (7, 27), (40, 300), (3, 8208)]


def rule(scores: Tensor, rate: float) -> Tensor:
    return scores > scores.sort().values[int(len(scores) * rate)]


@EITHER
@pytest.mark.parametrize("ord", [1, 2])
def test_norms_are_within_an_ulp(ord: int, arch: str) -> None:
    weights = cases.random_weights(SHAPES)
    exact = torch.cat([(w.double().abs() if ord == 1 else w.double().square()).flatten(1).mean(1) for w in weights])
    norms = call(Gpu(arch), "filter_norms", weights, ord)
    ulp = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
    assert ((norms.double() - exact).abs() <= 0.5001 * ulp).all()


@pytest.mark.parametrize("order", ORDERS, ids=["forward", "reverse", "random"])
def test_one_launch_whose_mask_is_the_rule_of_its_scores(order: dict[str, Any]) -> None:
    weights = cases.random_weights([*SHAPES, (5000, 2)])
    gpu = Gpu("sm_80", options=order)
    mask = call(gpu, "filter_mask", weights, 0.6, 1)
    assert len(gpu.stats) == 1
    assert torch.equal(mask, rule(reference.filter_norms(weights, 1), 0.6))


def test_equal_filters_tie_however_they_lie() -> None:
    (row,) = cases.random_weights([(1, 301)])
    lone = [cases.arranged(row.repeat(count, 1), layout) for count in (1, 9) for layout in ("contiguous", "unaligned")]
    wide = cases.random_weights([(1, 16, 4, 5)])[0].repeat(3, 1, 1, 1)
    for weights in (lone, [wide, cases.arranged(wide, "unaligned")]):
        assert call(Gpu("sm_80"), "filter_norms", weights, 1).unique().numel() == 1
        assert not call(Gpu("sm_80"), "filter_mask", weights, 0.0, 1).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(bad: float) -> None:
    weights = cases.random_weights(SHAPES)
    weights[2][1, 299] = bad
    norms = call(Gpu("sm_80"), "filter_norms", weights, 1)
    assert norms.isfinite().logical_not().nonzero().flatten().tolist() == [17]
    assert call(Gpu("sm_80"), "filter_mask", weights, 0.5, 1).all()
    mask = cases.random_mask(SHAPES)
    before = mask.clone()
    call(Gpu("sm_80"), "update_filter_masks_", weights, 0.5, 1, mask)
    assert torch.equal(mask, before)
    assert call(Gpu("sm_80"), "kth_threshold", norms.masked_fill(~norms.isfinite(), torch.nan), 0).isnan()


def test_a_mean_is_finite_where_its_sum_is_not() -> None:
    weights = [torch.full((2, 64), 3e38), torch.full((2, 300), 2e19)]
    norms = call(Gpu("sm_80"), "filter_norms", weights, 1)
    assert torch.equal(norms, torch.tensor([3e38, 3e38, 2e19, 2e19]))
    assert call(Gpu("sm_80"), "filter_norms", weights[1:], 2).isinf().all()  # 4e38 is beyond float32


@EITHER
def test_accesses_of_16_bytes_and_no_spills(arch: str) -> None:
    (ptx,) = ptx_of(arch, "filter_mask", cases.random_weights(SHAPES), 0.5, 1)
    assert len(triton_compiled.wide(ptx, "ld")) >= 12  # four in flight in each of three loops
    local, registers = triton_compiled.local_bytes_and_registers(ptx, arch)
    assert local == 0
    assert registers <= layers.REGISTERS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_resnet50(dtype: torch.dtype) -> None:
    weights = cases.random_weights(triton_compiled.resnet50(), dtype)
    gpu = Gpu("sm_90", options=COUNTING)
    mask = call(gpu, "filter_mask", weights, 0.6, 1)
    (stats,) = gpu.stats
    assert torch.equal(mask, rule(reference.filter_norms(weights, 1), 0.6))
    assert triton_compiled.bytes_of(stats) / (sum(w.nbytes for w in weights) + len(mask)) <= 1.05
    assert triton_compiled.sector_efficiency(stats, "global load 16B") >= 0.95


FAULTS = {
    "a relaxed ticket": ("race_global", "filter_mask.py", 'sem="acq_rel"', 'sem="relaxed"'),
    "a mask one too long": ("oob", "filter_mask.py", "n = tl.where(finite, n, 0)", "n = tl.where(finite, n + 1, 0)"),
    "columns past the end": (
        "oob",
        "filter_mask.py",
        "inside = (row < rows)[:, None] & (column < size)",
        "inside = (row < rows)[:, None] & (column >= 0)",
    ),
    "scores past the end": ("oob|uninit", "select.py", "there = index < n", "there = index <= n"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, file, old, new = FAULTS[fault]
    weights = cases.random_weights(SHAPES)
    mask = torch.ones(cases.count_filters(SHAPES), dtype=torch.bool)
    with planted(file, old, new), pytest.raises((PtxError, AssertionError), match=expected):
        call(Gpu("sm_80"), "update_filter_masks_", weights, 0.5, 1, mask)
