"""Covariance and correlation by products of centred filters; contract in fastprune/ops/decorrelation.py.

One launch, of tasks in this order: statistics of blocks of filters; then the tiles of the upper triangle, which wait
for their layer's statistics. The last tile of a layer finishes the layer, the last layer the penalty.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import product
from .gram_statistics import (
    DEPTH,
    NARROW,
    ROWS,
    SPAN,
    WARPS,
    WIDE,
    blocks_of,
    centred_tile,
    kept_filters,
    tile_of,
    weight_of,
    write_statistics,
)
from .tables import COEFFICIENTS, COLUMNS, FILTERS, FIRST, SIZE, SLOT, TASKS, TILE, Call, Layer, Work, place
from .tasks import signal, sum_slots, take, wait

REGISTERS = 248  # left alone, ptxas spills a few to keep under 64


@triton.jit
def store_signs(codes, words, rows, first_column, filters, SIDE: tl.constexpr):
    """Pack codes of two bits, 16 to a word, into words[filters, ⌈filters / 16⌉]."""
    shifts = 2 * (tl.arange(0, SIDE) % 16)
    packed = tl.sum(tl.reshape(codes << shifts[None, :], [SIDE, SIDE // 16, 16]), 2)
    width = (filters + 15) // 16
    columns = first_column // 16 + tl.arange(0, SIDE // 16)
    there = (rows < filters)[:, None] & (columns < width)[None, :]
    tl.store(words + rows[:, None] * width + columns[None, :], packed, mask=there)


@triton.jit
def finish_covariance(sums, layer, i, j, rows, columns, slots, coefficients, diagonal, SIDE: tl.constexpr):
    """A tile's share of Σ_{i≤j} |C_ij| into its slot, its signs into both sides of the diagonal."""
    filters, size = tl.load(layer + FILTERS), tl.load(layer + SIZE)
    row, column = rows[:, None], columns[None, :]
    counted = row < column + diagonal
    tiles = tl.cdiv(filters, SIDE)
    slot = tl.load(layer + SLOT) + i * tiles - i * (i - 1) // 2 + j - i
    share = tl.sum(tl.sum(tl.where(counted, tl.abs(sums), 0), 1), 0).to(tl.float64)
    tl.store(slots + slot, share / tl.maximum(size - 1, 1).to(tl.float64))
    codes = tl.where(sums > 0, tl.where(row == column, 2 * diagonal, 1), tl.where((sums < 0) & (row != column), 3, 0))
    words = coefficients + tl.load(layer + COEFFICIENTS)
    store_signs(codes, words, rows, j * SIDE, filters, SIDE)
    if i != j:
        store_signs(tl.trans(codes), words, columns, i * SIDE, filters, SIDE)


@triton.jit
def finish_correlation(sums, layer, i, j, rows, columns, scale_i, scale_j, slots, coefficients):
    """A tile of P to both sides of the diagonal; the squares of its lines summed into the slots of rows and columns."""
    filters = tl.load(layer + FILTERS)
    slot = slots + tl.load(layer + SLOT)
    matrix = coefficients + tl.load(layer + COEFFICIENTS)
    row, column = rows[:, None], columns[None, :]
    pearson = tl.where(row == column, 0, sums * scale_i[:, None] * scale_j[None, :])
    there = (row < filters) & (column < filters) & (row != column)
    tl.store(matrix + row * filters + column, pearson, mask=there)
    squares = pearson * pearson
    tl.store(slot + j * filters + rows, tl.sum(squares, 1).to(tl.float64), mask=rows < filters)
    if i != j:
        tl.store(matrix + column * filters + row, pearson, mask=there)
        tl.store(slot + i * filters + columns, tl.sum(squares, 0).to(tl.float64), mask=columns < filters)


@triton.jit
def gram_tile(
    layer,
    i,
    j,
    means,
    scales,
    slots,
    coefficients,
    diagonal,
    CORRELATION: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
):
    """The products of two blocks of filters, and what becomes of them."""
    weight, size = weight_of(layer, DTYPE, SIDE == WIDE)
    filters, first = tl.load(layer + FILTERS), tl.load(layer + FIRST)
    rows, columns = i * SIDE + tl.arange(0, SIDE), j * SIDE + tl.arange(0, SIDE)
    mean_i = tl.load(means + first + rows, mask=rows < filters, other=0)
    mean_j = tl.load(means + first + columns, mask=columns < filters, other=0)
    scale_i = tl.load(scales + first + rows, mask=rows < filters, other=0)
    scale_j = tl.load(scales + first + columns, mask=columns < filters, other=0)
    end = tl.where((tl.max(scale_i, 0) > 0) & (tl.max(scale_j, 0) > 0), size, 0)
    sums = tl.zeros([SIDE, SIDE], means.dtype.element_ty)
    for k in range(0, end, DEPTH):
        steps = k + tl.arange(0, DEPTH)
        left = centred_tile(weight, size, rows, steps, mean_i, scale_i > 0)
        right = centred_tile(weight, size, columns, steps, mean_j, scale_j > 0)
        sums = product(left, tl.trans(right), sums, PRECISION)
    if CORRELATION:
        finish_correlation(sums, layer, i, j, rows, columns, scale_i, scale_j, slots, coefficients)
    else:
        finish_covariance(sums, layer, i, j, rows, columns, slots, coefficients, diagonal, SIDE)


