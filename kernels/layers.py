"""What the kernels share: all layers of a call as one grid, which two tables on the device describe to its programs.

A program works on some rows (filters) of one layer. `lines[program]`, int64, says which, and `addresses[layer]` where:

    lines:     | SIZE elements of a row | ROWS and kind | FIRST filter, -1 if it is none | LAYER | START: element |
    addresses: | of the layer's tensors, one by one |

It reads rows in tiles of `[TILE / width, width]` elements. The width depends on the size of a row alone, so a row's
elements are added up in the same order wherever and however it lies.

The tables are kept (device_tables.py): lines by the sizes of the layers, addresses by the addresses. A step like the
last one copies nothing; another one copies what changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_tables import kept_by_stream, put

WARPS = 8
REGISTERS = 128  # of a thread: two programs on every multiprocessor since sm_80
TILE = tl.constexpr(4096)  # elements that a program holds at once: four vectors of float32 for each thread
NARROW = tl.constexpr(64)  # the width for rows of up to 256 elements
WIDE = tl.constexpr(512)  # and for those of up to 8,192; beyond, a row fills tiles

COLUMNS = tl.constexpr(5)
SIZE = tl.constexpr(0)
ROWS = tl.constexpr(1)  # 8 · rows + 2 · (0 narrow, 1 wide, 2 whole tiles) + 1 if every row starts and ends on a vector
FIRST = tl.constexpr(2)
LAYER = tl.constexpr(3)
START = tl.constexpr(4)

_VECTOR_BYTES = 16  # the widest access of one thread
# A program does a tile at least, and up to so many of them while there are this many programs.
_MOST_TILES = 8
_PROGRAMS = 512
_RUN = 4 * TILE.value  # elements of a "row" of what is no filter

TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def line_of(lines):
    """This program's line."""
    return lines + tl.program_id(0).to(tl.int64) * COLUMNS


@triton.jit
def address_of(line, addresses, INDEX: tl.constexpr, TENSORS: tl.constexpr, TYPE: tl.constexpr):
    """The address of the program's first row in the layer's tensor of that index, int64."""
    start = tl.load(line + START) * (TYPE.primitive_bitwidth // 8)
    return tl.load(addresses + tl.load(line + LAYER) * TENSORS + INDEX) + start


@triton.jit
def aligned_to(address, TYPE: tl.constexpr, VECTOR: tl.constexpr):
    """A pointer to elements of that type, VECTOR of which can be moved at once."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), VECTOR * (TYPE.primitive_bitwidth // 8))


@triton.jit
def whole_vectors(size, VECTOR: tl.constexpr):
    """The size, for the compiler to see that it is a multiple of VECTOR."""
    return size // VECTOR * VECTOR


@triton.jit
def offset(value, WIDTH: tl.constexpr):
    """A size or a count of rows as int32 where no offset within a program is larger: but for the longest rows."""
    return value if WIDTH > WIDE else value.to(tl.int32)


@triton.jit
def widen(values):
    """To the type of arithmetic: float64 for float64, else float32."""
    return values if values.dtype == tl.float64 else values.to(tl.float32)


@triton.jit
def narrow(values, TYPE: tl.constexpr):
    """Rounded to nearest even; float64 goes to 16 bits through float32, as in PyTorch."""
    return values.to(tl.float32).to(TYPE) if TYPE.primitive_bitwidth == 16 else values.to(TYPE)


class Rows(NamedTuple):
    """What of a layer decides how programs share it."""

    rows: int
    size: int
    filters: bool
    aligned: bool


class Grid(NamedTuple):
    """All layers of a call: their tables and the number of programs."""

    lines: Tensor
    addresses: Tensor
    tensors: int  # of each layer
    vector: int  # elements that are loaded and stored at once where rows are aligned


def grid_of(*sides: Sequence[Tensor], filters: int | None = None) -> Grid:
    """The grid over tensors that lie side by side, the first `filters` of them rows of filters (all, if None).

    A side may be shorter than the first: the layers beyond have no such tensor.
    """
    device = sides[0][0].device
    vector = _VECTOR_BYTES // max(side[0].element_size() for side in sides)
    steps = [vector * side[0].element_size() for side in sides]
    rows, addresses = [], []
    for i, tensor in enumerate(sides[0]):
        own = [side[i].data_ptr() if i < len(side) else 0 for side in sides]
        is_filter = filters is None or i < filters
        count = tensor.shape[0] if is_filter else 1
        size = tensor.numel() // count
        aligned = size % vector == 0 and not any(address % step for address, step in zip(own, steps))
        rows.append(Rows(count, size, is_filter, aligned))
        addresses += own
    return Grid(_lines(device, tuple(rows)), _addresses(device, tuple(addresses)), len(sides), vector)


@kept_by_stream(64)
def _addresses(device: torch.device, addresses: tuple[int, ...]) -> Tensor:
    return put(torch.tensor(addresses, dtype=torch.int64), device)


@kept_by_stream(32)
def _lines(device: torch.device, layers: tuple[Rows, ...]) -> Tensor:
    target = sum(layer.rows * layer.size for layer in layers) // _PROGRAMS
    target = min(max(target, TILE.value), _MOST_TILES * TILE.value)
    parts, first = [], 0
    for index, layer in enumerate(layers):
        if layer.filters:
            parts.append(_lines_of(layer, first, index, 0, target))
            first += layer.rows
        elif layer.size:
            runs, rest = divmod(layer.size, _RUN)
            for count, size, start in ((runs, _RUN, 0), (1, rest, runs * _RUN)):
                if count * size:
                    parts.append(_lines_of(layer._replace(rows=count, size=size), -1, index, start, target))
    return put(torch.cat(parts) if parts else torch.empty(0, COLUMNS.value, dtype=torch.int64), device)


def _lines_of(layer: Rows, first: int, index: int, start: int, target: int) -> Tensor:
    """The lines of the programs that share a layer's rows, about `target` elements to each."""
    kind, width = (0, NARROW.value) if layer.size <= 256 else (1, WIDE.value) if layer.size <= 8192 else (2, TILE.value)
    tile = TILE.value // width
    each = tile * max(1, target // (tile * layer.size))
    begin = torch.arange(0, layer.rows, each)
    lines = torch.empty(len(begin), COLUMNS.value, dtype=torch.int64)
    lines[:, SIZE.value] = layer.size
    lines[:, ROWS.value] = 8 * (layer.rows - begin).clamp(max=each) + 2 * kind + layer.aligned
    lines[:, FIRST.value] = first + begin if layer.filters else -1
    lines[:, LAYER.value] = index
    lines[:, START.value] = start + begin * layer.size
    return lines
