"""Which implementation serves each op: chosen here and nowhere else.

The dispatcher holds the choice. Every op's reference is registered for all devices; the compiled modules register
theirs for their device when loaded and so take precedence; Triton's kernels are registered for CUDA where there are no
compiled ones. Forcing one registers it once more, on top.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

import fastprune.kernels as kernels  # kernels/ of the source tree

from .transforms import autograd_kernel, vmap_rule

BACKENDS = ("auto", "reference", "cpp", "triton")
_DEVICES = {"_cpu": "CPU", "_cuda": "CUDA"}

_library = torch.library.Library("fastprune", "DEF")
_filled: dict[str, torch.library.Library] = {}  # ops on CUDA that Triton serves since nothing was compiled
_override: torch.library.Library | None = None
_references: dict[str, Callable[..., Any]] = {}
_modules: dict[str, ModuleType] = {}
_absent: dict[str, str] = {}
_forced = "auto"


@dataclass(frozen=True)
class Implementation:
    """What serves an op on a device, and why."""

    op: str
    device: str
    implementation: str
    why: str


def define(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register the op ``fastprune::<schema>`` with its reference for every device, its fake and its rule for vmap.

    Of the arguments that the schema says are written to, autograd sees the versions change.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    arguments = getattr(torch.ops.fastprune, name).default._schema.arguments
    names = [argument.name for argument in arguments]
    _references[name] = _on_one_device(name, names, reference)
    _library.impl(name, _references[name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastprune::{name}", _on_one_device(name, names, fake), lib=_library)
    mutated = [i for i, argument in enumerate(arguments) if argument.is_write]
    if mutated:
        _library.impl(name, _counting_versions(name, mutated), "ADInplaceOrView", with_keyset=True)
    torch.library.register_vmap(f"fastprune::{name}", vmap_rule(name, bool(mutated)), lib=_library)


def differentiate(name: str, setup_context: Callable[..., None] | None, backward: Callable[..., Any]) -> None:
    """Register the op's gradient, as :func:`torch.library.register_autograd` does, but for ``torch.func``, too.

    Forward mode is refused; its tangents would be dropped.
    """
    _library.impl(name, autograd_kernel(name, setup_context, backward), "Autograd")


def _on_one_device(name: str, names: Sequence[str], function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, told nothing but tensors of one device; dispatch looks at all tensors of a call together."""

    def checked(*arguments: Any) -> Any:
        first: tuple[str, torch.device] | None = None
        for argument_name, argument in zip(names, arguments):
            several = isinstance(argument, (list, tuple))
            for i, tensor in enumerate(argument if several else [argument]):
                if not isinstance(tensor, torch.Tensor):
                    continue
                first = first or (argument_name, tensor.device)
                if tensor.device != first[1]:
                    entry = f"{argument_name}[{i}]" if several else argument_name
                    raise RuntimeError(
                        f"{name}: {entry} must be on the device of {first[0]} ({first[1]}), got {tensor.device}"
                    )
        return function(*arguments)

    return checked


def _counting_versions(name: str, mutated: list[int]) -> Callable[..., Any]:
    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        for i in mutated:
            if arguments[i] is not None:
                torch.autograd.graph.increment_version(arguments[i])  # of a tensor, or of each of a list
        below = keyset & torch._C._after_ADInplaceOrView_keyset
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return getattr(torch.ops.fastprune, name).default.redispatch(below, *arguments)

    return kernel


def load_compiled() -> None:
    """Load the extension modules that were built: ``_cuda`` only where torch itself has CUDA."""
    for name in _DEVICES:
        if importlib.util.find_spec(f"fastprune.{name}") is None:
            _absent[name] = f"fastprune.{name} was not built"
        elif name == "_cuda" and torch.version.cuda is None:
            _absent[name] = "this torch has no CUDA"
        else:
            _modules[name] = importlib.import_module(f"fastprune.{name}")
    if not _without_triton("CUDA"):
        for op in kernels.MODULES:
            if not _compiled(op, "CUDA"):
                _filled[op] = _serving({op: _triton(op)}, ["CUDA"])
    set_backend(os.environ.get("FASTPRUNE_BACKEND", "auto"))


