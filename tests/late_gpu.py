"""A GPU that is late, made of CPU memory: work waits in its stream or graph; freed memory is used again at once.

What a table needs of a GPU is all there is: int64 tensors of ``torch.device("cuda", 0)``, made by PyTorch, which are
written by copies and by operations in place, and read by `LateGpu.read` as a kernel would, by their address.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
GARBAGE = -7777777
WORDS = 1 << 20

Job = Callable[[], Any]


class LateGraph:
    """What was captured, and the memory that it had to be given."""

    def __init__(self, gpu: LateGpu) -> None:
        self.gpu = gpu
        self.jobs: list[Job] = []

    def replay(self) -> None:
        for job in self.jobs:
            self.gpu.queue(job)

    def reset(self) -> None:
        """Give its memory back, but for tensors in it that somebody still has."""
        self.jobs.clear()
        del self.gpu.free[self]


class LateGpu(TorchDispatchMode):
    """While it is active, what PyTorch is asked to do on the device is done when `synchronize` is called."""

    name = torch.device("cuda", 0)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.memory = np.full(WORDS, GARBAGE, np.int64)
        self.top = 0
        # By graph or stream: freed blocks by their size, and the words of those in use.
        self.free: dict[Hashable, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.in_use: Counter[Hashable] = Counter()
        self.streams: dict[int, list[Job]] = defaultdict(list)
        self.stream = 1
        self.graph: LateGraph | None = None
        self.working = False
        self.pinned_in_captures = 0
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.graph is not None)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=self.stream))

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    @contextmanager
    def capture(self) -> Iterator[LateGraph]:
        self.graph = LateGraph(self)
        yield self.graph
        self.graph = None

    def queue(self, job: Job) -> None:
        (self.graph.jobs if self.graph else self.streams[self.stream]).append(job)

    def synchronize(self) -> None:
        """Do what waits in the current stream, and in no other."""
        jobs, self.working = self.streams.pop(self.stream, []), True
        for job in jobs:
            job()
        self.working = False

    def read(self, *tables: Tensor) -> list[int]:
        """What a kernel that is launched now finds in the tables; filled when it runs, each time anew."""
        found: list[int] = []
        there = [self.at(table) for table in tables]
        self.queue(lambda: found.__setitem__(slice(None), [x for table in there for x in table.flatten().tolist()]))
        return found

    def at(self, tensor: Any) -> Any:
        """Another tensor of the same memory, which does not keep it from being freed."""
        if not self.holds(tensor):
            return tensor
        start = (tensor.data_ptr() - self.memory.ctypes.data) // 8
        return torch.from_numpy(self.memory[start:]).as_strided(tensor.shape, tensor.stride())

    def holds(self, tensor: Any) -> bool:
        begin = self.memory.ctypes.data
        return isinstance(tensor, Tensor) and begin <= tensor.data_ptr() < begin + self.memory.nbytes

    def empty(self, shape: torch.Size) -> Tensor:
        pool: Hashable = self.graph or self.stream
        words = math.prod(shape)
        freed = self.free[pool][words]
        if freed:
            start = freed.pop()
        else:
            start, self.top = self.top, self.top + words
            assert self.top <= WORDS, "the fake GPU is out of memory"
        block, own = self.memory[start : start + words], self.memory[start : start + words]
        self.in_use[pool] += words
        weakref.finalize(block, self.give_back, pool, start, words)
        self.queue(lambda: own.fill(GARBAGE))
        return torch.from_numpy(block).view(shape)

    def give_back(self, pool: Hashable, start: int, words: int) -> None:
        self.in_use[pool] -= words
        self.free[pool][words].append(start)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.working:
            return func(*args, **kwargs)
        if func is aten._pin_memory.default:
            self.pinned_in_captures += self.graph is not None
            return args[0].clone()
        if kwargs.get("device") == self.name:
            made = self.empty(args[0].shape)
            there, host = self.at(made), args[0] if func is aten._to_copy.default else torch.zeros_like(args[0])
            self.queue(lambda: there.copy_(host))
            return made
        if func._schema.is_mutable and any(map(self.holds, tree_leaves(args))):
            aliases = tree_map(self.at, args)
            self.queue(lambda: func(*aliases, **kwargs))
            return None
        return func(*args, **kwargs)
