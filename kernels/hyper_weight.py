"""hyper_weight and its backward: contracts in fastprune/ops/hyper_weight.py.

A program works on tiles of `[TILE / WIDTH, WIDTH]` elements of the layer, a row of which generates one weight: forward
on the wanted rows in the order of what they generate, backward on all rows in their own order, since every row gets a
gradient. Widths change from step to step, so nothing is compiled for their values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprune.ops import reference

from .layers import REGISTERS, TILE, TYPES, WARPS, narrow, whole_vectors, widen
from .tasks import signal

MOST_COLUMNS = 512  # of a tile
TILES = tl.constexpr(8)  # of a program; backward, at least
PROGRAMS = 512  # at most, backward: each leaves a sum for the last one to add up
SLOTS = tl.constexpr(16)  # that are read together
_VECTOR_BYTES = 16
_WIDTHS = ["wanted", "rows", "out_channels", "run", "channels", "taps", "filter_rows"]


@triton.jit
def of_rows(values, at, there, WIDTH: tl.constexpr):
    """A value for each row in its first column, and zeros: one thread of those that share the row asks for it."""
    first = (tl.arange(0, WIDTH) == 0)[None, :]
    return widen(tl.load(values + at[:, None] + tl.zeros([1, WIDTH], tl.int32), mask=there[:, None] & first, other=0))


@triton.jit(do_not_specialize=_WIDTHS)
def hyper_weight_kernel(
    hidden,
    weight,
    bias,
    generated,
    size,
    wanted,
    run,
    channels,
    taps,
    filter_rows,
    OUT: tl.constexpr,
    BY_TAP: tl.constexpr,
    PANELS: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The wanted weights.

    Args:
        hidden, weight, bias: of the layer.
        generated: the result, as it lies in memory.
        size: H.
        wanted, run: elements of the result, and of each of its filters.
        channels, taps: of its filters; filter_rows: I·kh·kw.
        OUT: type of the result.
        BY_TAP: it lies [out][kh][kw][in].
        PANELS, WIDTH: rows are read in PANELS parts of WIDTH columns.
        VECTOR: elements of which every row is a multiple.
    """
    ROWS: tl.constexpr = TILE // WIDTH
    size = whole_vectors(size, VECTOR)
    column = tl.arange(0, WIDTH)
    x = widen(tl.load(hidden + column, mask=column < size, other=0))
    for tile in range(TILES):
        element = (tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        there = element < wanted
        rest = element % run
        if BY_TAP:
            rest = rest % channels * taps + rest // channels
        row = element // run * filter_rows + rest
        start = weight + row.to(tl.int64)[:, None] * size
        # Products are added to something, even if to 0 only: a multiplication that is fused with the first addition
        # across threads is rounded differently by each of them.
        sums = tl.zeros([ROWS, WIDTH], x.dtype)
        for panel in tl.static_range(PANELS):
            k = panel * WIDTH + column
            if PANELS > 1:
                x = widen(tl.load(hidden + k, mask=k < size, other=0))
            inside = there[:, None] & (k < size)[None, :]
            sums += widen(tl.load(start + k[None, :], mask=inside, other=0)) * x[None, :]
        value = tl.sum(sums + of_rows(bias, row, there, WIDTH), 1)
        tl.store(generated + element, narrow(value, OUT), mask=there)


@triton.jit
def add_slots(slots, stride, programs, WIDTH: tl.constexpr):
    """Σ over the programs' slots, float64 `[WIDTH]`, in an order that depends on their number alone."""
    sums = tl.zeros([SLOTS, WIDTH], tl.float64)
    for first in range(0, programs, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        at = slot[:, None] * stride + tl.arange(0, WIDTH)[None, :]
        sums += tl.load(slots + at, mask=(slot < programs)[:, None], other=0, cache_modifier=".cg")
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=_WIDTHS)
def hyper_weight_backward_kernel(
    grad,
    hidden,
    weight,
    to_hidden,
    to_weight,
    to_bias,
    slots,
    tickets,
    size,
    rows,
    out_channels,
    run,
    channels,
    taps,
    filter_rows,
    TYPE: tl.constexpr,
    BY_TAP: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The gradients of hidden, weight and bias; arguments as those of `hyper_weight_kernel`.

    Args:
        grad: of what was generated, as it lies in memory.
        slots: float64, `[programs, panels, WIDTH]`: partial gradients of hidden.
        tickets: int32, 0 for each panel.
        rows: O·I·kh·kw.
        TYPE: of the layer.
    """
    ROWS: tl.constexpr = TILE // WIDTH
    COMPUTE: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    size = whole_vectors(size, VECTOR)
    panel, programs = tl.program_id(0), tl.num_programs(1)
    column = panel * WIDTH + tl.arange(0, WIDTH)
    x = widen(tl.load(hidden + column, mask=column < size, other=0))
    sums = tl.zeros([ROWS, WIDTH], COMPUTE)
    for first in range(tl.program_id(1) * ROWS, rows, programs * ROWS):
        row = first + tl.arange(0, ROWS)
        filters, rest = row // filter_rows, row % filter_rows
        wanted = (row < rows) & (filters < out_channels) & (rest < run)
        if BY_TAP:
            rest = rest % taps * channels + rest // taps
        g = tl.sum(of_rows(grad, filters * run + rest, wanted, WIDTH).to(COMPUTE), 1)
        at = row.to(tl.int64)[:, None] * size + column[None, :]
        inside = (row < rows)[:, None] & (column < size)[None, :]
        sums += g[:, None] * widen(tl.load(weight + at, mask=inside & wanted[:, None], other=0))
        product = tl.where(wanted[:, None], g[:, None] * x[None, :], 0)
        tl.store(to_weight + at, narrow(product, TYPE), mask=inside)
        if panel == 0:
            tl.store(to_bias + row, narrow(g, TYPE), mask=row < rows)
    stride = tl.num_programs(0) * WIDTH
    slot = tl.program_id(1) * stride + column
    tl.store(slots + slot, tl.sum(sums.to(tl.float64), 0))
    if signal(tickets + panel) == programs - 1:
        total = add_slots(slots + panel * WIDTH, stride, programs, WIDTH)
        tl.store(to_hidden + column, narrow(total.to(COMPUTE), TYPE), mask=column < size)


def _layout(weight: Tensor) -> tuple[int, int, int]:
    """Columns of a tile, how many of them a row has, and the elements of a vector where rows are whole vectors."""
    size, vector = weight.shape[1], _VECTOR_BYTES // weight.element_size()
    width = min(max(triton.next_power_of_2(size), 16), MOST_COLUMNS)
    return width, triton.cdiv(size, width), vector if size % vector == 0 else 1


def hyper_weight(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    out_channels: int,
    in_channels: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The slice of `weight · hidden + bias`, in one launch."""
    reference.check_hyper_weight(hidden, weight, bias, out_channels, in_channels, shape, dtype)
    sizes = (out_channels, in_channels, *shape[2:])
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    generated = torch.empty(sizes, dtype=dtype, device=weight.device, memory_format=memory_format)
    taps, wanted = shape[2] * shape[3], generated.numel()
    width, panels, vector = _layout(weight)
    with torch.cuda.device_of(weight):
        hyper_weight_kernel[(triton.cdiv(wanted, TILE.value // width * TILES.value),)](
            hidden,
            weight,
            bias,
            generated,
            hidden.numel(),
            wanted,
            in_channels * taps,
            in_channels,
            taps,
            shape[1] * taps,
            OUT=TYPES[dtype],
            BY_TAP=channels_last and in_channels > 1 and taps > 1,
            PANELS=panels,
            WIDTH=width,
            VECTOR=vector,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
    return generated


def hyper_weight_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, shape: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden, weight and bias, in one launch."""
    reference.check_hyper_weight_backward(grad, hidden, weight, shape)
    gradients = torch.empty_like(hidden), torch.empty_like(weight), weight.new_empty(len(weight))
    taps, (out_channels, in_channels) = shape[2] * shape[3], grad.shape[:2]
    width, panels, vector = _layout(weight)
    programs = min(triton.cdiv(len(weight), TILE.value // width * TILES.value), PROGRAMS)
    with torch.cuda.device_of(weight):
        slots = weight.new_empty(programs * panels * width, dtype=torch.float64)
        # Panels in x: there may be no more than 65,535 programs in y.
        hyper_weight_backward_kernel[(panels, programs)](
            grad,
            hidden,
            weight,
            *gradients,
            slots,
            weight.new_zeros(panels, dtype=torch.int32),
            hidden.numel(),
            len(weight),
            out_channels,
            in_channels * taps,
            in_channels,
            taps,
            shape[1] * taps,
            TYPE=TYPES[weight.dtype],
            BY_TAP=not grad.is_contiguous(),
            WIDTH=width,
            VECTOR=vector,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
    return gradients
