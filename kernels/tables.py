"""The layers of a call and the tasks on them as one tensor on the device, made once for the same tensors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_tables import kept_by_stream, put

# Columns of a layer's line, int64.
WEIGHT = tl.constexpr(0)  # address
GRADIENT = tl.constexpr(1)  # where its gradient begins among those of all layers, in elements
FILTERS = tl.constexpr(2)  # F
SIZE = tl.constexpr(3)  # K
FIRST = tl.constexpr(4)  # index of its first filter among all
COEFFICIENTS = tl.constexpr(5)  # where they begin among those of all layers
SLOT = tl.constexpr(6)  # where its partial results begin
TASKS = tl.constexpr(7)  # how many tasks make partial results
TILE = tl.constexpr(8)  # the side of its tiles
SIZES = tl.constexpr(9)  # C, kh, kw; K, 1, 1 where a weight has not four dimensions
STRIDES = tl.constexpr(12)  # of the same
COLUMNS = tl.constexpr(15)

# A task: the layer's index, and two indices of that many bits within it.
BITS = tl.constexpr(20)
BELOW = tl.constexpr(2**20 - 1)
ALIGNMENT = 16  # elements to which gradients are aligned

Pairs = Sequence[tuple[int, int]]


@triton.jit
def place(task):
    """The layer and the two indices of a task."""
    return task >> (2 * BITS), ((task >> BITS) & BELOW).to(tl.int32), (task & BELOW).to(tl.int32)


@dataclass(frozen=True)
class Layer:
    """A weight as the kernels see it."""

    address: int
    filters: int
    size: int
    element_size: int
    aligned: bool  # whether every filter begins and ends on a vector of 16 bytes
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Work:
    """What a kind makes of one layer: coefficients, slots for partial results, and tasks in phases."""

    phases: Sequence[Pairs]
    coefficients: int = 0
    slots: int = 0
    sharing: int = 0  # tasks that make partial results
    tile: int = 0


@dataclass(frozen=True)
class Table:
    """The lines of the layers, and the tasks: all of the first phase, all of the second, ..."""

    lines: Tensor
    tasks: Tensor
    phases: tuple[int, ...]  # how many tasks there are up to the end of each
    slots: int  # one for each layer, then those of the partial results
    tile: int  # the largest
    gradients: tuple[int, ...]  # where each layer's begins, and the end


# What tells one weight from another: address, shape, strides.
Key = tuple[int, torch.Size, tuple[int, ...]]


def layer_of(key: Key, element_size: int) -> Layer:
    """The layer of a weight."""
    address, shape, strides = key
    size = shape[1:].numel()
    four = len(shape) == 4
    sizes = shape[1:] if four else (size, 1, 1)
    # A stride that nothing is multiplied by may be anything.
    steps = tuple(stride if count > 1 else 1 for count, stride in zip(sizes, strides[1:] if four else (1, 1, 1)))
    aligned = address % 16 == 0 and size * element_size % 16 == 0
    return Layer(address, shape[0], size, element_size, aligned, sizes, steps)


@kept_by_stream(64)
def table_of(device: torch.device, keys: tuple[Key, ...], element_size: int, work: Callable[[Layer], Work]) -> Table:
    """The table of weights for what ``work`` makes of each."""
    lines: list[int] = []
    phases: list[list[int]] = []
    gradients, first, coefficients, slots, tile = [0], 0, 0, len(keys), 0
    for index, key in enumerate(keys):
        layer = layer_of(key, element_size)
        made = work(layer)
        lines += (layer.address, gradients[-1], layer.filters, layer.size, first, coefficients)
        lines += (slots, made.sharing, made.tile, *layer.sizes, *layer.strides)
        for phase, tasks in enumerate(made.phases):
            if phase == len(phases):
                phases.append([])
            phases[phase] += [(index << 2 * BITS.value) + (i << BITS.value) + j for i, j in tasks]
        gradients.append(gradients[-1] + -(-layer.filters * layer.size // ALIGNMENT) * ALIGNMENT)
        first, coefficients, slots = first + layer.filters, coefficients + made.coefficients, slots + made.slots
        tile = max(tile, made.tile)
    flat = put(torch.tensor(lines + [task for phase in phases for task in phase], dtype=torch.int64), device)
    ends = tuple(itertools.accumulate(map(len, phases)))
    return Table(flat[: len(lines)], flat[len(lines) :], ends, slots, tile, tuple(gradients))


@dataclass(frozen=True)
class Call:
    """The arguments of the op."""

    weights: Sequence[Tensor]
    kind: str
    diagonal: bool
    mask: Tensor | None
    precision: str

    def table(self, work: Callable[[Layer], Work]) -> Table:
        """Of its weights."""
        keys = tuple((weight.data_ptr(), weight.shape, weight.stride()) for weight in self.weights)
        return table_of(self.weights[0].device, keys, self.weights[0].element_size(), work)

    @property
    def kept(self) -> Tensor | None:
        """The mask as bytes."""
        return None if self.mask is None else self.mask.view(torch.uint8)

    @property
    def dtype(self) -> tl.dtype:
        """Triton's name for the dtype of the weights."""
        return getattr(tl, str(self.weights[0].dtype).removeprefix("torch."))

    @property
    def filters(self) -> int:
        """N."""
        return sum(weight.shape[0] for weight in self.weights)

    def zeros(self, count: int) -> Tensor:
        """Counters."""
        return self.weights[0].new_zeros(count, dtype=torch.int32)

    def gradients(self, table: Table) -> tuple[Tensor, list[Tensor]]:
        """Room for all gradients, and each layer's part of it with the layout of its weight."""
        flat = self.weights[0].new_empty(table.gradients[-1])
        parts = [
            flat.as_strided(weight.shape, weight.stride(), begin)
            for weight, begin in zip(self.weights, table.gradients)
        ]
        return flat, parts
