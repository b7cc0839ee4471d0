"""The CUDA kernels without a GPU: their PTX, executed on the CPU, launched with the launchers' own arithmetic.

The sources are compiled as they are, by nvcc; grids and tables of layers come from ``csrc/cuda/plan.h``, compiled into
a small library. What is compiled is kept in the system's folder for temporary files, by the hash of its sources.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ptxrun
import pytest
import torch
from ptxrun import NVCC, DevPtr
from ptxrun.module import Module
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90")
BUILT_FROM = "sm_80"  # the architecture whose PTX setup.py makes all code of
FLAGS = ("-O3", "-std=c++20", "-lineinfo")

# Everything that is looked for; launches of the ops are deterministic, so any of these orders must give the same bits.
CHECKS: dict[str, Any] = {"race": True, "race_global": "strict"}
# For counting the bytes of a whole ResNet-50, in which looking for races would take 60 bytes of the host for each
# element; races are looked for in all other tests, ResNet-56 among them.
COUNTING: dict[str, Any] = {"race": False, "race_global": False}
# Tests that run on both architectures, the second with the slow tests.
EITHER = pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
ORDERS: tuple[dict[str, Any], ...] = (
    {},
    {"block_order": "reverse", "atomic_order": "reverse", "batch": 1},
    {"block_order": "random", "atomic_order": "random", "batch": 3, "seed": 5},
)

_TYPES = {torch.float32: "f", torch.float64: "d", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}


def _cache(key: str, suffix: str, make: Any) -> Path:
    """The file that ``make(path)`` writes, made once for the key."""
    folder = Path(tempfile.gettempdir()) / f"fastprune-gpu-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            make(made)
            # Another process may have been first, and be reading: names of kernels differ from one to the next.
            with suppress(FileExistsError):
                os.link(made, path)
    return path


def _run(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
    return done.stdout + done.stderr


@functools.cache
def _nvcc_version() -> str:
    assert NVCC, "the tests of the CUDA kernels need nvcc: on the PATH, or from pip install '.[gpu-tests]'"
    return _run([NVCC, "--version"])


def _sources() -> dict[str, str]:
    paths = [*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.*")]
    return {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)}


def compile_ptx(op: str, arch: str, fault: tuple[str, str, str] | None = None) -> Path:
    """The PTX of ``csrc/cuda/<op>.cu``; with a fault ``(file, old, new)`` planted in a copy of the sources."""
    sources = _sources()
    if fault is not None:
        file, old, new = fault
        name = f"csrc/cuda/{file}"
        assert sources[name].count(old) == 1, f"{old!r} is there {sources[name].count(old)} times in {file}, not once"
        sources[name] = sources[name].replace(old, new)

    def make(path: Path) -> None:
        for name, text in sources.items():
            source = path.parent / name
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(text)
        source = path.parent / f"csrc/cuda/{op}.cu"
        _run([NVCC, "-ptx", f"-arch={arch}", *FLAGS, "-o", path, source])

    return _cache(f"{op} {arch} {_nvcc_version()} {sources}", ".ptx", make)


@functools.cache
def module(op: str, arch: str, fault: tuple[str, str, str] | None = None) -> Module:
    """The kernels of an op, ready to launch."""
    return ptxrun.load(compile_ptx(op, arch, fault).read_text())


def kernel(loaded: Module, name: str, dtypes: Sequence[torch.dtype]) -> str:
    """The mangled name of one instance of a kernel, by its types."""
    first, *others = (_TYPES[dtype] for dtype in dtypes)
    arguments = first + "".join(rf"(?:{other}|S\d*_)" if other == first else other for other in others)
    (found,) = (entry for entry in loaded.kernels if re.search(rf"{name}I{arguments}E", entry))
    return found


@dataclass(frozen=True)
class Budget:
    """What ptxas gave a kernel, and the PTX it was made from."""

    registers: int
    shared_bytes: int
    local_bytes: int  # stack and spills
    ptx: str


def budget(op: str, arch: str) -> dict[str, Budget]:
    """The resources of every kernel of an op, by its mangled name."""
    path = compile_ptx(op, BUILT_FROM)
    with tempfile.TemporaryDirectory() as scratch:
        report = _run([NVCC, "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o", f"{scratch}/kernels.cubin", path])
    bodies = re.findall(r"^(?:\.visible )?\.entry (\w+)(.*?)^}", path.read_text(), re.MULTILINE | re.DOTALL)
    budgets = {}
    for name, ptx in bodies:
        (part,) = re.findall(rf"entry function '{name}'(.*?)(?=entry function|\Z)", report, re.DOTALL)
        local = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)))
        registers, shared = (re.search(pattern, part) for pattern in (r"Used (\d+) registers", r"(\d+) bytes smem"))
        assert registers, report
        budgets[name] = Budget(int(registers[1]), int(shared[1]) if shared else 0, local, ptx)
    return budgets


def wide(ptx: str, instruction: str) -> list[str]:
    """The accesses of 16 bytes among a kernel's loads or stores."""
    return re.findall(rf"\b{re.escape(instruction)}\.(?:v4\.\w32|v2\.\w64)\b", ptx)