@triton.jit
def layer_correlation(layer, tiles, mask, slots, coefficients):
    """‖P − diag P‖_F / n of a layer, with −Σ_j P_ij² written to its diagonal; from the slots [tiles, F]."""
    filters, first = tl.load(layer + FILTERS), tl.load(layer + FIRST)
    slot = slots + tl.load(layer + SLOT)
    matrix = coefficients + tl.load(layer + COEFFICIENTS)
    totals, kept = tl.zeros([SPAN], tl.float64), tl.zeros([SPAN], tl.int32)
    for begin in range(0, filters, SPAN):
        rows = begin + tl.arange(0, SPAN)
        squares = tl.zeros([SPAN], tl.float64)
        for j in range(tiles):
            squares += tl.load(slot + j * filters + rows, mask=rows < filters, other=0)
        tl.store(matrix + rows * (filters + 1), 0 - squares, mask=rows < filters)
        totals += squares
        kept += kept_filters(mask, first, rows, filters).to(tl.int32)
    return tl.sqrt(tl.sum(totals, 0)) / tl.maximum(tl.sum(kept, 0), 1).to(tl.float64)


@triton.jit(do_not_specialize=["statistics_tasks", "layers", "diagonal"])
def gram_forward(
    table,  # [layers, COLUMNS]
    tasks,  # [programs]
    statistics_tasks,  # how many of them are of the statistics
    layers,
    counters,  # [2 + 2 · layers], 0: tasks taken, layers done; statistics and tiles done of each layer
    mask,  # [N] or None
    means,  # [N]
    scales,  # [N]
    slots,  # float64: [layers] penalties, then the tiles' shares
    coefficients,
    penalty,  # scalar
    diagonal,  # 1 if variances count, else 0
    CORRELATION: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_WIDE: tl.constexpr,  # whether a layer has wide tiles
):
    """The penalty of all layers and the coefficients of its gradient."""
    task = take(counters)
    index, i, j = place(tl.load(tasks + task))
    layer = table + index * COLUMNS
    filters = tl.load(layer + FILTERS)
    ready, done = counters + 2 + index, counters + 2 + layers + index
    if task < statistics_tasks:
        write_statistics(layer, i, mask, means, scales, CORRELATION, DTYPE)
        signal(ready)
    else:
        wait(ready, tl.cdiv(filters, ROWS))
        side = tl.load(layer + TILE) if HAS_WIDE else NARROW
        if side == WIDE:
            gram_tile(layer, i, j, means, scales, slots, coefficients, diagonal, CORRELATION, DTYPE, PRECISION, WIDE)
        else:
            gram_tile(layer, i, j, means, scales, slots, coefficients, diagonal, CORRELATION, DTYPE, PRECISION, NARROW)
        tiles = tl.load(layer + TASKS)
        if signal(done) == tiles - 1:
            if CORRELATION:
                share = layer_correlation(layer, tl.cdiv(filters, side), mask, slots, coefficients)
            else:
                share = sum_slots(slots + tl.load(layer + SLOT), tiles)
            tl.store(slots + index, share)
            if signal(counters + 1) == layers - 1:
                tl.store(penalty, sum_slots(slots, layers))


def upper_triangle(layer: Layer) -> list[tuple[int, int]]:
    """Tasks of the tiles, row by row."""
    tiles = triton.cdiv(layer.filters, tile_of(layer))
    return [(i, j) for i in range(tiles) for j in range(i, tiles)]


def covariance_work(layer: Layer) -> Work:
    """A slot for each tile's share."""
    upper = upper_triangle(layer)
    words = layer.filters * triton.cdiv(layer.filters, 16)
    return Work((blocks_of(layer), upper), words, len(upper), len(upper), tile_of(layer))


def correlation_work(layer: Layer) -> Work:
    """A slot for each filter and each tile of its line."""
    upper, side = upper_triangle(layer), tile_of(layer)
    slots = layer.filters * triton.cdiv(layer.filters, side)
    return Work((blocks_of(layer), upper), layer.filters**2, slots, len(upper), side)


def forward(call: Call, coefficients: Tensor, penalty: Tensor) -> None:
    """Launch ``gram_forward``."""
    correlation = call.kind == "correlation"
    table = call.table(correlation_work if correlation else covariance_work)
    layers = len(call.weights)
    means, scales = penalty.new_empty(2, call.filters)
    gram_forward[(table.phases[-1],)](
        table.lines,
        table.tasks,
        table.phases[0],
        layers,
        call.zeros(2 + 2 * layers),
        call.kept,
        means,
        scales,
        penalty.new_empty(table.slots, dtype=torch.float64),
        coefficients,
        penalty,
        int(call.diagonal),
        CORRELATION=correlation,
        DTYPE=call.dtype,
        PRECISION=call.precision,
        HAS_WIDE=table.tile == WIDE.value,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
