"""kernels/sgd_step_channels.py, executed on the CPU: launches, orders, bytes, registers, tables, planted faults."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
import triton_compiled
from cuda_kernels import COUNTING, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from torch import Tensor
from triton_compiled import call, planted, ptx_of

from fastprune.kernels import layers, sgd_step_channels

# Several groups of channels, the last one smaller; fewer channels than slots; a channel wider than all slots; one row.
SHAPES: cases.Shapes = [(5, 9, 3, 3), (40, 3, 2, 2), (3, 2, 11, 7), (1, 130)]


def arguments(shapes: cases.Shapes = SHAPES) -> tuple[list[Any], Tensor]:
    """Of a plain step with a learning rate of 0, and the norms that it writes."""
    weights = cases.random_weights(shapes)
    norms = torch.full((sum(shape[1] for shape in shapes),), torch.nan)
    step = [weights, [torch.zeros_like(weight) for weight in weights], [], torch.zeros(())]
    settings = [0.0, 0.0, 0.0, False, False, False, None, None]
    return [*step, *settings, len(weights), None, [], None, None, norms, 1], norms


@pytest.mark.parametrize("order", ORDERS, ids=["forward", "reverse", "random"])
def test_a_second_launch_whose_bits_do_not_depend_on_the_order_of_blocks(order: dict[str, Any]) -> None:
    gpu, (values, norms), (again, expected) = Gpu("sm_80", options=order), arguments(), arguments()
    call(gpu, "sgd_step_", *values)
    assert len(gpu.stats) == 2
    exact = [weight.double().transpose(0, 1).flatten(1).abs().mean(1) for weight in values[0]]
    cases.assert_near(norms, torch.cat(exact))
    call(Gpu("sm_80"), "sgd_step_", *again)
    assert torch.equal(norms, expected)


def test_every_byte_is_read_once_and_nothing_spills() -> None:
    gpu, (values, norms) = Gpu("sm_80", options=COUNTING), arguments([(16, 64, 3, 3), (16, 128, 1, 1)])
    call(gpu, "sgd_step_", *values)
    lines = len(sgd_step_channels._lines(torch.device("cpu"), 4, ((0, 16, 64, 9), (0, 16, 128, 1))))
    stats = gpu.stats[1]
    weights, numbers = sum(weight.nbytes for weight in values[0]), lines * sgd_step_channels.COLUMNS.value
    assert (stats.unique_load_bytes, stats.unique_store_bytes) == (weights + 8 * numbers, norms.nbytes)
    # Every warp reads its program's line, a sector for each number.
    assert triton_compiled.bytes_of(stats) == weights + norms.nbytes + 32 * numbers * sgd_step_channels.WARPS
    _, ptx = ptx_of("sm_80", "sgd_step_", *arguments()[0])
    local, registers = triton_compiled.local_bytes_and_registers(ptx, "sm_80")
    assert local == 0
    assert registers <= layers.REGISTERS


def test_a_step_like_the_last_one_copies_no_table() -> None:
    key = torch.device("cpu"), 4, ((4096, 16, 64, 9),)
    assert sgd_step_channels._lines(*key) is sgd_step_channels._lines(*key)


FAULTS = {
    "columns past the end": ("oob", "(row < rows) & (column < width)", "(row < rows) & (column < width + 1)"),
    "rows past the end": ("oob", "(row < rows) & (column < width)", "(row <= rows) & (column < width)"),
    "norms past the end": ("oob|race_global", "mask=slot * inner < width", "mask=slot * inner <= width"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, old, new = FAULTS[fault]
    with planted("sgd_step_channels.py", old, new), pytest.raises((PtxError, AssertionError), match=expected):
        call(Gpu("sm_80"), "sgd_step_", *arguments()[0])
