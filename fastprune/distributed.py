"""Training in several processes, as ``torchrun`` starts them: who this one is, and what all of them agree on.

Everything here works in a lone process too, which is the first of one. What is called by one process must be called by
all of them, in the same order.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from .pruner import Pruner

__all__ = [
    *("LaunchError", "LostError", "MismatchError", "PeerError", "agreed", "average_", "first_on_each_machine"),
    *("first_prints", "from_first", "is_first", "joined", "largest", "local_rank", "rank", "size", "together", "total"),
    *("verify_masks", "verify_same"),
]

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LaunchError(RuntimeError):
    """The processes cannot work as they were started; the message says what to change."""


class MismatchError(RuntimeError):
    """What must be the same in all processes is not; every one of them raises this."""


class LostError(RuntimeError):
    """Another process has ended without a word; the message says which, as far as it is known."""


class PeerError(RuntimeError):
    """Another process failed, and says why; this one stops with it."""


# ---------------------------------------------------------------------------------------------------- who this one is


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if _active() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if _active() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def local_rank() -> int:
    """The number of this process on its machine, and of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if _active() else 0


@contextmanager
def joined(device: str = "auto") -> Iterator[None]:
    """The process group that ``torchrun`` asks for while this lasts; nothing where it did not start this process.

    Tensors on the CPU go through gloo, those on GPUs through NCCL, and each process has the GPU of its ``LOCAL_RANK``.

    Args:
        device: ``cpu``, ``cuda``, or ``auto``: CUDA where there is a device.

    Raises:
        LaunchError: where there are no GPUs, or more processes than GPUs.
    """
    if _active() or not all(name in os.environ for name in _TORCHRUN):
        yield
        return
    backend = "gloo"
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        own, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if own >= there:
            raise LaunchError(
                f"process {own} of this machine has no GPU of its own (torch finds {there}): "
                f"start as many processes as there are GPUs (--nproc-per-node), or use --device cpu"
            )
        torch.cuda.set_device(own)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend)
    try:
        with _losses_told():
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _losses_told() -> Iterator[None]:
    """What the exchanges say when a process is gone, as an error that says which.

    Raises:
        LostError: instead of it.
    """
    ours = (socket.gethostname(), os.getpid())
    peers: list[Any] = [None] * size()
    dist.all_gather_object(peers, ours)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not _BROKEN.search(str(error)):
            raise
        here = {str(i): pid for i, (host, pid) in enumerate(peers) if (host, pid) != ours and host == ours[0]}
        gone: list[str] = []
        for _ in range(50):  # its connections close before the process is gone
            if gone := [i for i, pid in here.items() if _is_gone(pid)]:
                break
            time.sleep(0.1)
        which = f"process {', '.join(gone)} is" if gone else "a process of another machine is"
        raise LostError(f"{which} gone (of {size()}): it was killed, or its machine failed") from error


_BROKEN = re.compile(r"gloo|NCCL|Connection (closed|reset)|Broken pipe", re.IGNORECASE)


def _is_gone(pid: int) -> bool:
    """Whether a process of this machine has ended, even if nobody has asked for its status yet."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or a system that does not tell
        return False


@contextmanager
def first_prints() -> Iterator[None]:
    """Only the first process prints while this lasts; what the others would goes nowhere. Errors are not held back."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, nullcontext() if is_first() else redirect_stdout(nowhere):
        yield


# -------------------------------------------------------------------------------------------------- what all agree on


def _device() -> torch.device:
    """Where small tensors are exchanged: on the CPU, if the group can, as that waits for no GPU."""
    return torch.device("cpu" if "cpu:" in dist.get_backend_config() else f"cuda:{torch.cuda.current_device()}")


def _reduced(numbers: list[int], op: dist.ReduceOp.RedOpType) -> list[int]:
    """The numbers (int64) of all processes, reduced one by one."""
    if size() == 1:
        return numbers
    exchanged = torch.tensor(numbers, dtype=torch.int64, device=_device())
    dist.all_reduce(exchanged, op)
    return exchanged.tolist()


def largest(value: int) -> int:
    """The largest that any process gives."""
    return _reduced([value], dist.ReduceOp.MAX)[0]


