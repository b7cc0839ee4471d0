"""The gradients of covariance and correlation; contract in fastprune/ops/decorrelation.py.

One launch, of tasks in this order: statistics of blocks of filters, again, and each layer's factor; then tiles of
(coefficients) (centred filters), which wait for their layer's statistics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow, product
from .gram_statistics import (
    DEPTH,
    NARROW,
    REGISTERS,
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
from .tables import COEFFICIENTS, COLUMNS, FILTERS, FIRST, GRADIENT, SIZE, TILE, Call, Layer, Work, place
from .tasks import signal, take, wait


@triton.jit
def write_factor(layer, index, mask, grad, coefficients, factors, CORRELATION: tl.constexpr):
    """factors[layer] = grad / (K − 1), or grad · 2 / (‖P − diag P‖_F · n), the norm read off the diagonal."""
    filters, first = tl.load(layer + FILTERS), tl.load(layer + FIRST)
    factor = tl.load(grad).to(tl.float64)
    if CORRELATION:
        matrix = coefficients + tl.load(layer + COEFFICIENTS)
        totals, kept = tl.zeros([SPAN], tl.float64), tl.zeros([SPAN], tl.int32)
        for begin in range(0, filters, SPAN):
            rows = begin + tl.arange(0, SPAN)
            totals -= tl.load(matrix + rows * (filters + 1), mask=rows < filters, other=0)
            kept += kept_filters(mask, first, rows, filters).to(tl.int32)
        norm = tl.sqrt(tl.sum(totals, 0))
        divisor = norm * tl.maximum(tl.sum(kept, 0), 1).to(tl.float64)
        factor = tl.where(norm > 0, 2 * factor / tl.where(norm > 0, divisor, 1), 0)
    else:
        factor = factor / tl.maximum(tl.load(layer + SIZE) - 1, 1).to(tl.float64)
    tl.store(factors + index, factor)


@triton.jit
def coefficient_tile(matrix, rows, columns, filters, A: tl.constexpr, CORRELATION: tl.constexpr):
    """The coefficients [rows, columns] of a layer as numbers of type A."""
    row, column = rows[:, None], columns[None, :]
    there = (row < filters) & (column < filters)
    if CORRELATION:
        tile = tl.load(matrix + row * filters + column, mask=there, other=0)
    else:
        words = tl.load(matrix + row * ((filters + 15) // 16) + column // 16, mask=there, other=0)
        codes = (words >> (2 * (column % 16))) & 3
        tile = tl.where(codes == 3, -1, codes).to(A)
    return tile


@triton.jit
def gradient_tile(
    layer,
    index,
    i,
    j,
    means,
    scales,
    factors,
    coefficients,
    gradients,
    CORRELATION: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SIDE: tl.constexpr,
):
    """factor · scale · (coefficients) (w − mean) · scale, for a block of filters and a block of their elements."""
    A: tl.constexpr = means.dtype.element_ty
    weight, size = weight_of(layer, DTYPE, SIDE == WIDE)
    filters, first = tl.load(layer + FILTERS), tl.load(layer + FIRST)
    matrix = coefficients + tl.load(layer + COEFFICIENTS)
    rows, columns = i * SIDE + tl.arange(0, SIDE), j * SIDE + tl.arange(0, SIDE)
    scale = tl.load(scales + first + rows, mask=rows < filters, other=0)
    end = tl.where(tl.max(scale, 0) > 0, filters, 0)
    sums = tl.zeros([SIDE, SIDE], A)
    for f in range(0, end, DEPTH):
        others = f + tl.arange(0, DEPTH)
        mean = tl.load(means + first + others, mask=others < filters, other=0)
        scale_of_others = tl.load(scales + first + others, mask=others < filters, other=0)
        x = centred_tile(weight, size, others, columns, mean, scale_of_others > 0)
        if CORRELATION:
            x = x * scale_of_others[:, None]
        left = coefficient_tile(matrix, rows, others, filters, A, CORRELATION)
        sums = product(left, x, sums, PRECISION)
    if CORRELATION:
        sums = sums * scale[:, None]
    sums = sums * tl.load(factors + index).to(A)
    out = tl.multiple_of(gradients + tl.load(layer + GRADIENT), 16)
    there = (rows < filters)[:, None] & (columns < size)[None, :]
    tl.store(out + rows[:, None] * size + columns[None, :], narrow(sums, DTYPE), mask=there)


@triton.jit(do_not_specialize=["statistics_tasks"])
def gram_backward(
    table,  # [layers, COLUMNS]
    tasks,  # [programs]
    statistics_tasks,  # how many of them are of the statistics
    counters,  # [1 + layers], 0: tasks taken; statistics done of each layer
    mask,  # [N] or None
    means,  # [N]
    scales,  # [N]
    factors,  # [layers], float64
    grad,  # scalar
    coefficients,
    gradients,  # all layers' gradients
    CORRELATION: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_WIDE: tl.constexpr,  # whether a layer has wide tiles
):
    """The gradients of all layers."""
    task = take(counters)
    index, i, j = place(tl.load(tasks + task))
    layer = table + index * COLUMNS
    filters = tl.load(layer + FILTERS)
    ready = counters + 1 + index
    if task < statistics_tasks:
        if i == 0:
            write_factor(layer, index, mask, grad, coefficients, factors, CORRELATION)
        write_statistics(layer, i, mask, means, scales, CORRELATION, DTYPE)
        signal(ready)
    else:
        wait(ready, tl.cdiv(filters, ROWS))
        side = tl.load(layer + TILE) if HAS_WIDE else NARROW
        if side == WIDE:
            gradient_tile(
                layer, index, i, j, means, scales, factors, coefficients, gradients, CORRELATION, DTYPE, PRECISION, WIDE
            )
        else:
            gradient_tile(
                layer,
                index,
                i,
                j,
                means,
                scales,
                factors,
                coefficients,
                gradients,
                CORRELATION,
                DTYPE,
                PRECISION,
                NARROW,
            )


def tiles_of(layer: Layer) -> list[tuple[int, int]]:
    """Tasks of the gradient: blocks of filters by blocks of their elements."""
    side = tile_of(layer)
    blocks = range(triton.cdiv(layer.filters, side)), range(triton.cdiv(layer.size, side))
    return [(i, j) for i in blocks[0] for j in blocks[1]]


def covariance_work(layer: Layer) -> Work:
    """Coefficients are words of 16 entries."""
    words = layer.filters * triton.cdiv(layer.filters, 16)
    return Work((blocks_of(layer), tiles_of(layer)), words, tile=tile_of(layer))


def correlation_work(layer: Layer) -> Work:
    """Coefficients are numbers."""
    return Work((blocks_of(layer), tiles_of(layer)), layer.filters**2, tile=tile_of(layer))


def backward(call: Call, grad: Tensor, coefficients: Tensor) -> list[Tensor]:
    """Launch ``gram_backward``."""
    correlation = call.kind == "correlation"
    table = call.table(correlation_work if correlation else covariance_work)
    layers = len(call.weights)
    means, scales = grad.new_empty(2, call.filters)
    flat, gradients = call.gradients(table)
    gram_backward[(table.phases[-1],)](
        table.lines,
        table.tasks,
        table.phases[0],
        call.zeros(1 + layers),
        call.kept,
        means,
        scales,
        grad.new_empty(layers, dtype=torch.float64),
        grad,
        coefficients,
        flat,
        CORRELATION=correlation,
        DTYPE=call.dtype,
        PRECISION=call.precision,
        HAS_WIDE=table.tile == WIDE.value,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    return gradients