class _Run(ctypes.Structure):
    _fields_ = [
        ("pointers", ctypes.c_void_p * 4),
        ("filters", ctypes.c_int64),
        ("size", ctypes.c_int64),
    ]


@functools.cache
def host() -> ctypes.CDLL:
    """The launchers' host arithmetic."""
    source = ROOT / "tests" / "cuda_plan.cpp"

    def make(path: Path) -> None:
        compiler = os.environ.get("CXX", "c++")
        _run([compiler, "-O1", "-std=c++20", "-Wall", "-Werror", "-shared", "-fPIC", "-o", path, source])

    key = source.read_text() + _sources()["csrc/cuda/plan.h"]
    library = ctypes.CDLL(str(_cache(key, ".so", make)))
    pointer, i64, i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name, result, arguments in (
        ("plan", pointer, (pointer, i64, i64, i32, ctypes.c_char_p)),
        ("free_plan", None, (pointer,)),
        ("filters", i64, (pointer,)),
        ("blocks", i64, (pointer,)),
        ("launches", i64, (pointer,)),
        ("launch_blocks", i64, (pointer, i64)),
        ("table", i64, (pointer, i64, pointer)),
        ("rank_of", i64, (i64, ctypes.c_double)),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@dataclass(frozen=True)
class Grid:
    """One launch: its blocks, and its table of layers as the kernel's parameter."""

    blocks: int
    table: bytes


@dataclass(frozen=True)
class Plan:
    """The launches of a call."""

    grids: list[Grid]
    filters: int
    blocks: int


def plan(runs: Sequence[tuple[int, ...]], in_bytes: int, out_bytes: int, capacity: int | None = None) -> Plan:
    """Lay out layers of (an address or 0 for each of up to four tensors, filters, size).

    ``in_bytes`` and ``out_bytes`` are of the elements that a vector is made of, the wider ones; ``capacity`` shrinks
    the table.
    """
    library, error = host(), ctypes.create_string_buffer(256)
    pointers = ctypes.c_void_p * 4
    array = (_Run * len(runs))(*(_Run(pointers(*run[:-2]), *run[-2:]) for run in runs))
    made = library.plan(array, len(runs), max(in_bytes, out_bytes), capacity or library.capacity(), error)
    if made is None:
        raise RuntimeError(error.value.decode())
    grids = []
    for i in range(library.launches(made)):
        table = ctypes.create_string_buffer(library.table(made, i, None))
        library.table(made, i, table)
        grids.append(Grid(library.launch_blocks(made, i), table.raw))
    result = Plan(grids, library.filters(made), library.blocks(made))
    library.free_plan(made)
    return result


def in_memory_order(tensor: Tensor) -> Tensor:
    """A filter-major tensor's elements as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


class Device:
    """The simulated memory of a module, while tensors are on it."""

    def __init__(self, loaded: Module) -> None:
        self.memory = loaded.mem
        self.pointers: list[DevPtr] = []

    def put(self, tensor: Tensor) -> DevPtr:
        """Copy a dense tensor; it keeps its offset in its storage, and so its misalignment."""
        shift = tensor.storage_offset() * tensor.element_size() % 512
        return self._keep(self.memory.alloc(in_memory_order(tensor), shift=shift))

    def empty(self, nbytes: int, shift: int = 0) -> DevPtr:
        """Bytes that must be written before they are read."""
        return self._keep(self.memory.alloc(nbytes, shift=shift))

    def _keep(self, pointer: DevPtr) -> DevPtr:
        self.pointers.append(pointer)
        return pointer

    def get(self, pointer: DevPtr, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor with the shape and strides of ``like``, every byte of which was written."""
        missing = self.memory.unwritten(pointer, pointer.nbytes)
        assert missing == 0, f"{missing} of {pointer.nbytes} bytes were not written"
        flat = torch.from_numpy(pointer.read()).view(dtype)
        return flat.as_strided(like.shape, like.stride())


@contextmanager
def device(loaded: Module) -> Iterator[Device]:
    """Memory that is given back afterwards."""
    lent = Device(loaded)
    try:
        yield lent
    finally:
        for pointer in reversed(lent.pointers):
            loaded.mem.free(pointer)
