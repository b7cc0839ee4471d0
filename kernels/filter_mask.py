"""filter_norms, kth_threshold, filter_mask, update_filter_masks_: contracts in fastprune/ops/filter_mask.py.

Nothing waits for the device, so nothing is raised for values that are not finite: norms are as they come out, a
fresh mask keeps every filter, another stays as it is, and the threshold is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprune.ops.checks import (
    check_filter_vector,
    check_ord,
    check_rate,
    check_scores,
    check_weights,
    count_filters,
)

from .layers import (
    FIRST,
    NARROW,
    REGISTERS,
    ROWS,
    SIZE,
    TILE,
    TYPES,
    WARPS,
    WIDE,
    address_of,
    aligned_to,
    grid_of,
    line_of,
    offset,
    whole_vectors,
)
from .select import BLOCK, select

FLOAT_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def add_magnitudes(sums, values, ORD: tl.constexpr):
    """sums + |values| or + values², float64: the rounding of the sum is far below that of a float32 result."""
    values = values.to(tl.float64)
    return sums + (tl.abs(values) if ORD == 1 else values * values)


@triton.jit
def column_sums(source, row, rows, size, ORD: tl.constexpr, WIDTH: tl.constexpr):
    """`[TILE / WIDTH, WIDTH]` float64: the sums over every WIDTH-th element of the rows."""
    sums = tl.zeros([TILE // WIDTH, WIDTH], tl.float64)
    for start in range(0, size, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        inside = (row < rows)[:, None] & (column < size)
        sums = add_magnitudes(sums, tl.load(source + row[:, None] * size + column, mask=inside, other=0), ORD)
    return sums


@triton.jit
def row_means(
    address,
    row,
    rows,
    size,
    aligned,
    TYPE: tl.constexpr,
    ORD: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """`[TILE / WIDTH]` float32: mean |w| or mean w² of the rows."""
    # Both ways meet here: the order of what is left of the additions is the same for both.
    if aligned:
        source = aligned_to(address, TYPE, VECTOR)
        sums = column_sums(source, row, rows, whole_vectors(size, VECTOR), ORD, WIDTH)
    else:
        sums = column_sums(aligned_to(address, TYPE, 1), row, rows, size, ORD, WIDTH)
    return (tl.sum(sums, 1) / size.to(tl.float64)).to(tl.float32)


@triton.jit
def write_norms(
    line,
    addresses,
    scores,
    rows,
    aligned,
    TYPE: tl.constexpr,
    ORD: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """scores[f] = mean |w| or mean w² of the program's filters."""
    address = address_of(line, addresses, 0, 1, TYPE)
    size, rows = offset(tl.load(line + SIZE), WIDTH), offset(rows, WIDTH)
    scores += tl.load(line + FIRST)
    for begin in range(0, rows, TILE // WIDTH):
        row = begin + tl.arange(0, TILE // WIDTH)
        norms = row_means(address, row, rows, size, aligned, TYPE, ORD, WIDTH, VECTOR)
        tl.store(scores + row, norms, mask=row < rows)


@triton.jit
def write_mask(scores, mask, n, rank, FRESH: tl.constexpr):
    """mask = scores > sort(scores)[rank]; if one is not finite, all True or nothing."""
    threshold = select(scores, n, rank, FLOAT_MAX)
    finite = threshold == threshold
    if not FRESH:
        n = tl.where(finite, n, 0)
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        there = index < n
        score = tl.load(scores + index, mask=there, other=0.0, cache_modifier=".cg")
        tl.store(mask + index, (score > threshold) | (finite == 0), mask=there)


@triton.jit(do_not_specialize=("n", "rank"))
def filter_mask_kernel(
    lines,
    addresses,
    scores,
    mask,
    ticket,
    n,
    rank,
    TYPE: tl.constexpr,
    ORD: tl.constexpr,
    FRESH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The norms of all filters; the last program to finish selects the threshold and writes the mask.

    Args:
        lines, addresses: tables of layers (weights); see layers.py.
        scores: `[n]` float32, written.
        mask: `[n]` bool, written; None if only the norms are wanted.
        ticket: one int32, 0 before the launch.
        n, rank: the number of filters, and the threshold's index in sorted scores.
        TYPE: of the weights.
        ORD: 1 for mean |w|, 2 for mean w².
        FRESH: whether the mask holds nothing yet.
        VECTOR: elements of an access where rows are aligned.
    """
    line = line_of(lines)
    rows = tl.load(line + ROWS)
    kind, aligned, rows = rows // 2 % 4, rows % 2 == 1, rows // 8
    if kind == 0:
        write_norms(line, addresses, scores, rows, aligned, TYPE, ORD, NARROW, VECTOR)
    elif kind == 1:
        write_norms(line, addresses, scores, rows, aligned, TYPE, ORD, WIDE, VECTOR)
    else:
        write_norms(line, addresses, scores, rows, aligned, TYPE, ORD, TILE, VECTOR)
    if mask is not None:
        tl.debug_barrier()  # all of the program's scores come before its ticket
        earlier = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
        if earlier == tl.num_programs(0) - 1:
            write_mask(scores, mask, n, rank, FRESH)


@triton.jit(do_not_specialize=("n", "rank"))
def kth_threshold_kernel(scores, n, rank, threshold):
    """threshold = sort(scores)[rank] of `[n]` float32, by one program."""
    tl.store(threshold, select(scores, n, rank, float("inf")))


def _launch(weights: Sequence[Tensor], ord: int, scores: Tensor, mask: Tensor | None, rank: int, fresh: bool) -> None:
    with torch.cuda.device_of(scores):
        grid = grid_of(weights)
        filter_mask_kernel[(len(grid.lines),)](
            grid.lines,
            grid.addresses,
            scores,
            mask,
            None if mask is None else scores.new_zeros(1, dtype=torch.int32),
            len(scores),
            rank,
            TYPE=TYPES[weights[0].dtype],
            ORD=ord,
            FRESH=fresh,
            VECTOR=grid.vector,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )


def filter_norms(weights: Sequence[Tensor], ord: int) -> Tensor:
    """The norms of every filter, `[N]` float32, in one launch."""
    check_weights("filter_norms", weights)
    check_ord("filter_norms", ord)
    scores = weights[0].new_empty(count_filters(weights), dtype=torch.float32)
    _launch(weights, ord, scores, None, 0, False)
    return scores


def kth_threshold(scores: Tensor, k: int) -> Tensor:
    """`sort(scores)[k]`, a float32 scalar."""
    check_scores("kth_threshold", scores, k)
    threshold = scores.new_empty(())
    with torch.cuda.device_of(scores):
        kth_threshold_kernel[(1,)](scores, scores.numel(), k, threshold, num_warps=WARPS)
    return threshold


def _select_filters(weights: Sequence[Tensor], rate: float, ord: int, mask: Tensor, fresh: bool) -> None:
    scores = weights[0].new_empty(len(mask), dtype=torch.float32)
    _launch(weights, ord, scores, mask, int(len(mask) * rate), fresh)


def filter_mask(weights: Sequence[Tensor], rate: float, ord: int) -> Tensor:
    """`[N]` bool, True for kept filters, in one launch."""
    check_rate("filter_mask", rate)
    check_weights("filter_mask", weights)
    check_ord("filter_mask", ord)
    mask = weights[0].new_empty(count_filters(weights), dtype=torch.bool)
    _select_filters(weights, rate, ord, mask, True)
    return mask


def update_filter_masks_(weights: Sequence[Tensor], rate: float, ord: int, mask: Tensor) -> None:
    """Write `filter_mask(weights, rate, ord)` into `mask`, in one launch."""
    check_rate("update_filter_masks_", rate)
    check_weights("update_filter_masks_", weights)
    check_ord("update_filter_masks_", ord)
    check_filter_vector("update_filter_masks_", "mask", mask, weights, torch.bool)
    if weights:
        _select_filters(weights, rate, ord, mask, False)
