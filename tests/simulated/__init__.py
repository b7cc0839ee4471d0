"""The GPU implementations of the ops on a CPU: what the compilers made of them, executed by ptxrun.

``cuda_<op>.py`` does what ``csrc/cuda/launchers/<op>.cpp`` and the launches of ``csrc/cuda/<op>.cu`` do; Triton's
launchers run as they are.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastprune import kernels, ops

from . import triton
from .gpu import Gpu

__all__ = ["Gpu", "implementations", "serving"]


def implementations(kind: str, gpu: Gpu) -> dict[str, Callable[..., Any]]:
    """By op, the function that runs it on a simulated GPU: by the ``cuda`` kernels or by those of ``triton``.

    ``cuda_<basename>.py`` has a function of the op's name, which takes a Gpu and then the op's very arguments.
    """
    if kind == "triton":
        return {op: triton.on(gpu, op, kernels.load(op)) for op in kernels.MODULES}
    modules = {op: importlib.import_module(f"{__name__}.cuda_{name}") for op, name in kernels.MODULES.items()}
    return {op: functools.partial(getattr(module, op), gpu) for op, module in modules.items()}


@contextmanager
def serving(kind: str, gpu: Gpu) -> Iterator[Gpu]:
    """Within, the ops on CPU tensors are those of the GPU; one that is not there is an error."""
    there = implementations(kind, gpu)
    library = torch.library.Library("fastprune", "IMPL")
    try:
        for op in {entry.op for entry in ops.backends()}:
            library.impl(op, there.get(op, functools.partial(_missing, kind, op)), "CPU", allow_override=True)
        yield gpu
    finally:
        library._destroy()


def _missing(kind: str, op: str, *arguments: Any) -> Any:
    raise NotImplementedError(f"{kind} has no {op}")
