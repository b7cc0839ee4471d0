"""weight_mask: contract in fastprune/ops/weight_mask.py.

The threshold is found digit by digit of the importances' bits: each of four launches counts one digit of those that
agree with what is known, and its last program finds the digit of the threshold. A fifth writes the masks. Counts are
whole numbers, so no order of adding changes a mask. Nothing waits for the device: where an importance is not finite,
every weight is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprune.ops.reference import check_weight_mask

from .layers import (
    REGISTERS,
    ROWS,
    SIZE,
    TILE,
    TYPES,
    WARPS,
    address_of,
    aligned_to,
    grid_of,
    line_of,
    whole_vectors,
    widen,
)

DIGITS = tl.constexpr(256)
# Where the digits of a float32 that is not negative begin: its exponent first, 255 where it is not finite.
SHIFTS = (23, 15, 7, 0)
WIDTHS = (8, 8, 8, 7)

# The state of the search, int64, after the counts of each digit.
STATE = tl.constexpr(4 * 256)
KEY = tl.constexpr(STATE.value)  # bits of the threshold that are known
RANK = tl.constexpr(STATE.value + 1)  # of the threshold among the importances that agree with them
BAD = tl.constexpr(STATE.value + 2)  # whether an importance is not finite
TICKETS = tl.constexpr(STATE.value + 3)  # of each launch


@triton.jit
def importances(weights, grads, at, inside, IMPORTANCE: tl.constexpr):
    """The bits of float32 importances: l1 |w|, l2 w², grad |g|, taylor |w · g|; their order is that of the values."""
    if IMPORTANCE == "grad":
        score = widen(tl.load(grads + at, mask=inside, other=0))
    else:
        score = widen(tl.load(weights + at, mask=inside, other=0))
    if IMPORTANCE == "l2":
        score = score * score
    if IMPORTANCE == "taylor":
        score = score * widen(tl.load(grads + at, mask=inside, other=0))
    return tl.abs(score).to(tl.float32).to(tl.uint32, bitcast=True)


@triton.jit
def count_tiles(
    line,
    addresses,
    rows,
    key,
    shift,
    width,
    TYPE: tl.constexpr,
    TENSORS: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """`[DIGITS]` int32: the digits of the program's importances that agree with the key above the digit."""
    weights = aligned_to(address_of(line, addresses, 0, TENSORS, TYPE), TYPE, VECTOR)
    grads = aligned_to(address_of(line, addresses, TENSORS - 2, TENSORS, TYPE), TYPE, VECTOR)
    size = whole_vectors((tl.load(line + SIZE) * rows).to(tl.int32), VECTOR)
    counts = tl.zeros([DIGITS], tl.int32)
    for start in range(0, size, TILE):
        at = start + tl.arange(0, TILE)
        bits = importances(weights, grads, at, at < size, IMPORTANCE)
        same = (at < size) & (((bits ^ key) >> shift) >> width == 0)
        if tl.max(same.to(tl.int32), 0) != 0:
            digits = ((bits >> shift) & ((1 << width) - 1)).to(tl.int32)
            counts += tl.histogram(digits, DIGITS, mask=same)
    return counts


@triton.jit
def find_digit(counts, state, SHIFT: tl.constexpr, STEP: tl.constexpr):
    """By the last program: the threshold's next digit from all programs' counts."""
    every = tl.load(counts + tl.arange(0, DIGITS), cache_modifier=".cg")
    key, rank = tl.load(state + KEY), tl.load(state + RANK)
    upto = tl.cumsum(every, 0)
    digit = tl.sum((upto <= rank).to(tl.int64), 0)
    before = tl.sum(tl.where(tl.arange(0, DIGITS) < digit, every, 0), 0)
    tl.debug_barrier()  # all have read the state
    tl.store(state + KEY, key | (digit << SHIFT))
    tl.store(state + RANK, rank - before)
    if STEP == 0:
        tl.store(state + BAD, tl.sum(tl.where(tl.arange(0, DIGITS) == DIGITS - 1, every, 0), 0))


