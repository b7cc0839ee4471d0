"""The k-th smallest of many float32 values, by one program."""

from __future__ import annotations

import triton
import triton.language as tl

# Few digits: tl.histogram compares every value with 32 of them at once, in as many steps as there are such groups.
DIGIT_BITS = tl.constexpr(4)
DIGITS = tl.constexpr(16)
BLOCK = tl.constexpr(4096)


@triton.jit
def digit_of(counts, rank):
    """The digit of value `rank` among those counted by digit, `[DIGITS]` int32, and its rank within the digit."""
    upto = tl.cumsum(counts, 0)
    digit = tl.sum((upto <= rank).to(tl.int32), 0)
    before = tl.sum(tl.where(tl.arange(0, DIGITS) < digit, counts, 0), 0)
    return digit, rank - before


@triton.jit
def sort_key(values):
    """uint32 in the order of the values: NaN with the sign bit first, other NaN last, -0 before 0."""
    bits = values.to(tl.uint32, bitcast=True)
    return bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000).to(tl.uint32)


@triton.jit
def sort_value(key):
    """The value of a sort_key."""
    bits = key ^ tl.where((key >> 31) != 0, 0x80000000, 0xFFFFFFFF).to(tl.uint32)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def select(values, n, rank, LARGEST: tl.constexpr):
    """sort(values)[rank] of `[n]` float32; NaN if one is NaN or its magnitude is above LARGEST.

    The values are read from the L2 cache once for each digit of the sort key, most significant first.
    """
    key = tl.full((), 0, tl.uint32)
    wrong = tl.zeros([BLOCK], tl.int1)
    for step in range(32 // DIGIT_BITS):
        shift = (tl.full((), 32 - DIGIT_BITS, tl.int32) - DIGIT_BITS * step).to(tl.uint32)
        counts = tl.zeros([DIGITS], tl.int32)
        for start in range(0, n, BLOCK):
            index = start + tl.arange(0, BLOCK)
            there = index < n
            # .cg: what other programs wrote is in L2.
            value = tl.load(values + index, mask=there, other=0.0, cache_modifier=".cg")
            wrong = wrong | ((tl.abs(value) <= LARGEST) == 0)
            other = sort_key(value)
            same = there & (((key ^ other) >> shift) >> DIGIT_BITS == 0)
            digits = ((other >> shift) & (DIGITS - 1)).to(tl.int32)
            counts += tl.histogram(digits, DIGITS, mask=same)
        digit, rank = digit_of(counts, rank)
        key = key | (digit.to(tl.uint32) << shift)
    return tl.where(tl.max(wrong.to(tl.int32), 0) != 0, float("nan"), sort_value(key))
