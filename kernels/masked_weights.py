"""masked_weights and its backward: contracts in fastprune/ops/masked_weights.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastprune.ops import reference

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
    narrow,
    offset,
    whole_vectors,
    widen,
)


@triton.jit
def factors_of(mask, feedback, filters, there, BACKWARD: tl.constexpr):
    """What the filters are multiplied by, float32: forward `mask`, backward 1 if kept and else `feedback`."""
    if not BACKWARD:
        factors = tl.load(mask + filters, mask=there, other=0).to(tl.float32)
    elif feedback is None:
        factors = there.to(tl.float32)
    else:
        kept = tl.load(mask + filters, mask=there, other=0) != 0
        factors = tl.where(kept, 1.0, tl.load(feedback + filters, mask=there & (kept == 0), other=0.0))
    return factors


@triton.jit
def scale_rows(
    line,
    addresses,
    mask,
    feedback,
    rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """out[f] = factor[f] · in[f], rounded once, for the rows of a program; where the factor is 0, `in` is not read."""
    source = aligned_to(address_of(line, addresses, 0, 2, IN), IN, VECTOR)
    target = aligned_to(address_of(line, addresses, 1, 2, OUT), OUT, VECTOR)
    size, first = whole_vectors(offset(tl.load(line + SIZE), WIDTH), VECTOR), tl.load(line + FIRST)
    rows = offset(rows, WIDTH)
    for begin in range(0, rows, TILE // WIDTH):
        row = begin + tl.arange(0, TILE // WIDTH)
        there = row < rows
        factor = factors_of(mask, feedback, first + row, there, BACKWARD)[:, None]
        for start in range(0, size, WIDTH):
            column = start + tl.arange(0, WIDTH)[None, :]
            inside = there[:, None] & (column < size)
            at = row[:, None] * size + column
            value = widen(tl.load(source + at, mask=inside & (factor != 0), other=0))
            value = tl.where(factor == 0, 0, value * factor.to(value.dtype))
            tl.store(target + at, narrow(value, OUT), mask=inside)


@triton.jit
def masked_weights_kernel(
    lines,
    addresses,
    mask,
    feedback,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    BACKWARD: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """All layers, forward or backward; a program follows its line.

    Args:
        lines, addresses: tables of layers (in, out); see layers.py.
        mask: `[N]` bool.
        feedback: `[N]` float32, or None: 1.
        IN, OUT: types of the elements.
        BACKWARD: pruned filters are multiplied by their feedback, not by 0.
        VECTOR: elements of an access where rows are aligned.
    """
    line = line_of(lines)
    rows = tl.load(line + ROWS)
    kind, rows = rows % 8, rows // 8
    if kind == 0:
        scale_rows(line, addresses, mask, feedback, rows, IN, OUT, BACKWARD, NARROW, 1)
    elif kind == 1:
        scale_rows(line, addresses, mask, feedback, rows, IN, OUT, BACKWARD, NARROW, VECTOR)
    elif kind == 2:
        scale_rows(line, addresses, mask, feedback, rows, IN, OUT, BACKWARD, WIDE, 1)
    elif kind == 3:
        scale_rows(line, addresses, mask, feedback, rows, IN, OUT, BACKWARD, WIDE, VECTOR)
    elif kind == 4:
        scale_rows(line, addresses, mask, feedback, rows, IN, OUT, BACKWARD, TILE, 1)
    else:
        scale_rows(line, addresses, mask, feedback, rows, IN, OUT, BACKWARD, TILE, VECTOR)


def _scale_filters(
    op: str, inputs: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None, backward: bool
) -> list[Tensor]:
    reference.check_masked_weights(op, inputs, mask, dtype, feedback)
    if not inputs:
        return []
    outputs = [torch.empty_like(tensor, dtype=dtype) for tensor in inputs]
    with torch.cuda.device_of(inputs[0]):
        grid = grid_of(inputs, outputs)
        masked_weights_kernel[(len(grid.lines),)](
            grid.lines,
            grid.addresses,
            mask,
            feedback if backward else None,
            IN=TYPES[inputs[0].dtype],
            OUT=TYPES[dtype],
            BACKWARD=backward,
            VECTOR=grid.vector,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
    return outputs


def masked_weights(
    weights: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None
) -> list[Tensor]:
    """`W ⊙ mask` of every layer in `dtype`, in one launch."""
    return _scale_filters("masked_weights", weights, mask, dtype, feedback, False)


def masked_weights_backward(
    grads: Sequence[Tensor], mask: Tensor, dtype: torch.dtype, feedback: Tensor | None
) -> list[Tensor]:
    """The straight-through gradients of every layer in `dtype`, in one launch."""
    return _scale_filters("masked_weights_backward", grads, mask, dtype, feedback, True)
