"""Counts what the ops of one forward pass cost, as shapes go through the model (see cost)."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .channel_flow import CONVOLUTIONS, Value, flat, propagate
from .nn import MaskedConv2d

aten = torch.ops.aten

_POOLS = {aten.max_pool2d_with_indices, aten.avg_pool2d}  # their second argument is the window
_REDUCTIONS = {aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std, aten._adaptive_avg_pool2d}
_BATCH_NORMS = {aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm}
_NORMS = {*_BATCH_NORMS, aten.native_layer_norm, aten.native_group_norm, aten._softmax, aten._log_softmax}
_COPIES = {aten.clone, aten._to_copy, aten.copy_, aten.detach, aten.alias, aten.lift_fresh, aten.expand}


@dataclass(frozen=True)
class _Record:
    """One op: who ran it, how it marks what it reads, and how it is counted once that is known."""

    module: str
    pull: Callable[[], None]
    count: Callable[[], tuple[int, int]]  # MACs, and FLOPs besides them


@dataclass
class _Memory:
    """A tensor's memory: who wrote it first, and what it holds."""

    module: str
    value: Value

    @property
    def bytes(self) -> int:
        return self.value.elements * self.value.itemsize


class OpCounter(TorchDispatchMode):
    """A mode under which the model runs once, with fake tensors; then the counts can be asked for.

    Attributes:
        called: names of the modules whose forward ran, in order.
    """

    def __init__(self, model: nn.Module, masked: bool) -> None:
        from torch.utils import flop_counter  # loads Triton

        super().__init__()
        self._flop_counter = flop_counter
        self.masked = masked
        self.modules = dict(model.named_modules())
        # Masks are read before anything is fake. A filter of which a single weight is left is kept.
        self.masks = {
            name: module.mask.reshape(len(module.mask), -1).any(1).numpy(force=True)
            for name, module in self.modules.items()
            if masked and isinstance(module, MaskedConv2d)
        }
        self.called: dict[str, None] = {"": None}
        self._running = [""]
        self._values: Any = WeakIdKeyDictionary()  # of tensors that depend on the input
        self._every: list[Value] = []
        self._records: list[_Record] = []
        self._memory: dict[int, _Memory] = {}  # by storage, of those alive
        self._events: list[tuple[int, _Memory]] = []  # +1 written, −1 freed
        self._sizes: dict[tuple[str, str], list[Callable[[], int]]] = {}  # of parameters: what is kept

    # ------------------------------------------------------------------------------------------ while it runs

    def entering(self, name: str) -> Callable[[nn.Module, Any], None]:
        """Return the hook before a module's forward."""

        def hook(module: nn.Module, inputs: Any) -> None:
            self._running.append(name)
            self.called[name] = None

        return hook

    def leaving(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Be the hook behind it."""
        self._running.pop()

    def start(self, inputs: Sequence[Any]) -> None:
        """Take the model's inputs, all of them live."""
        for tensor in inputs:
            if isinstance(tensor, Tensor):
                axis = 1 if tensor.dim() > 1 else 0
                live = np.ones(tensor.shape[axis] if tensor.dim() else 1, dtype=np.bool_)
                self._keep(tensor, Value(tuple(tensor.shape), tensor.element_size(), axis, live))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        inputs = [self._look_up(arg) for arg in args]
        if not results or not flat([*inputs, self._look_up(list((kwargs or {}).values()))]):
            return result
        self._record(func, args, inputs, results)
        return result

    def _look_up(self, arg: Any) -> Any:
        if isinstance(arg, Tensor):
            return self._values.get(arg)
        return [self._look_up(entry) for entry in arg] if isinstance(arg, (list, tuple)) else None

    def _record(self, func: Any, args: tuple[Any, ...], inputs: list[Any], results: list[Tensor]) -> None:
        module = self._running[-1]
        flow = propagate(func, args, inputs, results, self.masks.get(module))
        for tensor, value in zip(results, flow.outputs):
            self._keep(tensor, value)
        count = self._counting(func, args, inputs, results, flow.outputs[0])
        self._records.append(_Record(module, flow.pull, count))

    def _keep(self, tensor: Tensor, value: Value) -> None:
        self._values[tensor] = value
        self._every.append(value)
        storage = tensor.untyped_storage()
        memory = self._memory.get(id(storage))
        if memory is None:
            memory = self._memory[id(storage)] = _Memory(self._running[-1], value)
            self._events.append((1, memory))
            weakref.finalize(storage, self._free, id(storage))
        elif value.shape == memory.value.shape:  # written in place
            memory.value = value

    def _free(self, storage: int) -> None:
        self._events.append((-1, self._memory.pop(storage)))

    # ------------------------------------------------------------------------------------------ how ops count

    def _counting(
        self, func: Any, args: tuple[Any, ...], inputs: list[Any], results: list[Tensor], out: Value
    ) -> Callable[[], tuple[int, int]]:
        name = func.overloadpacket
        if name in CONVOLUTIONS and inputs[1] is None:
            return self._convolution(args, inputs[0], out)
        if (name is aten.addmm and inputs[0] is inputs[2] is None) or (name is aten.mm and inputs[1] is None):
            return self._linear(args[-2:], inputs[-2], out, has_bias=name is aten.addmm)
        if count := self._flop_counter.flop_registry.get(name):
            macs = count(*args, out_val=results if len(results) > 1 else results[0]) // 2
            return lambda: (macs, 0)
        if name is aten._scaled_dot_product_flash_attention_for_cpu:
            macs = self._flop_counter.sdpa_flop_count(*(tuple(tensor.shape) for tensor in args[:3])) // 2
            return lambda: (macs, 0)
        if not results[0].is_floating_point() or name in _COPIES:
            return lambda: (0, 0)
        if name in _POOLS:
            window = math.prod(args[1]) if len(args[1]) > 1 else args[1][0] ** 2
            return lambda: (0, window * out.elements)
        if name in _REDUCTIONS:
            return lambda: (0, inputs[0].elements)
        if name in _BATCH_NORMS:
            self._note_parameters(args[1:3], {"weight": out.channels, "bias": out.channels})
        if name in _NORMS or torch.Tag.pointwise in func.tags:
            return lambda: (0, out.elements)
        return lambda: (0, 0)

    def _convolution(self, args: tuple[Any, ...], value: Value, out: Value) -> Callable[[], tuple[int, int]]:
        weight, bias, transposed, groups = args[1], args[2], args[6], args[8]
        kernel = math.prod(weight.shape[2:])
        channels = out.axis
        # Each weight is used once for each place of the output, or of the input where it is transposed.
        shape = value.shape if transposed else out.shape
        places = math.prod(shape) // shape[channels]

        def pairs() -> int:
            read, written = (flags.reshape(groups, -1).sum(1) for flags in (value.on(channels), out.kept))
            return int((read * written).sum())

        self._note_parameters((weight, bias), {"weight": lambda: kernel * pairs(), "bias": out.channels})
        return lambda: (places * kernel * pairs(), out.elements if bias is not None else 0)

    def _linear(
        self, factors: Sequence[Tensor], value: Value, out: Value, has_bias: bool
    ) -> Callable[[], tuple[int, int]]:
        rows, weight = factors[0].shape[0], factors[1]

        def pairs() -> int:
            return int(value.on(1).sum()) * out.channels() if out.axis == 1 else weight.numel()

        self._note_parameters((weight, None), {"weight": pairs})
        return lambda: (rows * pairs(), out.elements if has_bias else 0)

    def _note_parameters(self, used: Sequence[Tensor | None], kept: dict[str, Callable[[], int]]) -> None:
        """Remember how much of the running module's weight and bias is kept, if those are what was used."""
        own = self.modules[self._running[-1]]._parameters
        for tensor, (name, size) in zip(used, kept.items()):
            parameter = own.get(name)
            if tensor is not None and parameter is not None and parameter.numel() == tensor.numel():
                # A module may run more than once.
                self._sizes.setdefault((self._running[-1], name), []).append(size)

    # ------------------------------------------------------------------------------------------ once it has run

    def finish(self, output: Any) -> None:
        """Take the model's output, and find out what of everything it needs.

        Raises:
            ValueError: if that cannot be found out.
        """
        found = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if self.masked and not found:
            raise ValueError(
                f"the model returns a {type(output).__name__}, and what the masks leave is counted for tensors alone, "
                f"or tuples, lists and dicts of them: use masked=False"
            )
        for value in (self._values[leaf] for leaf in found if leaf in self._values):
            value.needed[:] = True
        for record in reversed(self._records):
            record.pull()
        if not self.masked:
            for value in self._every:
                value.live[:], value.needed[:] = True, True
        self._events = list(self._events)  # what is freed from here on is not of the forward pass
        self._free = lambda storage: None  # type: ignore[method-assign]

    def by_module(self) -> tuple[Counter[str], Counter[str], Counter[str]]:
        """Return MACs, FLOPs besides them, and bytes written, by module name."""
        macs, others, activations = Counter[str](), Counter[str](), Counter[str]()
        for record in self._records:
            multiplied, other = record.count()
            macs[record.module] += multiplied
            others[record.module] += other
        for sign, memory in self._events:
            if sign > 0:
                activations[memory.module] += memory.bytes
        return macs, others, activations

    def peak_bytes(self) -> int:
        """Return the largest sum of memory alive at one time."""
        alive = peak = 0
        for sign, memory in self._events:
            alive += sign * memory.bytes
            peak = max(peak, alive)
        return peak

    def kept_parameters(self, module: str, name: str, all_of_it: int) -> int:
        """Return how many elements of a parameter are kept: all of one that no rule knows."""
        sizes = self._sizes.get((module, name)) if self.masked else None
        return max(size() for size in sizes) if sizes else all_of_it
