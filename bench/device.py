"""Where the bench runs: how tensors get there, how time is taken, and how a call becomes a CUDA graph."""

from __future__ import annotations

import os
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fastprune import ops

Call = Callable[[], Any]


class Device(ABC):
    """One processor."""

    name: torch.device
    modes: tuple[str, ...] = ("eager",)  # how a call can be made: as it is, or replayed from a `graph`

    @abstractmethod
    def timer(self) -> Any:
        """A point in time; the difference of two is in seconds."""

    @abstractmethod
    def flush(self) -> None:
        """Drop what the caches hold."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for all that was begun."""

    @abstractmethod
    def stream(self) -> AbstractContextManager[Any]:
        """A queue of its own for what is begun within."""

    @abstractmethod
    def capture(self, call: Call) -> Call:
        """A call that repeats what this one did, on the same memory, and returns the same tensors."""

    @abstractmethod
    def __str__(self) -> str:
        """What it is, for reports."""

    def seconds(self, call: Call) -> float:
        """What one call takes."""
        self.flush()
        start = self.timer()
        call()
        return self.timer() - start


class CpuDevice(Device):
    """The CPU: calls return when they are done."""

    name = torch.device("cpu")
    timer = staticmethod(time.perf_counter)

    def flush(self) -> None:
        """Leave them: timings on the CPU are of data as the last call left it."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def capture(self, call: Call) -> Call:
        return call

    def __str__(self) -> str:
        cpu = platform.processor() or platform.machine()
        info = Path("/proc/cpuinfo")
        if info.exists():
            names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
            cpu = names[0] if names else cpu
        return (
            f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"backend {ops.get_backend()}, instruction set {ops.cpu_isa()}, load {os.getloadavg()[0]:.1f} "
            f"(times are of use only where nothing else runs)"
        )


class CudaDevice(Device):
    """A GPU: calls only queue work, so time is taken by events in the queue itself."""

    modes = ("eager", "graph")
    copy_bytes = 2**30  # of the copy that bandwidth is measured with: far larger than any L2
    matrix_rows = 8192  # of the products that arithmetic is measured with
    warmup_calls = 3

    def __init__(self, name: torch.device, cuda: Any = torch.cuda) -> None:
        self.name = name
        self.cuda = cuda
        self.properties = cuda.get_device_properties(name)
        # Twice the L2, of which a GPU may keep some lines whatever is written.
        self._flushed = torch.empty(2 * self.properties.L2_cache_size, dtype=torch.int8, device=name)

    def timer(self) -> Instant:
        return Instant(self.cuda)

    def flush(self) -> None:
        """Write more than L2 holds. It takes long enough that what is queued behind it is queued before it ends."""
        self._flushed.zero_()

    def synchronize(self) -> None:
        self.cuda.synchronize(self.name)

    def stream(self) -> AbstractContextManager[Any]:
        return self.cuda.stream(self.cuda.Stream(self.name))

    def capture(self, call: Call) -> Call:
        """Capture after warm-up on a stream of its own, as PyTorch wants it; what cannot be captured raises."""
        stream = self.cuda.Stream(self.name)
        stream.wait_stream(self.cuda.current_stream(self.name))
        with self.cuda.stream(stream):
            for _ in range(self.warmup_calls):
                call()
        self.cuda.current_stream(self.name).wait_stream(stream)
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph, stream=stream):
            results = call()

        def replay() -> Any:
            graph.replay()
            return results

        return replay

    def __str__(self) -> str:
        gpu = self.properties
        return (
            f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory / 2**30:.0f} GiB, L2 {gpu.L2_cache_size / 2**20:.0f} MiB, "
            f"torch {torch.__version__}, CUDA {torch.version.cuda} (L2 is flushed before every call)"
        )


class Instant:
    """An event in the current stream."""

    def __init__(self, cuda: Any) -> None:
        self.event = cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Instant) -> float:
        """The seconds between the two, once the device has passed both."""
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def index_of(name: str) -> int | None:
    """The number of the GPU that `--device` names, None for the CPU.

    Raises:
        ValueError: if there is no such device; the message says why.
    """
    kind, colon, index = name.partition(":")
    if name == "cpu":
        return None
    if kind != "cuda" or (colon and not index.isdecimal()):
        raise ValueError(f"the device must be cpu, cuda or cuda:<index>; got {name!r}")
    if not torch.cuda.is_available():
        built = f"with CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        raise ValueError(f"{name} needs a GPU, and torch {torch.__version__} ({built}) sees none")
    if int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no {name}: torch sees {torch.cuda.device_count()} GPU(s)")
    return int(index or 0)


def create(name: str) -> Device:
    """The device that `--device` names; errors as of `index_of`."""
    index = index_of(name)
    if index is None:
        return CpuDevice()
    torch.cuda.set_device(index)  # events are of the current device
    return CudaDevice(torch.device("cuda", index))