def from_first(value: Any) -> Any:
    """Return what the first process gives, in every process; numbers, text, and tuples, lists or dicts of them."""
    if size() == 1:
        return value
    exchanged = [value]
    dist.broadcast_object_list(exchanged, src=0, device=_device())
    return exchanged[0]


def total(tensor: Tensor) -> Tensor:
    """The sum over the processes, a tensor of its own."""
    summed = tensor.clone()
    if size() > 1:
        dist.all_reduce(summed)
    return summed


def average_(tensors: list[Tensor]) -> None:
    """Put the mean over the processes into floating-point tensors of one dtype and device, in one exchange."""
    if size() == 1 or not tensors:
        return
    flat = total(torch.cat([tensor.flatten() for tensor in tensors])) / size()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))


@contextmanager
def together() -> Iterator[None]:
    """A block that may fail in one process, without exchanges inside: either all processes pass it, or none does.

    Raises:
        PeerError: where another process failed. Of those that failed, the first one's own error is raised.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    failed = _reduced([rank() if failure is not None else size()], dist.ReduceOp.MIN)[0]
    if failed == size():
        return
    if failure is not None and failed == rank():
        raise failure
    raise PeerError(f"process {failed} failed, and says why") from failure


def agreed(error: Exception) -> Exception:
    """An error that every process has found: itself in the first, which tells it, and a PeerError in the others."""
    return error if is_first() else PeerError("process 0 failed, and says why")


@contextmanager
def first_on_each_machine() -> Iterator[None]:
    """A block that the first process of each machine does before the others of it: to download and to fill caches.

    The others must find things there: ``FASTPRUNE_OFFLINE`` is set for them.
    """
    if size() == 1:
        yield
        return
    first, before = local_rank() == 0, os.environ.get("FASTPRUNE_OFFLINE")
    if not first:
        largest(0)  # a barrier
        os.environ["FASTPRUNE_OFFLINE"] = "1"
    try:
        yield
    finally:
        if first:
            largest(0)
        elif before is None:
            del os.environ["FASTPRUNE_OFFLINE"]
        else:
            os.environ["FASTPRUNE_OFFLINE"] = before


def verify_same(contents: Mapping[str, bytes | memoryview], what: str) -> None:
    """Make sure that all processes have the same, by a hash of each part; one small exchange.

    Args:
        contents: the parts by name; the same names in every process.
        what: said before the name in the message.

    Raises:
        MismatchError: naming the parts that differ and the processes that differ from the first.
    """
    if size() == 1:
        return
    hashes = [int.from_bytes(hashlib.blake2b(part, digest_size=7).digest(), "big") for part in contents.values()]
    extremes = _reduced([*hashes, *(-number for number in hashes)], dist.ReduceOp.MAX)
    count = len(hashes)
    differing = [name for i, name in enumerate(contents) if extremes[i] != -extremes[count + i]]
    if not differing:
        return
    every = [torch.empty(count, dtype=torch.int64, device=_device()) for _ in range(size())]
    dist.all_gather(every, torch.tensor(hashes, dtype=torch.int64, device=_device()))
    others = [str(i) for i, theirs in enumerate(every) if not torch.equal(theirs, every[0])]
    raise MismatchError(
        f"{what} {', '.join(differing)}: process {', '.join(others)} differs from process 0 (of {size()})"
    )


def verify_masks(pruner: Pruner) -> None:
    """Make sure that all processes have the same masks, by a hash of each layer's; one small exchange.

    For every update: ``if pruner.step(): fastprune.distributed.verify_masks(pruner)``. Masks follow from weights, which
    DistributedDataParallel keeps equal; where they are not, something else has changed them in one process.
    Reads the device.

    Raises:
        MismatchError: naming the layers that differ and the processes that differ from the first.
    """
    if size() == 1:
        return
    masks = pruner.masks()
    stored = torch.cat([mask.flatten() for mask in masks.values()]).cpu()  # one copy from the device
    parts = stored.split([mask.numel() for mask in masks.values()])
    verify_same({name: memoryview(part.numpy()) for name, part in zip(masks, parts)}, "the masks are not the same in")
