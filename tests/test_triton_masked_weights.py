"""kernels/masked_weights.py, what Triton makes of it executed on the CPU: bytes, accesses, tables, planted faults."""

from __future__ import annotations

from typing import Any

import cases
import pytest
import torch
import triton_compiled
from cuda_kernels import COUNTING, EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from triton_compiled import call, planted, ptx_of

from fastprune.kernels import layers
from fastprune.ops import reference

SHAPES = [(9, 64), (7, 27), (5, 3), (3, 8208)]


def arguments(dtype: torch.dtype = torch.float32, target: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    return cases.random_weights(SHAPES, dtype), cases.random_mask(SHAPES), target, None


@pytest.mark.parametrize("order", ORDERS[1:], ids=["reverse", "random"])
def test_one_launch_whose_bits_do_not_depend_on_the_order_of_blocks(order: dict[str, Any]) -> None:
    gpu = Gpu("sm_80", options=order)
    result = call(gpu, "masked_weights", *arguments())
    assert len(gpu.stats) == 1
    assert all(map(torch.equal, result, reference.masked_weights(*arguments())))


@EITHER
@pytest.mark.parametrize(
    ("source", "target"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_accesses_of_16_bytes_and_no_spills(source: torch.dtype, target: torch.dtype, arch: str) -> None:
    (ptx,) = ptx_of(arch, "masked_weights", *arguments(source, target))
    # Of the wider kind, four in flight in each of three loops.
    if source.itemsize >= target.itemsize:
        assert len(triton_compiled.wide(ptx, "ld")) >= 12
    if target.itemsize >= source.itemsize:
        assert len(triton_compiled.wide(ptx, "st")) >= 12
    local, registers = triton_compiled.local_bytes_and_registers(ptx, arch)
    assert local == 0
    assert registers <= layers.REGISTERS


@pytest.mark.slow
@pytest.mark.parametrize("backward", [False, True])
def test_bytes_of_resnet50(backward: bool) -> None:
    shapes = triton_compiled.resnet50()
    source, target = (torch.bfloat16, torch.float32) if backward else (torch.float32, torch.bfloat16)
    inputs, mask = cases.random_weights(shapes, source), cases.random_mask(shapes)
    feedback = torch.full((len(mask),), 0.5) if backward else None
    gpu = Gpu("sm_90", options=COUNTING)
    call(gpu, "masked_weights_backward" if backward else "masked_weights", inputs, mask, target, feedback)
    (stats,) = gpu.stats
    read = [x.nbytes if backward else x[m].nbytes for x, m in zip(inputs, mask.split([len(x) for x in inputs]))]
    least = sum(read) + len(mask) + sum(x.numel() * target.itemsize for x in inputs)
    assert triton_compiled.bytes_of(stats) / least <= 1.05
    assert triton_compiled.sector_efficiency(stats, f"global load {8 if backward else 16}B") >= 0.95
    assert triton_compiled.sector_efficiency(stats, f"global store {16 if backward else 8}B") >= 0.95


# --------------------------------------------------------------------------------------------------------- tables


def test_tables_are_kept_until_a_tensor_moves() -> None:
    weights, other = (cases.random_weights(SHAPES, seed=seed) for seed in (0, 1))
    layers._lines.cache.cache_clear()
    layers._addresses.cache.cache_clear()
    first = layers.grid_of(weights)
    again = layers.grid_of(weights)
    assert again.lines is first.lines
    assert again.addresses is first.addresses
    moved = layers.grid_of([*weights[:-1], other[-1]])
    assert moved.lines is first.lines  # its size is what it was
    assert moved.addresses.tolist() == [*first.addresses.tolist()[:-1], other[-1].data_ptr()]
    assert layers._addresses.cache.cache_info().misses == 2


def test_tables_are_bounded() -> None:
    for table in (layers._lines, layers._addresses):
        assert table.cache.cache_info().maxsize in (32, 64)


def test_lines_cover_every_row_once() -> None:
    shapes = [*SHAPES, (600, 2, 3, 3), (5, 100_000), (1000, 300)]
    others = [(16,), (), (40_001,), (0, 3)]
    tensors = [torch.empty(shape) for shape in [*shapes, *others]]
    lines = layers.grid_of(tensors, filters=len(shapes)).lines
    filters, seen = 0, [torch.zeros(tensor.numel(), dtype=torch.int) for tensor in tensors]
    for size, rows, first, layer, start in lines.tolist():
        seen[layer][start : start + size * (rows // 8)] += 1
        if layer < len(shapes):
            assert first == sum(shape[0] for shape in shapes[:layer]) + start // size
            filters += rows // 8
        else:
            assert first == -1
    assert filters == sum(shape[0] for shape in shapes)
    assert all(bool((count == 1).all()) for count in seen)


# --------------------------------------------------------------------------------------------------------- faults

FAULTS = {
    "columns past the end": ("race_global|oob", "inside = there[:, None] & (column < size)", "inside = there[:, None]"),
    "filters past the end": ("race_global|oob", "there = row < rows", "there = row <= rows"),
    "vectors where there are none": (
        "were not written",
        "BACKWARD, NARROW, 1)",
        "BACKWARD, NARROW, VECTOR)",
    ),
    "a mask past its end": ("oob", "mask + filters, mask=there, other=0).to", "mask + filters).to"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, old, new = FAULTS[fault]
    with planted("masked_weights.py", old, new), pytest.raises((PtxError, AssertionError), match=expected):
        call(Gpu("sm_80"), "masked_weights", *arguments())
