"""kernels/sgd_step.py, what Triton makes of it executed on the CPU: launches, bytes, tables, planted faults."""

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
OTHERS = [(16,), (), (0, 5), (17_001,)]


def arguments(shapes: cases.Shapes = SHAPES, others: cases.Shapes = OTHERS, **changes: Any) -> list[Any]:
    """Nesterov's step of filters and others, with masked weights in bfloat16 and norms."""
    params, grads, momenta = (cases.random_weights([*shapes, *others], seed=seed) for seed in range(3))
    masked = [torch.full_like(weight, torch.nan, dtype=torch.bfloat16) for weight in params[: len(shapes)]]
    values = {
        "params": params,
        "grads": grads,
        "momenta": momenta,
        "lr": torch.tensor(0.1),
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.01,
        "nesterov": True,
        "maximize": False,
        "first": False,
        "grad_scale": torch.tensor(8.0),
        "found_inf": torch.zeros(()),
        "layers": len(shapes),
        "mask": cases.random_mask(shapes),
        "masked": masked,
        "filter_decay": torch.rand(cases.count_filters(shapes), generator=torch.Generator().manual_seed(1)),
        "norms": torch.full((cases.count_filters(shapes),), torch.nan),
        "channel_norms": None,
        "ord": 1,
    }
    return list({**values, **changes}.values())


def written(values: list[Any]) -> list[Tensor]:
    """params, momenta, masked, norms."""
    return [*values[0], *values[2], *values[14], values[16]]


@pytest.mark.parametrize("order", ORDERS, ids=["forward", "reverse", "random"])
def test_one_launch_whose_bits_do_not_depend_on_the_order_of_blocks(order: dict[str, Any]) -> None:
    gpu, result, expected = Gpu("sm_80", options=order), arguments(), arguments()
    call(gpu, "sgd_step_", *result)
    assert len(gpu.stats) == 1
    reference.sgd_step_(*expected)
    for tensor, want in zip([*result[0], *result[2]], [*expected[0], *expected[2]]):
        cases.assert_near(tensor, want.double())
    weights = result[0][: len(SHAPES)]
    assert all(map(torch.equal, result[14], reference.masked_weights(weights, result[13], torch.bfloat16, None)))
    assert torch.equal(result[16], reference.filter_norms(weights, 1))
    again = arguments()
    call(Gpu("sm_80"), "sgd_step_", *again)
    assert all(map(torch.equal, written(result), written(again)))


def test_found_inf_changes_no_parameter() -> None:
    before, values = arguments(), arguments(found_inf=torch.ones(1))
    call(Gpu("sm_80"), "sgd_step_", *values)
    assert all(map(torch.equal, [*values[0], *values[2]], [*before[0], *before[2]]))
    assert torch.equal(values[16], reference.filter_norms(before[0][: len(SHAPES)], 1))


@EITHER
def test_accesses_of_16_bytes_and_no_spills(arch: str) -> None:
    (ptx,) = ptx_of(arch, "sgd_step_", *arguments())
    assert len(triton_compiled.wide(ptx, "ld")) >= 18  # of weights, gradients and momenta: two in each of three loops
    assert len(triton_compiled.wide(ptx, "st")) >= 12
    local, registers = triton_compiled.local_bytes_and_registers(ptx, arch)
    assert local == 0
    assert registers <= layers.REGISTERS


@pytest.mark.slow
def test_bytes_of_resnet50() -> None:
    gpu, values = Gpu("sm_90", options=COUNTING), arguments(triton_compiled.resnet50(), [])
    call(gpu, "sgd_step_", *values)
    (stats,) = gpu.stats
    elements = sum(param.numel() for param in values[0])
    least = elements * (3 * 4 + 2 * 4 + 2) + len(values[13]) + values[15].nbytes + values[16].nbytes
    assert triton_compiled.bytes_of(stats) / least <= 1.05
    assert triton_compiled.sector_efficiency(stats, "global load 16B") >= 0.95
    assert triton_compiled.sector_efficiency(stats, "global store 16B") >= 0.95


def test_a_step_like_the_last_one_copies_no_table() -> None:
    values = arguments()
    sides = values[0], values[1], values[2], values[14]
    first = layers.grid_of(*sides, filters=len(SHAPES))
    misses = layers._lines.cache.cache_info().misses, layers._addresses.cache.cache_info().misses
    again = layers.grid_of(*sides, filters=len(SHAPES))
    assert again.addresses is first.addresses
    assert misses == (layers._lines.cache.cache_info().misses, layers._addresses.cache.cache_info().misses)


FAULTS = {
    "columns past the end": (
        "oob|race_global|uninit",
        "inside = (row < rows)[:, None] & (column < size)",
        "inside = (row < rows)[:, None] & (column >= 0)",
    ),
    "norms past the end": ("oob|race_global", "norms + first + row, norm, mask=there", "norms + first + row, norm"),
    "a mask past its end": ("oob", "mask + first + row, mask=there, other=0", "mask + first + row"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, old, new = FAULTS[fault]
    with planted("sgd_step.py", old, new), pytest.raises((PtxError, AssertionError), match=expected):
        call(Gpu("sm_80"), "sgd_step_", *arguments())
