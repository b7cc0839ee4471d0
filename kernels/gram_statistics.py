"""Statistics and centred tiles of filters, for the two penalties that are made of Gram matrices."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import divide, square_root
from .tables import FILTERS, FIRST, SIZE, WEIGHT, Layer

WARPS = 8
REGISTERS = 168  # of a thread; left alone, ptxas spills some of narrow tiles for the sake of a round 128
# Filters of a task of the statistics, and how many elements of each are added up side by side.
ROWS = tl.constexpr(16)
SPAN = tl.constexpr(128)
# Side of a tile: of a layer of many filters, all of which begin and end on a vector of 16 bytes; and of any other,
# and of all in float64, whose sums take twice the registers.
WIDE = tl.constexpr(64)
NARROW = tl.constexpr(32)
# How deep a step of a product is: twice that, and float32 by three TF32 products spills registers.
DEPTH = tl.constexpr(16)
# Square of what fastprune/ops/reference calls CONSTANT_FILTER.
CONSTANT = tl.constexpr(1e-12)


@triton.jit
def weight_of(layer, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """A layer's weight and the size of its filters; the compiler is told if both are whole vectors."""
    weight = tl.load(layer + WEIGHT).to(tl.pointer_type(DTYPE))
    size = tl.load(layer + SIZE)
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
        size = tl.multiple_of(size, 128 // DTYPE.primitive_bitwidth)
    return weight, size


@triton.jit
def kept_filters(mask, first, rows, filters):
    """Which of a layer's filters are there and take part."""
    kept = rows < filters
    if mask is not None:
        kept = kept & (tl.load(mask + first + rows, mask=kept, other=0) != 0)
    return kept


@triton.jit
def write_statistics(layer, block, mask, means, scales, CORRELATION: tl.constexpr, DTYPE: tl.constexpr):
    """means[N]; scales[N]: 0 for a filter that takes no part, else 1 or, for correlation, 1 / ‖w − mean‖."""
    A: tl.constexpr = means.dtype.element_ty
    weight, size = weight_of(layer, DTYPE, False)
    filters, first = tl.load(layer + FILTERS), tl.load(layer + FIRST)
    rows = block * ROWS + tl.arange(0, ROWS)
    kept = kept_filters(mask, first, rows, filters)
    lines = weight + rows[:, None] * size
    steps = tl.arange(0, SPAN)[None, :]
    end = tl.where(tl.max(kept.to(tl.int32), 0) > 0, size, 0)
    sums = tl.zeros([ROWS, SPAN], A)
    for k in range(0, end, SPAN):
        sums += tl.load(lines + k + steps, mask=kept[:, None] & (k + steps < size), other=0).to(A)
    count = size.to(A)
    mean = divide(tl.sum(sums, 1), count)
    scale = kept.to(A)
    if CORRELATION:
        rest, centred, squares = tl.zeros_like(sums), tl.zeros_like(sums), tl.zeros_like(sums)
        for k in range(0, end, SPAN):
            there = kept[:, None] & (k + steps < size)
            w = tl.load(lines + k + steps, mask=there, other=0).to(A)
            x = tl.where(there, w - mean[:, None], 0)
            rest += x
            centred += x * x
            squares += w * w
        # What rounding left of the mean, so that equal elements have no direction whatever their value.
        error = divide(tl.sum(rest, 1), count)
        mean += error
        norm = tl.sum(centred, 1) - count * error * error
        used = kept & (norm > tl.sum(squares, 1) * CONSTANT)
        scale = tl.where(used, divide(1.0, square_root(tl.where(used, norm, 1))), 0)
    tl.store(means + first + rows, mean, mask=rows < filters)
    tl.store(scales + first + rows, scale, mask=rows < filters)


@triton.jit
def centred_tile(weight, size, rows, columns, mean, used):
    """(w − mean)[rows, columns]; 0 where a filter is not used or a column not there. Nothing is read there."""
    there = used[:, None] & (columns < size)[None, :]
    w = tl.load(weight + rows[:, None] * size + columns[None, :], mask=there, other=0).to(mean.dtype)
    return tl.where(there, w - mean[:, None], 0)


def tile_of(layer: Layer) -> int:
    """The side of the tiles of a layer."""
    wide = layer.aligned and layer.filters > NARROW.value and layer.element_size < 8
    return WIDE.value if wide else NARROW.value


def blocks_of(layer: Layer) -> list[tuple[int, int]]:
    """Tasks of the statistics."""
    return [(i, 0) for i in range(triton.cdiv(layer.filters, ROWS.value))]
