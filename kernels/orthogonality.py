"""σ² of A = WᵀW − I by one power iteration; contract in fastprune/ops/decorrelation.py.

R = ‖b‖² / ‖a‖² with a = A u, b = A a. A is never formed: A x = Wᵀ (W x) − x takes two phases, products of blocks of
filters with x, then of blocks of elements with what came out. The tasks of all layers' first phase come first, then
those of the second, and so on; each waits until its layer's phase before is done. Vectors lie in memory's order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import narrow
from .gram_statistics import kept_filters
from .tables import (
    COEFFICIENTS,
    COLUMNS,
    FILTERS,
    FIRST,
    GRADIENT,
    SIZE,
    SIZES,
    SLOT,
    STRIDES,
    WEIGHT,
    Call,
    Layer,
    Work,
    place,
)
from .tasks import signal, sum_slots, take, wait

WARPS = 8
REGISTERS = 128  # of the forward: left alone, ptxas spills a few to keep under 64
# Filters and elements of a task; the other dimension is gone through in steps of the other's size.
ROWS = tl.constexpr(16)
SPAN = tl.constexpr(128)
RATIO = tl.constexpr((5**0.5 - 1) / 2)


@triton.jit
def start(layer, k):
    """u₀ at places k of memory: frac((i + 1) / φ) − 1/2 for the index i that is stored there."""
    index = tl.zeros_like(k)
    for d in tl.static_range(3):
        size, stride = tl.load(layer + SIZES + d), tl.load(layer + STRIDES + d)
        index = index * size + (k // stride) % size
    steps = (index + 1).to(tl.float64) * RATIO
    return steps - tl.floor(steps) - 0.5


@triton.jit
def weight_tile(layer, rows, k, kept, DTYPE: tl.constexpr, A: tl.constexpr):
    """W[rows, k], 0 for filters that take no part."""
    weight, size = tl.load(layer + WEIGHT).to(tl.pointer_type(DTYPE)), tl.load(layer + SIZE)
    there = kept[:, None] & (k < size)[None, :]
    return tl.load(weight + rows.to(tl.int64)[:, None] * size + k[None, :], mask=there, other=0).to(A)


@triton.jit
def rows_of(layer, block, mask):
    """A block of filters, and which of them take part."""
    rows = block * ROWS + tl.arange(0, ROWS)
    return rows, kept_filters(mask, tl.load(layer + FIRST), rows, tl.load(layer + FILTERS))


@triton.jit
def times_weight(layer, block, mask, x, out, scale, START: tl.constexpr, DTYPE: tl.constexpr):
    """out[rows of the block] = scale · W x, x the vector in memory or the start."""
    A: tl.constexpr = out.dtype.element_ty
    size = tl.load(layer + SIZE)
    rows, kept = rows_of(layer, block, mask)
    sums = tl.zeros([ROWS, SPAN], A)
    for begin in range(0, size, SPAN):
        k = begin + tl.arange(0, SPAN)
        vector = start(layer, k).to(A) if START else tl.load(x + k, mask=k < size, other=0)
        sums += weight_tile(layer, rows, k, kept, DTYPE, A) * vector[None, :]
    tl.store(out + rows, tl.sum(sums, 1) * scale, mask=rows < tl.load(layer + FILTERS))


@triton.jit
def times_transposed(layer, block, mask, y, DTYPE: tl.constexpr):
    """(Wᵀ y)[elements of the block], and which elements these are."""
    k = block * SPAN + tl.arange(0, SPAN)
    filters = tl.load(layer + FILTERS)
    sums = tl.zeros([ROWS, SPAN], y.dtype.element_ty)
    for step in range(tl.cdiv(filters, ROWS)):
        rows, kept = rows_of(layer, step, mask)
        vector = tl.load(y + rows, mask=rows < filters, other=0)
        sums += weight_tile(layer, rows, k, kept, DTYPE, y.dtype.element_ty) * vector[:, None]
    return tl.sum(sums, 0), k


@triton.jit
def square_norm(x, size):
    """‖x‖², float64."""
    sums = tl.zeros([SPAN], tl.float64)
    for begin in range(0, size, SPAN):
        k = begin + tl.arange(0, SPAN)
        value = tl.load(x + k, mask=k < size, other=0).to(tl.float64)
        sums += value * value
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["phase_1", "phase_2", "phase_3", "layers"])
def orthogonality_forward(
    table,  # [layers, COLUMNS]
    tasks,  # [programs]
    phase_1,  # where the tasks of the phases end
    phase_2,
    phase_3,
    layers,
    counters,  # [2 + layers], 0: tasks taken, layers done; tasks done of each layer
    mask,  # [N] or None
    products,  # [N]: W u, then W a
    more_products,  # [N]
    slots,  # [layers], float64
    coefficients,  # a[K], b[K] of each layer
    penalty,  # scalar
    DTYPE: tl.constexpr,
):
    """The penalty of all layers, and the vectors a and b."""
    task = take(counters)
    index, block, _ = place(tl.load(tasks + task))
    layer = table + index * COLUMNS
    done = counters + 2 + index
    size, first = tl.load(layer + SIZE), tl.load(layer + FIRST)
    row_tasks, column_tasks = tl.cdiv(tl.load(layer + FILTERS), ROWS), tl.cdiv(size, SPAN)
    a = coefficients + tl.load(layer + COEFFICIENTS)
    b = a + size
    if task < phase_1:
        times_weight(layer, block, mask, a, products + first, 1, True, DTYPE)
        signal(done)
    elif task < phase_2:
        wait(done, row_tasks)
        sums, k = times_transposed(layer, block, mask, products + first, DTYPE)
        tl.store(a + k, sums - start(layer, k).to(sums.dtype), mask=k < size)
        signal(done)
    elif task < phase_3:
        wait(done, row_tasks + column_tasks)
        times_weight(layer, block, mask, a, more_products + first, 1, False, DTYPE)
        signal(done)
    else:
        wait(done, 2 * row_tasks + column_tasks)
        sums, k = times_transposed(layer, block, mask, more_products + first, DTYPE)
        tl.store(b + k, sums - tl.load(a + k, mask=k < size, other=0), mask=k < size)
        if signal(done) == 2 * (row_tasks + column_tasks) - 1:
            aa = square_norm(a, size)
            tl.store(slots + index, tl.where(aa > 0, square_norm(b, size) / tl.where(aa > 0, aa, 1), 0))
            if signal(counters + 1) == layers - 1:
                tl.store(penalty, sum_slots(slots, layers))


@triton.jit
def gradient_rows(layer, block, mask, a, b, da, out, twice, grad, DTYPE: tl.constexpr):
    """grad · Σ (W x) yᵀ over the pairs (db, a), (a, db), (da, u), (u, da), db = twice · b, for a block of filters."""
    A: tl.constexpr = da.dtype.element_ty
    size = tl.load(layer + SIZE)
    rows, kept = rows_of(layer, block, mask)
    w_a, w_b = tl.zeros([ROWS, SPAN], A), tl.zeros([ROWS, SPAN], A)
    w_da, w_u = tl.zeros([ROWS, SPAN], A), tl.zeros([ROWS, SPAN], A)
    for begin in range(0, size, SPAN):
        k = begin + tl.arange(0, SPAN)
        w = weight_tile(layer, rows, k, kept, DTYPE, A)
        w_a += w * tl.load(a + k, mask=k < size, other=0)[None, :]
        w_b += w * tl.load(b + k, mask=k < size, other=0)[None, :]
        w_da += w * tl.load(da + k, mask=k < size, other=0)[None, :]
        w_u += w * start(layer, k).to(A)[None, :]
    of_a, of_db = tl.sum(w_b, 1)[:, None] * (twice * grad), tl.sum(w_a, 1)[:, None] * grad
    of_u, of_da = tl.sum(w_da, 1)[:, None] * grad, tl.sum(w_u, 1)[:, None] * grad
    for begin in range(0, size, SPAN):
        k = begin + tl.arange(0, SPAN)
        value = of_a * tl.load(a + k, mask=k < size, other=0)[None, :]
        value += of_db * (twice * tl.load(b + k, mask=k < size, other=0))[None, :]
        value += of_u * start(layer, k).to(A)[None, :]
        value += of_da * tl.load(da + k, mask=k < size, other=0)[None, :]
        there = (rows < tl.load(layer + FILTERS))[:, None] & (k < size)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * size + k[None, :], narrow(value, DTYPE), mask=there)


@triton.jit(do_not_specialize=["phase_1", "phase_2"])
def orthogonality_backward(
    table,  # [layers, COLUMNS]
    tasks,  # [programs]
    phase_1,  # where the tasks of the phases end
    phase_2,
    counters,  # [1 + layers], 0: tasks taken; tasks done of each layer
    mask,  # [N] or None
    products,  # [N]: W ∂b
    slopes,  # ∂a[K] of each layer, where its slots begin
    grad,  # scalar
    coefficients,  # a[K], b[K] of each layer
    gradients,  # all layers' gradients
    DTYPE: tl.constexpr,
):
    """The gradients of all layers: from ∂b = 2 b / ‖a‖² to ∂a = A ∂b − 2 (‖b‖ / ‖a‖²)² a, then to ∂W."""
    task = take(counters)
    index, block, _ = place(tl.load(tasks + task))
    layer = table + index * COLUMNS
    done = counters + 1 + index
    size, first = tl.load(layer + SIZE), tl.load(layer + FIRST)
    row_tasks, column_tasks = tl.cdiv(tl.load(layer + FILTERS), ROWS), tl.cdiv(size, SPAN)
    a, da = coefficients + tl.load(layer + COEFFICIENTS), slopes + tl.load(layer + SLOT)
    b = a + size
    aa = square_norm(a, size)
    aa = tl.where(aa > 0, aa, float("inf"))
    twice = (2 / aa).to(slopes.dtype.element_ty)
    if task < phase_1:
        times_weight(layer, block, mask, b, products + first, twice, False, DTYPE)
        signal(done)
    elif task < phase_2:
        wait(done, row_tasks)
        sums, k = times_transposed(layer, block, mask, products + first, DTYPE)
        there = k < size
        ratio = (2 * (square_norm(b, size) / aa) / aa).to(sums.dtype)
        own = twice * tl.load(b + k, mask=there, other=0) + ratio * tl.load(a + k, mask=there, other=0)
        tl.store(da + k, sums - own, mask=there)
        signal(done)
    else:
        wait(done, row_tasks + column_tasks)
        out = gradients + tl.load(layer + GRADIENT)
        gradient_rows(layer, block, mask, a, b, da, out, twice, tl.load(grad), DTYPE)


def blocks(layer: Layer) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Tasks of blocks of filters, and of blocks of elements."""
    rows = [(i, 0) for i in range(triton.cdiv(layer.filters, ROWS.value))]
    return rows, [(i, 0) for i in range(triton.cdiv(layer.size, SPAN.value))]


