"""As much of `torch.cuda` as the bench uses, on the CPU: its rules are kept, and breaking one is an error.

Loaded as a plugin of pytest (`-p fake_cuda`), it makes `--device cuda` such a device, and the networks a tiny one.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import device as devices
import layers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TINY = [(8, 3, 3, 3), (20, 8, 3, 3), (12, 20, 1, 1), (10, 6, 5, 5)]


class FakeEvent:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at: float | None = None
        self.passed = False

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        self.passed = True

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.at is not None, "the first event was not recorded"
        assert end.at is not None, "the second event was not recorded"
        assert end.passed, "nobody waited for the second event"
        return (end.at - self.at) * 1e3


class FakeStream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.waits_for: list[FakeStream] = []

    def wait_stream(self, stream: FakeStream) -> None:
        self.waits_for.append(stream)


class FakeGraph(TorchDispatchMode):
    """Notes every operation within, and repeats them into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        results = function(*args, **(kwargs or {}))
        self.noted.append((function, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        assert self.noted, "nothing was captured"
        for function, args, kwargs, results in self.noted:
            for old, new in zip(tree_leaves(results), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class FakeCuda:
    """The module."""

    Event = FakeEvent
    Stream = FakeStream
    CUDAGraph = FakeGraph

    def __init__(self) -> None:
        self.default = self.current = FakeStream()
        self.entered: list[FakeStream] = []

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(
            name="Fake GPU", major=9, minor=0, multi_processor_count=1, total_memory=2**30, L2_cache_size=2**16
        )

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    def synchronize(self, device: torch.device) -> None: ...

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.entered.append(stream)
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: FakeGraph, stream: FakeStream) -> Iterator[None]:
        assert stream in self.entered, "captured without warm-up on that stream"
        assert stream in self.default.waits_for, "captured before the warm-up was waited for"
        with self.stream(stream), graph:
            yield


class FakeDevice(devices.CudaDevice):
    """The device of the fake module."""

    copy_bytes = 2**16
    matrix_rows = 32

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"), FakeCuda())


@functools.cache
def tiny(name: str) -> layers.Network:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(shape, generator=generator) for shape in TINY]
    scores = torch.cat([weight.abs().mean((1, 2, 3)) for weight in weights])
    return layers.Network(name, weights, scores > scores.sort().values[int(len(scores) * layers.PRUNE_RATE)])


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Take the places of the device and of the networks; compile nothing, which would take minutes."""
    create = devices.create
    devices.create = lambda name: FakeDevice() if name == "cuda" else create(name)
    layers.NAMES, layers.network = ("tiny",), tiny
    torch.compile = functools.partial(torch.compile, backend="eager")
