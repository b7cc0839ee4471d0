"""A simulated GPU: how kernels are launched on it, and what the launches cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cuda_kernels as cuda
from ptxrun.module import Module

Fault = tuple[str, str, str]  # (file, text, what it becomes)


@dataclass
class Gpu:
    """One architecture, the options of every launch (orders, `batch`), and what a test changes about it."""

    arch: str
    options: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    capacity: int | None = None  # of layers in a table: None is the launchers' own
    shift: int = 0  # bytes by which results lie beside where an allocator puts them
    stats: list[Any] = field(default_factory=list)  # ptxrun's, one for each launch

    def launch(
        self, loaded: Module, name: str, blocks: Any, threads: Any, args: list[Any], shared: int = 0, **options: Any
    ) -> Any:
        """Run a kernel, looking for everything that is looked for."""
        result = loaded.launch(name, blocks, threads, args, shared, **{**cuda.CHECKS, **options, **self.options})
        self.stats.append(result.stats)
        return result

    @contextmanager
    def cuda(self, source: str) -> Iterator[OnCuda]:
        """The kernels of ``csrc/cuda/<source>.cu``, and memory that is given back afterwards."""
        loaded = cuda.module(source, self.arch, self.fault)
        with cuda.device(loaded) as memory:
            yield OnCuda(self, loaded, memory)


@dataclass(frozen=True)
class OnCuda:
    """What a launcher's shim works with."""

    gpu: Gpu
    loaded: Module
    memory: cuda.Device

    def launch(self, name: str, blocks: Any, threads: Any, args: list[Any], shared: int = 0, **options: Any) -> Any:
        """Run a kernel by an unambiguous part of its name."""
        return self.gpu.launch(self.loaded, name, blocks, threads, args, shared, **options)