def forward_work(layer: Layer) -> Work:
    """W u, a = Wᵀ (W u) − u, W a, b = Wᵀ (W a) − a."""
    rows, columns = blocks(layer)
    return Work((rows, columns, rows, columns), 2 * layer.size)


def backward_work(layer: Layer) -> Work:
    """W ∂b, ∂a, ∂W; slots for ∂a."""
    rows, columns = blocks(layer)
    return Work((rows, columns, rows), 2 * layer.size, layer.size)


def forward(call: Call, coefficients: Tensor, penalty: Tensor) -> None:
    """Launch ``orthogonality_forward``."""
    table = call.table(forward_work)
    layers = len(call.weights)
    products = penalty.new_empty(2, call.filters)
    orthogonality_forward[(table.phases[-1],)](
        table.lines,
        table.tasks,
        *table.phases[:3],
        layers,
        call.zeros(2 + layers),
        call.kept,
        *products,
        penalty.new_empty(layers, dtype=torch.float64),
        coefficients,
        penalty,
        DTYPE=call.dtype,
        num_warps=WARPS,
        maxnreg=REGISTERS,
    )


def backward(call: Call, grad: Tensor, coefficients: Tensor) -> list[Tensor]:
    """Launch ``orthogonality_backward``."""
    table = call.table(backward_work)
    flat, gradients = call.gradients(table)
    orthogonality_backward[(table.phases[-1],)](
        table.lines,
        table.tasks,
        *table.phases[:2],
        call.zeros(1 + len(call.weights)),
        call.kept,
        grad.new_empty(call.filters),
        grad.new_empty(table.slots),
        grad,
        coefficients,
        flat,
        DTYPE=call.dtype,
        num_warps=WARPS,
    )
    return gradients
