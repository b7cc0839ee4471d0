"""Covariance of the rows of every 2-D slice of a kernel; contract in fastprune/ops/decorrelation.py.

A task is a block of slices W[o, c] of one layer, side by side. A slice has few elements: what is computed of it is
computed again for the gradient, from memory that is near.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import divide, narrow
from .gram_statistics import kept_filters
from .tables import COLUMNS, FILTERS, FIRST, GRADIENT, SIZE, SIZES, STRIDES, WEIGHT, Call, Layer, Work, place
from .tasks import signal, sum_slots

WARPS = 8
REGISTERS = 168  # of the backward: left alone, ptxas spills a few to keep under 128
SLICES = tl.constexpr(128)
WIDEST = 8  # elements of a row that are worked on at once, at most


@triton.jit
def slices_of(layer, block, mask):
    """Where a block's slices begin, in elements, and which of them are there; whether their filters take part."""
    channels, filters = tl.load(layer + SIZES), tl.load(layer + FILTERS)
    slices = block.to(tl.int64) * SLICES + tl.arange(0, SLICES)
    there = slices < filters * channels
    rows = slices // channels
    kept = there & kept_filters(mask, tl.load(layer + FIRST), rows, filters)
    begins = rows * tl.load(layer + SIZE) + (slices % channels) * tl.load(layer + STRIDES)
    return begins, there, kept


@triton.jit
def row_mean(slices, kept, width, step, A: tl.constexpr, WIDTH: tl.constexpr):
    """The means of a row of every slice."""
    sums = tl.zeros([SLICES], A)
    for begin in range(0, width, WIDTH):
        x = begin + tl.arange(0, WIDTH)[None, :]
        sums += tl.sum(tl.load(slices[:, None] + x * step, mask=kept[:, None] & (x < width), other=0).to(A), 1)
    return divide(sums, width.to(A))


@triton.jit
def centred_row(slices, kept, mean, begin, width, step, A: tl.constexpr, WIDTH: tl.constexpr):
    """Elements of a row of every slice, less its mean; 0 where there are none."""
    x = begin + tl.arange(0, WIDTH)[None, :]
    there = kept[:, None] & (x < width)
    return tl.where(there, tl.load(slices[:, None] + x * step, mask=there, other=0).to(A) - mean[:, None], 0)


@triton.jit
def row_products(left, right, kept, left_mean, right_mean, width, step, A: tl.constexpr, WIDTH: tl.constexpr):
    """Σ_x left[x] · right[x] of two centred rows of every slice."""
    sums = tl.zeros([SLICES], A)
    for begin in range(0, width, WIDTH):
        sums += tl.sum(
            centred_row(left, kept, left_mean, begin, width, step, A, WIDTH)
            * centred_row(right, kept, right_mean, begin, width, step, A, WIDTH),
            1,
        )
    return sums


