"""sgd_step_: contract in fastprune/ops/sgd_step.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastprune.ops.reference import SgdStep

from .filter_mask import FLOAT_MAX, add_magnitudes
from .layers import (
    FIRST,
    NARROW,
    REGISTERS,
    ROWS,
    SIZE,
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
from .sgd_step_channels import write_channel_norms

STEP_TILE = tl.constexpr(2048)  # half of what the other ops hold at once: three tensors are read, three written

# What is done with momenta.
NO_MOMENTUM = tl.constexpr(0)
FIRST_STEP = tl.constexpr(1)  # they are written, not read
LATER_STEP = tl.constexpr(2)


@triton.jit
def stepped(
    w,
    g,
    m,
    scale,
    lr,
    momentum,
    undamped,
    decay,
    MOMENTA: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAY: tl.constexpr,
):
    """Weights and momenta after the step: d = scale · g + decay · w; b = momentum · m + undamped · d; w − lr · b."""
    d = g * scale
    if DECAY:
        d = tl.where(decay == 0, d, d + decay * w)  # 0 · Inf is not 0
    b = d
    if MOMENTA == LATER_STEP:
        b = momentum * m + undamped * d
    if NESTEROV:
        d += momentum * b
    else:
        d = b
    return w - lr * d, b


@triton.jit
def step_columns(
    weights,
    grads,
    momenta,
    masked,
    row,
    rows,
    size,
    kept,
    filters,
    skip,
    scale,
    lr,
    momentum,
    undamped,
    decay,
    TYPE: tl.constexpr,
    OUT: tl.constexpr,
    ORD: tl.constexpr,
    MOMENTA: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAY: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Step the rows at these addresses; the sums of what they are then, as `column_sums` of filter_mask.py."""
    weights, grads = aligned_to(weights, TYPE, VECTOR), aligned_to(grads, TYPE, VECTOR)
    momenta, size = aligned_to(momenta, TYPE, VECTOR), whole_vectors(size, VECTOR)
    sums = tl.zeros([STEP_TILE // WIDTH, WIDTH], tl.float64)
    for start in range(0, size, WIDTH):
        column = start + tl.arange(0, WIDTH)[None, :]
        inside = (row < rows)[:, None] & (column < size)
        taken = inside & (skip == 0)
        at = row[:, None] * size + column
        old = tl.load(weights + at, mask=inside, other=0)
        g = widen(tl.load(grads + at, mask=taken, other=0))
        m = g
        if MOMENTA == LATER_STEP:
            m = widen(tl.load(momenta + at, mask=taken, other=0))
        w, b = stepped(widen(old), g, m, scale, lr, momentum, undamped, decay, MOMENTA, NESTEROV, DECAY)
        new = tl.where(taken, narrow(w, TYPE), old)
        tl.store(weights + at, new, mask=taken)
        if MOMENTA != NO_MOMENTUM:
            tl.store(momenta + at, narrow(b, TYPE), mask=taken)
        if OUT is not None:
            value = tl.where(kept[:, None], new, 0)
            tl.store(aligned_to(masked, OUT, VECTOR) + at, narrow(value, OUT), mask=inside & filters)
        if ORD != 0:
            sums = add_magnitudes(sums, new, ORD)
    return sums


@triton.jit
def step_rows(
    line,
    addresses,
    mask,
    filter_decay,
    norms,
    rows,
    aligned,
    skip,
    scale,
    lr,
    momentum,
    undamped,
    decay,
    TYPE: tl.constexpr,
    OUT: tl.constexpr,
    ORD: tl.constexpr,
    MOMENTA: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAY: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Step the rows of a program; if they are filters, write their masked weights and norms."""
    TENSORS: tl.constexpr = 2 + (MOMENTA != NO_MOMENTUM) + (OUT is not None)
    w = address_of(line, addresses, 0, TENSORS, TYPE)
    g = address_of(line, addresses, 1, TENSORS, TYPE)
    m, out = g, w
    if MOMENTA != NO_MOMENTUM:
        m = address_of(line, addresses, 2, TENSORS, TYPE)
    if OUT is not None:
        out = address_of(line, addresses, TENSORS - 1, TENSORS, OUT)
    size, rows = offset(tl.load(line + SIZE), WIDTH), offset(rows, WIDTH)
    first = tl.load(line + FIRST)
    filters = first >= 0
    for begin in range(0, rows, STEP_TILE // WIDTH):
        row = begin + tl.arange(0, STEP_TILE // WIDTH)
        there = (row < rows) & filters
        kept = there
        if OUT is not None:
            kept = tl.load(mask + first + row, mask=there, other=0) != 0
        decays = decay
        if filter_decay is not None:
            own = tl.load(filter_decay + first + row, mask=there, other=0)
            decays = (decay + own.to(decay.dtype))[:, None]
        # Both ways meet here: the order of what is left of the additions is the same for both.
        # fmt: off
        if aligned:
            sums = step_columns(
                w, g, m, out, row, rows, size, kept, filters, skip, scale, lr, momentum, undamped, decays,
                TYPE, OUT, ORD, MOMENTA, NESTEROV, DECAY, WIDTH, VECTOR,
            )
        else:
            sums = step_columns(
                w, g, m, out, row, rows, size, kept, filters, skip, scale, lr, momentum, undamped, decays,
                TYPE, OUT, ORD, MOMENTA, NESTEROV, DECAY, WIDTH, 1,
            )
        # fmt: on
        if ORD != 0:
            norm = (tl.sum(sums, 1) / size.to(tl.float64)).to(tl.float32)
            norm = tl.where(tl.abs(norm) <= FLOAT_MAX, norm, float("nan"))
            tl.store(norms + first + row, norm, mask=there)


@triton.jit
def sgd_step_kernel(
    lines,
    addresses,
    mask,
    filter_decay,
    norms,
    lr,
    grad_scale,
    found_inf,
    momentum: tl.float64,
    undamped: tl.float64,
    decay: tl.float64,
    TYPE: tl.constexpr,
    OUT: tl.constexpr,
    ORD: tl.constexpr,
    MOMENTA: tl.constexpr,
    NESTEROV: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A step of all parameters, and the masked weights and norms of those that are filters.

    Args:
        lines, addresses: tables of layers (params, grads, momenta unless NO_MOMENTUM, masked where OUT); see layers.py.
        mask: `[N]` bool, needed where OUT.
        filter_decay: `[N]` float32, or None.
        norms: `[N]` float32, written where ORD.
        lr: one float32 or float64.
        grad_scale, found_inf: one float32 each, or None.
        momentum, undamped, decay: of the formula of `stepped`; undamped is 1 − dampening.
        TYPE: of params, grads, momenta; OUT: of masked, or None; ORD: of norms, or 0.
        MOMENTA: one of the three above.
        NESTEROV, MAXIMIZE: as for torch.optim.SGD; DECAY: whether any weight decay may not be 0.
        VECTOR: elements of an access where rows are aligned.
    """
    COMPUTE: tl.constexpr = tl.float64 if tl.float64 == TYPE else tl.float32
    rate, momentum = tl.load(lr).to(COMPUTE), tl.full((), momentum, COMPUTE)
    undamped, decay = tl.full((), undamped, COMPUTE), tl.full((), decay, COMPUTE)
    scale = tl.full((), -1.0 if MAXIMIZE else 1.0, tl.float32)
    if grad_scale is not None:
        scale = tl.div_rn(scale, tl.load(grad_scale))
    scale = scale.to(COMPUTE)
    skip = tl.full((), 0, tl.int1)
    if found_inf is not None:
        skip = tl.load(found_inf) != 0
    line = line_of(lines)
    rows = tl.load(line + ROWS)
    kind, aligned, rows = rows // 2 % 4, rows % 2 == 1, rows // 8
    # fmt: off
    if kind == 0:
        step_rows(
            line, addresses, mask, filter_decay, norms, rows, aligned, skip, scale, rate, momentum, undamped, decay,
            TYPE, OUT, ORD, MOMENTA, NESTEROV, DECAY, NARROW, VECTOR,
        )
    elif kind == 1:
        step_rows(
            line, addresses, mask, filter_decay, norms, rows, aligned, skip, scale, rate, momentum, undamped, decay,
            TYPE, OUT, ORD, MOMENTA, NESTEROV, DECAY, WIDE, VECTOR,
        )
    else:
        step_rows(
            line, addresses, mask, filter_decay, norms, rows, aligned, skip, scale, rate, momentum, undamped, decay,
            TYPE, OUT, ORD, MOMENTA, NESTEROV, DECAY, STEP_TILE, VECTOR,
        )
    # fmt: on


def sgd_step_(*arguments: Any) -> None:
    """Step params and momenta, and write masked weights and norms, in one launch; those of channels in another."""
    step = SgdStep(*arguments)
    step.check()
    sides = [side for side in (step.params, step.grads, step.momenta, step.masked) if len(side)]
    if not any(param.numel() for param in step.params):
        return
    with torch.cuda.device_of(step.params[0]):
        grid = grid_of(*sides, filters=step.layers)
        sgd_step_kernel[(len(grid.lines),)](
            grid.lines,
            grid.addresses,
            step.mask,
            step.filter_decay,
            step.norms,
            step.lr,
            step.grad_scale,
            step.found_inf,
            step.momentum,
            1 - step.dampening,
            step.weight_decay,
            TYPE=TYPES[step.params[0].dtype],
            OUT=TYPES[step.masked[0].dtype] if step.masked else None,
            ORD=step.ord if step.norms is not None and step.layers else 0,
            MOMENTA=(NO_MOMENTUM if step.momentum == 0 else FIRST_STEP if step.first else LATER_STEP).value,
            NESTEROV=step.nesterov,
            DECAY=step.weight_decay != 0 or step.filter_decay is not None,
            MAXIMIZE=step.maximize,
            VECTOR=grid.vector,
            num_warps=WARPS,
            maxnreg=REGISTERS,
        )
        if step.channel_norms is not None and step.weights:
            write_channel_norms(step.weights, step.channel_norms, step.ord)