@triton.jit
def count_kernel(
    lines,
    addresses,
    state,
    TYPE: tl.constexpr,
    TENSORS: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Count one digit of all importances; the last program to finish finds that of the threshold.

    Args:
        lines, addresses: tables of layers (weights, grads if they count, masks); see layers.py.
        state: `[4 · DIGITS + 7]` int64: counts of each digit, key, rank, bad, tickets.
        TYPE: of weights and grads; TENSORS: of each layer.
        IMPORTANCE: l1, l2, grad or taylor.
        STEP, SHIFT, BITS: which digit it is, and where.
        VECTOR: elements of an access where rows are aligned.
    """
    line = line_of(lines)
    rows = tl.load(line + ROWS)
    aligned, rows = rows % 2 == 1, rows // 8
    key = tl.load(state + KEY).to(tl.uint32)
    shift, width = tl.full((), SHIFT, tl.uint32), tl.full((), BITS, tl.uint32)
    if aligned:
        counts = count_tiles(line, addresses, rows, key, shift, width, TYPE, TENSORS, IMPORTANCE, VECTOR)
    else:
        counts = count_tiles(line, addresses, rows, key, shift, width, TYPE, TENSORS, IMPORTANCE, 1)
    total = state + STEP * DIGITS
    tl.atomic_add(total + tl.arange(0, DIGITS), counts.to(tl.int64), mask=counts != 0, sem="relaxed", scope="gpu")
    tl.debug_barrier()  # all of the program's counts come before its ticket
    earlier = tl.atomic_add(state + TICKETS + STEP, 1, sem="acq_rel", scope="gpu")
    if earlier == tl.num_programs(0) - 1:
        find_digit(total, state, SHIFT, STEP)


@triton.jit
def write_tiles(
    line,
    addresses,
    rows,
    key,
    bad,
    TYPE: tl.constexpr,
    TENSORS: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """mask = importance > threshold, for a program's weights."""
    weights = aligned_to(address_of(line, addresses, 0, TENSORS, TYPE), TYPE, VECTOR)
    grads = aligned_to(address_of(line, addresses, TENSORS - 2, TENSORS, TYPE), TYPE, VECTOR)
    masks = aligned_to(address_of(line, addresses, TENSORS - 1, TENSORS, tl.int8), tl.int8, VECTOR)
    size = whole_vectors((tl.load(line + SIZE) * rows).to(tl.int32), VECTOR)
    for start in range(0, size, TILE):
        at = start + tl.arange(0, TILE)
        bits = importances(weights, grads, at, at < size, IMPORTANCE)
        tl.store(masks + at, ((bits > key) | bad).to(tl.int8), mask=at < size)


@triton.jit
def write_kernel(
    lines,
    addresses,
    state,
    TYPE: tl.constexpr,
    TENSORS: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The masks, when all digits of the threshold are known; arguments as those of `count_kernel`."""
    line = line_of(lines)
    rows = tl.load(line + ROWS)
    aligned, rows = rows % 2 == 1, rows // 8
    key, bad = tl.load(state + KEY).to(tl.uint32), tl.load(state + BAD) != 0
    if aligned:
        write_tiles(line, addresses, rows, key, bad, TYPE, TENSORS, IMPORTANCE, VECTOR)
    else:
        write_tiles(line, addresses, rows, key, bad, TYPE, TENSORS, IMPORTANCE, 1)


def weight_mask(weights: Sequence[Tensor], rate: float, importance: str, grads: Sequence[Tensor]) -> list[Tensor]:
    """Bool masks shaped like the weights, in five launches."""
    check_weight_mask(weights, rate, importance, grads)
    masks = [torch.empty_like(weight, dtype=torch.bool) for weight in weights]
    if not weights:
        return masks
    rank = int(sum(weight.numel() for weight in weights) * rate)
    with torch.cuda.device_of(weights[0]):
        state = weights[0].new_zeros(TICKETS.value + len(SHIFTS), dtype=torch.int64)
        state[RANK.value].fill_(rank)
        sides = [weights, *([grads] if grads else []), masks]
        grid = grid_of(*sides, filters=0)
        common = {
            "TYPE": TYPES[weights[0].dtype],
            "TENSORS": len(sides),
            "IMPORTANCE": importance,
            "VECTOR": grid.vector,
            "num_warps": WARPS,
            "maxnreg": REGISTERS,
        }
        tables, programs = (grid.lines, grid.addresses, state), (len(grid.lines),)
        for step, (shift, bits) in enumerate(zip(SHIFTS, WIDTHS)):
            count_kernel[programs](*tables, STEP=step, SHIFT=shift, BITS=bits, **common)
        write_kernel[programs](*tables, **common)
    return masks