def set_backend(name: str) -> None:
    """Choose the implementation of all ops: ``auto`` (the fastest there is), ``reference``, ``cpp`` or ``triton``.

    The environment variable ``FASTPRUNE_BACKEND`` sets the same at import. A compiled function made by
    ``torch.compile`` follows the choice too: the ops are opaque to it.

    Raises:
        ValueError: if the name is unknown.
        RuntimeError: if that implementation is not there; the message says why.
    """
    global _override, _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "cpp" and not _modules:
        raise RuntimeError(f"backend 'cpp' is not there: {'; '.join(_absent.values())}")
    devices = [key for key in _DEVICES.values() if not _without_triton(key)]
    if name == "triton" and not devices:
        raise RuntimeError(f"backend 'triton' is not there: {_without_triton('CUDA')}")
    if _override is not None:
        _override._destroy()
        _override = None
    if name == "reference":
        _override = _serving(_references, _DEVICES.values())
    elif name == "triton":
        _override = _serving({op: _triton(op) for op in kernels.MODULES}, devices)
    _forced = name


def _serving(implementations: Mapping[str, Callable[..., Any]], keys: Iterable[str]) -> torch.library.Library:
    """Registered over what is there, until the library is destroyed."""
    library = torch.library.Library("fastprune", "IMPL")
    with warnings.catch_warnings():
        # torch 2.11 warns of what is overridden even where that is allowed.
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
        for op, implementation in implementations.items():
            for key in keys:
                library.impl(op, implementation, key, allow_override=True)
    return library


def _triton(op: str) -> Callable[..., Any]:
    """The op's Triton implementation, imported when it is first called."""
    names = [argument.name for argument in getattr(torch.ops.fastprune, op).default._schema.arguments]
    return _on_one_device(op, names, lambda *arguments: kernels.load(op)(*arguments))


def _without_triton(key: str) -> str:
    """Why Triton's kernels cannot serve a device; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if key == "CPU":
        return "" if os.environ.get("TRITON_INTERPRET") == "1" else "on CPUs Triton runs only with TRITON_INTERPRET=1"
    return "" if torch.version.cuda is not None else "this torch has no CUDA"


def get_backend() -> str:
    """The name given to ``set_backend``, ``auto`` at first."""
    return _forced


def backends() -> list[Implementation]:
    """What serves every op on every device, and why."""
    table = []
    for op in sorted(_references):
        for module, key in _DEVICES.items():
            if _forced == "reference":
                choice = ("reference", "forced")
            elif _forced == "triton" and op in kernels.MODULES and not _without_triton(key):
                choice = ("triton", "forced")
            elif key == "CUDA" and op in _filled:
                choice = ("triton", _absent.get(module, f"fastprune.{module} has no {op}"))
            elif _compiled(op, key):
                choice = (
                    module.removeprefix("_"),
                    f"compiled; {cpu_isa()}" if module == "_cpu" else "compiled",
                )
            else:
                choice = ("reference", _absent.get(module, f"fastprune.{module} has no {op} yet"))
            table.append(Implementation(op, key.lower(), *choice))
    return table


def _compiled(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastprune::{op}", key)


def cpu_isa() -> str:
    """The instruction set the compiled CPU ops use: ``generic``, ``avx2`` or ``avx512``; ``none`` without them."""
    return _modules["_cpu"].isa() if "_cpu" in _modules else "none"


def cpu_isas() -> tuple[str, ...]:
    """The instruction sets that this build and this CPU have, slowest first."""
    return tuple(_modules["_cpu"].supported_isas()) if "_cpu" in _modules else ()


def set_cpu_isa(name: str) -> None:
    """Choose the instruction set of the compiled CPU ops (at import: ``FASTPRUNE_CPU_ISA``; the best one there is).

    Raises:
        ValueError: if this build or this CPU does not have it.
    """
    if name not in cpu_isas():
        raise ValueError(f"CPU instruction set must be one of {', '.join(cpu_isas()) or '(none)'}; got {name!r}")
    _modules["_cpu"].set_isa(name)
