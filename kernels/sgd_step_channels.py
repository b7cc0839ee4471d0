"""The norms of input channels that sgd_step_ writes: contract in fastprune/ops/sgd_step.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprune.ops.checks import channels_of

from .device_tables import kept_by_stream, put
from .filter_mask import FLOAT_MAX, add_magnitudes
from .layers import TYPES

SLOTS = tl.constexpr(64)  # columns that a program adds up side by side
DEEP = tl.constexpr(32)  # rows that it reads at once
WARPS = 8

# A program's line: a weight is [rows, channels, inner] in memory, as channels_of of checks.py says, and a program has a
# group of whole channels of every row, up to SLOTS columns; of a channel that is wider, all columns.
COLUMNS = tl.constexpr(6)
ADDRESS = tl.constexpr(0)  # of the group's first element
ROWS = tl.constexpr(1)
STRIDE = tl.constexpr(2)  # from row to row: channels · inner
WIDTH = tl.constexpr(3)  # columns of the group
INNER = tl.constexpr(4)
FIRST = tl.constexpr(5)  # index of the group's first channel among those of the model

Layers = tuple[tuple[int, int, int, int], ...]  # address, rows, channels, inner of each


@triton.jit
def channel_norms_kernel(lines, norms, TYPE: tl.constexpr, ORD: tl.constexpr):
    """norms[channel] = mean |w| or mean w² of every input channel; NaN where that is not finite.

    Args:
        lines: a line for each program, as above.
        norms: `[M]` float32, written.
        TYPE: of the weights.
        ORD: 1 for mean |w|, 2 for mean w².
    """
    line = lines + tl.program_id(0).to(tl.int64) * COLUMNS
    source = tl.load(line + ADDRESS).to(tl.pointer_type(TYPE))
    rows, stride = tl.load(line + ROWS), tl.load(line + STRIDE)
    width, inner = tl.load(line + WIDTH), tl.load(line + INNER)
    sums = tl.zeros([DEEP, SLOTS], tl.float64)
    for left in range(0, width, SLOTS):
        column = left + tl.arange(0, SLOTS)[None, :]
        for top in range(0, rows, DEEP):
            row = top + tl.arange(0, DEEP)[:, None]
            inside = (row < rows) & (column < width)
            sums = add_magnitudes(sums, tl.load(source + row * stride + column, mask=inside, other=0), ORD)
    slot = tl.arange(0, SLOTS)
    own = (slot // inner)[None, :] == slot[:, None]  # channels by slots; a channel that is wider is alone
    totals = tl.sum(tl.where(own, tl.sum(sums, 0)[None, :], 0.0), 1)
    norm = (totals / (rows * inner).to(tl.float64)).to(tl.float32)
    norm = tl.where(tl.abs(norm) <= FLOAT_MAX, norm, float("nan"))
    tl.store(norms + tl.load(line + FIRST) + slot, norm, mask=slot * inner < width)


def write_channel_norms(weights: Sequence[Tensor], norms: Tensor, ord: int) -> None:
    """Write the norms of all input channels, in one launch."""
    layers = tuple((weight.data_ptr(), *channels_of(weight)) for weight in weights)
    lines = _lines(norms.device, weights[0].element_size(), layers)
    channel_norms_kernel[(len(lines),)](lines, norms, TYPE=TYPES[weights[0].dtype], ORD=ord, num_warps=WARPS)


@kept_by_stream(32)
def _lines(device: torch.device, element_size: int, layers: Layers) -> Tensor:
    parts, first = [], 0
    for address, rows, channels, inner in layers:
        group = max(1, SLOTS.value // inner)
        begin = torch.arange(0, channels, group)
        lines = torch.empty(len(begin), COLUMNS.value, dtype=torch.int64)
        lines[:, ADDRESS.value] = address + begin * inner * element_size
        lines[:, ROWS.value] = rows
        lines[:, STRIDE.value] = channels * inner
        lines[:, WIDTH.value] = (channels - begin).clamp(max=group) * inner
        lines[:, INNER.value] = inner
        lines[:, FIRST.value] = first + begin
        parts.append(lines)
        first += channels
    return put(torch.cat(parts), device)