@triton.jit(do_not_specialize=["tasks_count", "diagonal"])
def kernel_covariance_forward(
    table,  # [layers, COLUMNS]
    tasks,  # [programs]
    tasks_count,
    counters,  # [1], 0: tasks done
    mask,  # [N] or None
    slots,  # [programs], float64: the tasks' shares
    penalty,  # scalar
    diagonal,  # 1 if variances count, else 0
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The penalty of all layers."""
    A: tl.constexpr = penalty.dtype.element_ty
    task = tl.program_id(0)
    index, block, _ = place(tl.load(tasks + task))
    layer = table + index * COLUMNS
    height, width = tl.load(layer + SIZES + 1), tl.load(layer + SIZES + 2)
    down, step = tl.load(layer + STRIDES + 1), tl.load(layer + STRIDES + 2)
    begins, _, kept = slices_of(layer, block, mask)
    weight = tl.load(layer + WEIGHT).to(tl.pointer_type(DTYPE)) + begins
    sums = tl.zeros([SLICES], A)
    for i in range(height):
        mean_i = row_mean(weight + i * down, kept, width, step, A, WIDTH)
        for j in range(i + 1 - diagonal, height):
            mean_j = row_mean(weight + j * down, kept, width, step, A, WIDTH)
            products = row_products(weight + i * down, weight + j * down, kept, mean_i, mean_j, width, step, A, WIDTH)
            sums += tl.abs(products)
    share = tl.sum(sums.to(tl.float64), 0) / (width - 1).to(tl.float64)
    tl.store(slots + task, share)
    if signal(counters) == tasks_count - 1:
        tl.store(penalty, sum_slots(slots, tasks_count))


@triton.jit(do_not_specialize=["diagonal"])
def kernel_covariance_backward(
    table,  # [layers, COLUMNS]
    tasks,  # [programs]
    mask,  # [N] or None
    grad,  # scalar
    gradients,  # all layers' gradients
    diagonal,  # 1 if variances count, else 0
    DTYPE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The gradients of all layers."""
    A: tl.constexpr = grad.dtype.element_ty
    index, block, _ = place(tl.load(tasks + tl.program_id(0)))
    layer = table + index * COLUMNS
    height, width = tl.load(layer + SIZES + 1), tl.load(layer + SIZES + 2)
    down, step = tl.load(layer + STRIDES + 1), tl.load(layer + STRIDES + 2)
    begins, there, kept = slices_of(layer, block, mask)
    kept = kept & (width > 1)
    weight = tl.load(layer + WEIGHT).to(tl.pointer_type(DTYPE)) + begins
    out = gradients + tl.load(layer + GRADIENT) + begins
    factor = tl.load(grad).to(tl.float64) / tl.maximum(width - 1, 1).to(tl.float64)
    for i in range(height):
        mean_i = row_mean(weight + i * down, kept, width, step, A, WIDTH)
        for begin in range(0, width, WIDTH):
            sums = tl.zeros([SLICES, WIDTH], A)
            for j in range(tl.where(width > 1, height, 0)):
                mean_j = row_mean(weight + j * down, kept, width, step, A, WIDTH)
                products = row_products(
                    weight + i * down, weight + j * down, kept, mean_i, mean_j, width, step, A, WIDTH
                )
                twice = tl.where(i == j, 2 * diagonal, 1)
                sign = tl.where(products > 0, twice, tl.where(products < 0, -twice, 0)).to(A)
                sums += sign[:, None] * centred_row(weight + j * down, kept, mean_j, begin, width, step, A, WIDTH)
            x = begin + tl.arange(0, WIDTH)[None, :]
            value = narrow(sums * factor.to(A), DTYPE)
            tl.store(out[:, None] + i * down + x * step, value, mask=there[:, None] & (x < width))


def blocks_of(all_layers: bool, layer: Layer) -> Work:
    """Blocks of slices; of layers with kernels of one column only where their zeros are wanted."""
    blocks = triton.cdiv(layer.filters * layer.sizes[0], SLICES.value)
    return Work(([(i, 0) for i in range(blocks)] if all_layers or layer.sizes[2] > 1 else [],))


forward_work = functools.partial(blocks_of, False)
backward_work = functools.partial(blocks_of, True)


def width_of(call: Call) -> int:
    """Elements of a row that are worked on at once: the widest kernel's, if that is not too many."""
    widest = max((weight.shape[3] for weight in call.weights if weight.dim() == 4), default=1)
    return min(triton.next_power_of_2(widest), WIDEST)


def forward(call: Call, penalty: Tensor) -> None:
    """Launch ``kernel_covariance_forward``; where no layer has what it wants, the penalty is 0."""
    table = call.table(forward_work)
    count = table.phases[-1]
    if count == 0:
        penalty.zero_()
        return
    kernel_covariance_forward[(count,)](
        table.lines,
        table.tasks,
        count,
        call.zeros(1),
        call.kept,
        penalty.new_empty(count, dtype=torch.float64),
        penalty,
        int(call.diagonal),
        DTYPE=call.dtype,
        WIDTH=width_of(call),
        num_warps=WARPS,
    )


def backward(call: Call, grad: Tensor) -> list[Tensor]:
    """Launch ``kernel_covariance_backward``."""
    table = call.table(backward_work)
    flat, gradients = call.gradients(table)
    kernel_covariance_backward[(table.phases[-1],)](
        table.lines,
        table.tasks,
        call.kept,
        grad,
        flat,
        int(call.diagonal),
        DTYPE=call.dtype,
        WIDTH=width_of(call),
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )
    return gradients
