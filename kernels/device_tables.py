"""Tables that the host makes and kernels read: kept for each stream; within a CUDA graph, a part of the graph.

Eager: the last used tables are kept by stream (on another one, the copy might not be there yet). They are copied from
pinned memory, for which nobody waits, and which nobody has to keep: when it is freed, PyTorch records an event on each
stream that copies from it, and reuses it once they have passed (torch 2.11 to 2.14, ATen/core/CachingHostAllocator.h).
It is freed at once and not with its table, since those events must not be recorded while one of the streams captures.
The memory of a table that is dropped is reused on its own stream only, behind the kernels that read it.

Captured: kernels that have the values as arguments write the table, before each use and whenever the graph runs. So a
graph needs no table that others may drop, no eager call finds one that a graph has yet to write, and nothing outlives
the graph: the arguments are its own, and the table's memory comes from its pool. Copies from pinned memory would leak:
PyTorch never reuses what a capture has copied from, not even after the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


class Kept(Generic[Made]):
    """A function of a device, which is the current one, and of hashable arguments, whose results are kept."""

    def __init__(self, make: Callable[..., Made], most: int) -> None:
        self._make = make
        self.cache = functools.lru_cache(most)(lambda stream, *args: make(*args))

    def __call__(self, device: torch.device, *args: Any) -> Made:
        """What the function makes, or has made for the current stream."""
        if device.type == "cpu":
            return self.cache(0, device, *args)
        if torch.cuda.is_current_stream_capturing():
            return self._make(device, *args)
        return self.cache(torch.cuda.current_stream(device).cuda_stream, device, *args)


def kept_by_stream(most: int) -> Callable[[Callable[..., Made]], Kept[Made]]:
    """Decorate a function that makes tables with `put`: keep its `most` last used results, but none of a capture."""
    return lambda make: Kept(make, most)


def put(host: Tensor, device: torch.device) -> Tensor:
    """An int64 table on the device, which is the current one, for what comes next on its current stream."""
    if device.type == "cpu":
        return host
    if not torch.cuda.is_current_stream_capturing():
        return host.pin_memory().to(device, non_blocking=True)
    table = torch.zeros_like(host, device=device)
    if host.numel():
        # The scalars of a multi-tensor kernel are arguments of it: 96 a launch in torch 2.11, 672 in 2.14.
        torch._foreach_add_(table.view(-1).unbind(), host.view(-1).tolist())
    return table
