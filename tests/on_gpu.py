"""The ops on a GPU for tests whose tensors lie on the CPU: arguments go there, results come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastprune import kernels, ops


def moved(op: str, function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """The function of an op's arguments as one that computes on the device."""
    arguments = getattr(torch.ops.fastprune, op).default._schema.arguments
    written = [i for i, argument in enumerate(arguments) if argument.is_write]

    def put(tensor: Any) -> Any:
        return placed(tensor, device) if isinstance(tensor, Tensor) else tensor

    def call(*args: Any) -> Any:
        there = tree_map(put, list(args))
        result = function(*there)
        for i in written:
            for host, other in zip(tree_leaves(args[i]), tree_leaves(there[i])):
                if host is not None:
                    host.copy_(other)
        return tree_map(lambda x: x.to("cpu", copy=True) if isinstance(x, Tensor) else x, result)

    return call


def placed(tensor: Tensor, device: str) -> Tensor:
    """A copy on the device with the same strides and the same offset in its storage: as misaligned as it was."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.detach().as_strided((size,), (1,), 0).to(device, copy=True)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@contextmanager
def serving(kind: str, device: str = "cuda") -> Iterator[None]:
    """Within, the ops on CPU tensors are computed on the device: by the dispatcher's choice, or by Triton's kernels."""
    library = torch.library.Library("fastprune", "IMPL")
    key = torch.device(device).type.upper()
    try:
        for op in {entry.op for entry in ops.backends()}:
            function = kernels.load(op) if kind == "triton" else dispatched(op, key)
            library.impl(op, moved(op, function, device), "CPU", allow_override=True)
        yield
    finally:
        library._destroy()


def dispatched(op: str, key: str) -> Callable[..., Any]:
    """What the dispatcher has for a device."""
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    overload = getattr(torch.ops.fastprune, op).default
    return lambda *args: overload.redispatch(keys, *args)
