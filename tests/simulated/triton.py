"""Triton without a GPU: its own JIT and launchers, on a driver that executes the compiled PTX on the CPU.

``kernels/<op>.py`` runs as it is. Its tensors lie in one host buffer that is mapped at the device's addresses, so that
``data_ptr()`` is what a kernel may follow, tables of pointers included.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ptxrun
import torch
from ptxrun.memory import GLOBAL_BASE, INIT, Memory
from ptxrun.module import Module
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .gpu import Gpu

CAPACITY = 2 << 30  # bytes of addresses; pages come as they are touched
_SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}  # of a block
_MULTIPROCESSORS = {80: 108, 90: 132}
_UNINITIALISED = {
    "aten::empty",
    "aten::empty_like",
    "aten::new_empty",
    "aten::empty_strided",
    "aten::new_empty_strided",
}


class MappedMemory(Memory):
    """Global memory whose bytes lie in the host at the addresses they have on the device."""

    def _reserve(self, cap: int) -> None:
        assert getattr(self, "data", None) is None, f"a simulated GPU has {CAPACITY >> 20} MB of memory"
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        no_reserve, fixed_no_replace = 0x4000, 0x100000
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve | fixed_no_replace
        address = libc.mmap(GLOBAL_BASE, CAPACITY, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert address == GLOBAL_BASE, f"the host has no room at {GLOBAL_BASE:#x}: errno {ctypes.get_errno()}"
        self.data = np.ctypeslib.as_array((ctypes.c_uint8 * CAPACITY).from_address(address))
        self.flag, self.slow_l, self.slow_s = (np.zeros(CAPACITY, np.uint8) for _ in range(3))
        self.cap = CAPACITY

    def _give_back(self) -> None:
        libc, page = ctypes.CDLL(None), mmap.PAGESIZE
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        above = -(-self.top // page) * page
        assert libc.madvise(GLOBAL_BASE + above, CAPACITY - above, mmap.MADV_DONTNEED) == 0
        for name in ("flag", "slow_l", "slow_s"):
            kept = getattr(self, name)[: self.top].copy()
            setattr(self, name, np.zeros(CAPACITY, np.uint8))
            getattr(self, name)[: self.top] = kept

    def _alloc(self, nbytes: int, shift: int = 0) -> int:
        """As `Memory`, but in the first gap that is large enough: blocks are given back in any order."""
        need = -(-max(nbytes + shift, 1) // 512) * 512 + self.GUARD
        at = self.GUARD
        for offset, size in sorted(self.blocks.items()):
            if offset - at >= need:
                break
            at = -(-(offset + max(size, 1)) // 512) * 512 + self.GUARD
        if at + need > self.top:
            self._bump(at + need - self.top)
        offset = at + shift
        self.data[offset : offset + nbytes] = 0xFF
        self.flag[offset : offset + nbytes] = 1
        self.blocks[offset] = nbytes
        return offset


@functools.cache
def memory() -> MappedMemory:
    """The one such memory of this process."""
    return MappedMemory()


class Resident(TorchDispatchMode):
    """While it is active, tensors that are made lie in the simulated memory; what was never written is known."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, Tensor] = {}  # by the address of the host's

    def put(self, tensor: Any) -> Any:
        """A tensor's copy in the simulated memory, with its strides, its offset and what it shares with others."""
        if not isinstance(tensor, Tensor):
            return tensor
        storage = tensor.untyped_storage()
        key = storage.data_ptr() if storage.nbytes() else id(tensor)
        if key not in self.storages:
            content = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
            self.storages[key] = new_storage(storage.nbytes(), content)
        made = torch.empty(0, dtype=tensor.dtype)
        return made.set_(self.storages[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        blank = func._schema.name in _UNINITIALISED
        if func._schema.is_mutable:
            tree_map(mark_written, (args, kwargs))
        return tree_map(functools.partial(adopt, blank=blank), result)


def new_storage(nbytes: int, content: Tensor | None) -> Tensor:
    """Bytes in the simulated memory, given back when no tensor has them any more."""
    lent = memory()
    address = int(lent.alloc(nbytes))
    offset = address - GLOBAL_BASE
    view = lent.data[offset : offset + nbytes]
    if content is not None:
        view[:] = content.numpy()
        lent.flag[offset : offset + nbytes] |= INIT
    weakref.finalize(view, lent.free, address)
    return torch.from_numpy(view)


def is_resident(tensor: Tensor) -> bool:
    return GLOBAL_BASE <= tensor.untyped_storage().data_ptr() < GLOBAL_BASE + CAPACITY


def adopt(tensor: Any, blank: bool) -> Any:
    """Move a fresh tensor into the simulated memory."""
    if not isinstance(tensor, Tensor) or is_resident(tensor):
        return tensor
    storage = tensor.untyped_storage()
    content = None if blank else torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
    moved = new_storage(storage.nbytes(), content)
    return torch.empty(0, dtype=tensor.dtype).set_(
        moved.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def span(tensor: Tensor) -> tuple[int, int]:
    """Offset and length in the simulated memory of what lies between a tensor's first and last byte."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr() - GLOBAL_BASE, (last + 1) * tensor.element_size()


def mark_written(tensor: Any) -> None:
    if isinstance(tensor, Tensor) and is_resident(tensor):
        offset, length = span(tensor)
        memory().flag[offset : offset + length] |= INIT


def taken_back(tensor: Any) -> Any:
    """A result in ordinary memory; every byte of it must have been written."""
    if not isinstance(tensor, Tensor):
        return tensor
    if is_resident(tensor):
        offset, length = span(tensor)
        missing = memory().unwritten(offset + GLOBAL_BASE, length)
        assert missing == 0, f"{missing} of {length} bytes of a result were not written"
    return tensor.clone()


class Utils:
    """The part of a driver that knows the device and loads what was compiled for it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": _SHARED_MEMORY[self.arch],
            "multiprocessor_count": _MULTIPROCESSORS[self.arch],
            "max_num_regs": 65536,
            "warpSize": 32,
        }

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads


class Driver:
    """A CUDA driver for Triton, of one simulated GPU."""

    def __init__(self, gpu: Gpu) -> None:
        from triton.backends.compiler import GPUTarget

        self.gpu = gpu
        self.arch = int(gpu.arch.removeprefix("sm_"))
        self.target = GPUTarget("cuda", self.arch, 32)
        self.utils = Utils(self.arch)
        self.launcher_cls = functools.partial(Launcher, self)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps compiled kernels by the number of the device

    def get_current_stream(self, device: int) -> int:
        return 0


class Launcher:
    """Launches one compiled kernel."""

    def __init__(self, driver: Driver, source: Any, metadata: Any) -> None:
        from triton.runtime.cache import get_cache_manager

        self.driver, self.metadata = driver, metadata
        self.passed = [kind != "constexpr" for kind in source.signature.values()]
        group = get_cache_manager(metadata.hash).get_group(f"{metadata.name}.json")
        (path,) = (path for name, path in group.items() if name.endswith(".ptx"))
        self.loaded = module(path)

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
        _launch_metadata, _enter, _exit, *args = rest
        values = [self.value(arg) for arg, passed in zip(args, self.passed, strict=True) if passed]
        nbytes = self.metadata.global_scratch_size * x * y * z
        scratch = memory().alloc(nbytes) if nbytes else None
        try:
            threads = 32 * self.metadata.num_warps
            gpu = current(self.driver)
            gpu.launch(
                self.loaded, self.metadata.name, (x, y, z), threads, [*values, scratch, None], self.metadata.shared
            )
        finally:
            if scratch is not None:
                memory().free(scratch)

    @staticmethod
    def value(arg: Any) -> Any:
        if not isinstance(arg, Tensor):
            return arg
        assert arg.numel() == 0 or is_resident(arg), "a kernel was given a tensor that is not on the device"
        return arg.data_ptr()


@functools.cache
def module(path: str) -> Module:
    return ptxrun.load(Path(path).read_text(), memory())


_active: list[Driver] = []


def current(driver: Driver) -> Gpu:
    """The GPU in use now: Triton keeps launchers, and with them the driver of their first use."""
    return _active[-1].gpu if _active else driver.gpu


@contextmanager
def active(gpu: Gpu) -> Iterator[None]:
    """Triton's launches go to the simulated GPU."""
    from triton.runtime import driver

    before = driver._active
    driver.set_active(Driver(gpu))
    _active.append(driver._active)
    try:
        yield
    finally:
        driver._active = before
        _active.pop()


def on(gpu: Gpu, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """An op's Triton implementation as one that takes tensors of the CPU."""
    schema = getattr(torch.ops.fastprune, name).default._schema
    written = [i for i, argument in enumerate(schema.arguments) if argument.is_write]

    def call(*args: Any) -> Any:
        resident = Resident()
        moved = [tree_map(resident.put, arg) for arg in args]
        with active(gpu), resident:
            result = function(*moved)
        for i in written:
            for host, device in zip(tree_leaves(args[i]), tree_leaves(moved[i])):
                if host is not None:
                    host.copy_(device)
        return tree_map(taken_back, result)

    return call
