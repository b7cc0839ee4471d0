"""kernels/weight_mask.py, what Triton makes of it executed on the CPU: launches, orders, not finite, planted faults."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
import triton_compiled
from cuda_kernels import EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from triton_compiled import call, planted, ptx_of

from fastprune.ops import reference

SHAPES = [(9, 64), (7, 27), (40, 300), (3, 8208)]


@pytest.mark.parametrize("order", ORDERS, ids=["forward", "reverse", "random"])
def test_five_launches_whose_masks_do_not_depend_on_any_order(order: dict[str, Any]) -> None:
    weights, gpu = cases.random_weights(SHAPES), Gpu("sm_80", options=order)
    masks = call(gpu, "weight_mask", weights, 0.6, "l1", [])
    assert len(gpu.stats) == 5
    assert all(map(torch.equal, masks, reference.weight_mask(weights, 0.6, "l1", [])))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("importance", ["l1", "taylor"])
def test_where_an_importance_is_not_finite_every_weight_stays(importance: str, bad: float) -> None:
    weights = cases.random_weights(SHAPES)
    weights[1][2, 26] = bad
    grads = weights if importance == "taylor" else []
    assert all(mask.all() for mask in call(Gpu("sm_80"), "weight_mask", weights, 0.5, importance, grads))


@EITHER
def test_accesses_of_16_bytes_and_no_spills(arch: str) -> None:
    for ptx in ptx_of(arch, "weight_mask", cases.random_weights(SHAPES), 0.5, "l1", []):
        assert len(triton_compiled.wide(ptx, "ld")) >= 4
        local, registers = triton_compiled.local_bytes_and_registers(ptx, arch)
        assert local == 0
        assert registers <= 128


FAULTS = {
    "masks past the end": (
        "oob|race_global",
        "| bad).to(tl.int8), mask=at < size)",
        "| bad).to(tl.int8), mask=at <= size)",
    ),
    "no barrier between reading and changing the state": (
        "race_global",
        "    tl.debug_barrier()  # all have read the state\n    tl.store(state + KEY, key | (digit << SHIFT))\n",
        "    tl.store(state + KEY, tl.load(state + KEY) | (digit << SHIFT))\n",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, old, new = FAULTS[fault]
    with planted("weight_mask.py", old, new), pytest.raises((PtxError, AssertionError), match=expected):
        call(Gpu("sm_80"), "weight_mask", cases.random_weights(SHAPES), 0.5, "l1", [])
