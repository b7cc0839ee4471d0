"""Which channels of a value depend on the network's input, and which of them are read: what pruning leaves, op by op.

Forward, a channel is *live* if it varies with the input: a pruned filter's output is constant, and stays so through
BatchNorm and activations until a live one is added. Backward, a channel is *needed* if a kept filter, or the network's
output, reads it. What is both has to be computed. Rules are known for what convolutional networks are made of;
behind any other op every channel is taken to be live and needed, so that nothing is left out by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["CONVOLUTIONS", "Flow", "Value", "flat", "propagate"]

aten = torch.ops.aten
Flags = NDArray[np.bool_]  # numpy: no mode of torch may see them

# Their first argument's channels come out one by one, as through elementwise ops.
_CHANNELWISE = {
    *(aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten._native_batch_norm_legit),
    *(aten.cudnn_batch_norm, aten.miopen_batch_norm, aten._batch_norm_no_update),
    *(aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d),
    *(aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d, aten.constant_pad_nd),
    *(aten.reflection_pad2d, aten.replication_pad2d, aten.native_dropout, aten.expand, aten.clone, aten._to_copy),
    *(aten.detach, aten.alias, aten.contiguous, aten.lift_fresh, aten.copy_),
}
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias, aten.squeeze, aten.unsqueeze}
_REDUCTIONS = {aten.mean, aten.sum, aten.amax, aten.amin, aten.var, aten.std}
CONVOLUTIONS = {aten.convolution, aten._convolution}


@dataclass(eq=False)
class Value:
    """A tensor that depends on the input: one flag per channel, its channels being the entries along `axis`."""

    shape: tuple[int, ...]
    itemsize: int
    axis: int
    live: Flags  # [n]
    needed: Flags = field(init=False)  # [n]; known once the backward pass has been here

    def __post_init__(self) -> None:
        self.needed = np.zeros_like(self.live)

    def on(self, axis: int) -> Flags:
        """Return the live flags along another axis: there all are, if any is."""
        return self.live if axis == self.axis else np.full(self.shape[axis], self.live.any())

    def need(self, axis: int, which: Flags) -> None:
        """Mark what is read along an axis."""
        self.needed |= which if axis == self.axis else which.any()

    @property
    def kept(self) -> Flags:
        """`[n]`, the channels that have to be computed."""
        return self.live & self.needed

    def channels(self) -> int:
        """Return how many channels have to be computed."""
        return int(self.kept.sum())

    @property
    def elements(self) -> int:
        """How many elements have to be computed."""
        size = self.shape[self.axis] if self.shape else 1
        per_channel = torch.Size(self.shape).numel() // max(size, 1)
        return self.channels() * per_channel


@dataclass(frozen=True)
class Flow:
    """What an op makes of its inputs' flags; `pull` marks in them what its results need."""

    outputs: list[Value]
    pull: Callable[[], None]


def propagate(func: Any, args: tuple[Any, ...], inputs: list[Any], results: list[Tensor], mask: Flags | None) -> Flow:
    """Return the flags of an op's results.

    Args:
        func: an aten overload.
        args: its positional arguments.
        inputs: `args` with a Value for each tensor that depends on the network's input, None for all else (in lists,
            too).
        results: the tensors that it returned.
        mask: `[F]`, the filters that a convolution keeps; None for all.
    """
    name, first = func.overloadpacket, inputs[0] if inputs else None
    flow: Flow | None = None
    if name in CONVOLUTIONS and isinstance(first, Value) and inputs[1] is None:
        flow = _convolution(args, first, results[0], mask)
    elif name is aten.addmm and inputs[0] is None and inputs[2] is None:
        flow = _linear(inputs[1], results[0])
    elif name is aten.mm and isinstance(first, Value) and inputs[1] is None:
        flow = _linear(first, results[0])
    elif name is aten.cat:
        flow = _concatenation(args, first, results[0])
    elif name in (aten.split, aten.split_with_sizes) and isinstance(first, Value):
        flow = _split(args, first, results)
    elif name is aten.slice and isinstance(first, Value):
        flow = _slice(args, first, results[0])
    elif name in _RESHAPES and isinstance(first, Value):
        flow = _reshape(first, results[0])
    elif name in (aten.permute, aten.transpose, aten.t) and isinstance(first, Value):
        flow = _permutation(name, args, first, results[0])
    elif name in _REDUCTIONS and isinstance(first, Value):
        flow = _reduction(args, first, results[0])
    elif name is aten.native_layer_norm and isinstance(first, Value):
        mixed = range(len(first.shape) - len(args[1]), len(first.shape))
        flow = None if first.axis in mixed else _elementwise([first], results[0])
    elif name in _CHANNELWISE and isinstance(first, Value):
        flow = _elementwise([first], results[0])
    elif torch.Tag.pointwise in func.tags:
        flow = _elementwise(flat(inputs), results[0])
    flow = flow or _mixed(flat(inputs), results[0])
    return _together([flow, *(_besides(flow.outputs[0], flat(inputs), r) for r in results[len(flow.outputs) :])])


def flat(inputs: Sequence[Any]) -> list[Value]:
    """Return the values of a list of arguments, those in lists, too."""
    found: list[Value] = []
    for entry in inputs:
        if isinstance(entry, Value):
            found.append(entry)
        elif isinstance(entry, (list, tuple)):
            found += flat(entry)
    return found


def make(result: Tensor, axis: int, live: Flags) -> Value:
    """Return the value of a tensor."""
    return Value(tuple(result.shape), result.element_size(), axis, live.copy())


def _together(flows: list[Flow]) -> Flow:
    def pull() -> None:
        for flow in flows:
            flow.pull()

    return Flow([value for flow in flows for value in flow.outputs], pull)


def _besides(first: Value, values: list[Value], result: Tensor) -> Flow:
    """A further result: as the first if it has its shape (a pool's indices), else of anything."""
    if tuple(result.shape) != first.shape:
        return _mixed(values, result)
    twin = make(result, first.axis, first.live)
    twin.live, twin.needed = first.live, first.needed  # the same flags, so that what reads one keeps both
    return Flow([twin], lambda: None)


def _mixed(values: list[Value], result: Tensor) -> Flow:
    """Anything may depend on anything."""
    axis = 1 if result.dim() > 1 else 0
    live = any(value.live.any() for value in values)
    out = make(result, axis, np.full(result.shape[axis] if result.dim() else 1, live))

    def pull() -> None:
        for value in values:
            value.needed |= out.kept.any()

    return Flow([out], pull)


def _elementwise(values: list[Value], result: Tensor) -> Flow | None:
    """Channel c of the result depends on channel c of the inputs, which are broadcast."""
    shape = result.shape
    # Axes are counted from the end, where broadcasting lines shapes up.
    axes = [value.axis - len(value.shape) for value in values if value.shape]
    fitting = [a for a, v in zip(axes, values) if -a <= len(shape) and shape[a] == v.shape[v.axis]]
    if not fitting:
        return None
    axis = fitting[0]
    live = np.zeros(shape[axis], dtype=np.bool_)
    for value in values:
        live |= value.on(axis + len(value.shape)) if -axis <= len(value.shape) else value.live.any()
    out = make(result, axis + len(shape), live)

    def pull() -> None:
        for value in values:
            own = axis + len(value.shape)
            if own < 0:
                value.needed |= out.kept.any()
            else:
                value.need(own, out.kept if value.shape[own] == shape[axis] else np.array([out.kept.any()]))

    return Flow([out], pull)


def _convolution(args: tuple[Any, ...], value: Value, result: Tensor, mask: Flags | None) -> Flow:
    """A kept filter reads the channels of its group; without a live one among them, its output is constant."""
    groups = args[8]
    channels = 1 if result.dim() > 1 else 0
    own = value.on(channels)
    live_groups = own.reshape(groups, -1).any(1)
    live = live_groups.repeat(result.shape[channels] // groups)
    out = make(result, channels, live if mask is None else live & mask)

    def pull() -> None:
        read = out.kept.reshape(groups, -1).any(1)
        value.need(channels, read.repeat(len(own) // groups))

    return Flow([out], pull)


def _linear(value: Value, result: Tensor) -> Flow:
    """A product with a constant matrix: every output reads every channel of the last axis."""
    last = len(value.shape) - 1
    own = value.on(last)
    if value.axis != last:  # rows are mixed up with channels
        return _mixed([value], result)
    out = make(result, result.dim() - 1, np.full(result.shape[-1], own.any()))
    return Flow([out], lambda: value.need(last, np.full(len(own), out.kept.any())))


def _concatenation(args: tuple[Any, ...], inputs: Any, result: Tensor) -> Flow | None:
    axis = (args[1] if len(args) > 1 else 0) % result.dim()
    values: list[Value | None] = list(inputs)
    if any(value is not None and value.axis != axis for value in values):
        joined = [value for value in values if value is not None]
        return _elementwise(joined, result) if all(v.axis == joined[0].axis for v in joined) else None
    sizes = [tensor.shape[axis] for tensor in args[0]]
    parts = [np.zeros(n, dtype=np.bool_) if v is None else v.live for n, v in zip(sizes, values)]
    out = make(result, axis, np.concatenate(parts))

    def pull() -> None:
        for value, which in zip(values, np.split(out.kept, np.cumsum(sizes)[:-1])):
            if value is not None:
                value.need(axis, which)

    return Flow([out], pull)


def _split(args: tuple[Any, ...], value: Value, results: list[Tensor]) -> Flow | None:
    axis = (args[2] if len(args) > 2 else 0) % len(value.shape)
    if axis != value.axis:
        flows = [_elementwise([value], result) for result in results]
        known = [flow for flow in flows if flow is not None]
        return _together(known) if len(known) == len(results) else None
    parts = np.split(value.live, np.cumsum([result.shape[axis] for result in results])[:-1])
    outputs = [make(result, axis, live) for result, live in zip(results, parts)]
    return Flow(outputs, lambda: value.need(axis, np.concatenate([out.kept for out in outputs])))


def _slice(args: tuple[Any, ...], value: Value, result: Tensor) -> Flow | None:
    given = list(args[1:])
    axis, start, end, step = given + [0, None, None, 1][len(given) :]
    if axis % len(value.shape) != value.axis:
        return _elementwise([value], result)
    chosen = np.arange(value.shape[value.axis])[slice(start, end, step)]
    out = make(result, value.axis, value.live[chosen])

    def pull() -> None:
        value.needed[chosen] |= out.kept

    return Flow([out], pull)


def _reshape(value: Value, result: Tensor) -> Flow | None:
    """Channels stay together where they become an axis again, with the axes behind them flattened into it or not."""
    channels = value.shape[value.axis]
    inner = torch.Size(value.shape[value.axis + 1 :]).numel()
    behind = [result.shape[axis + 1 :].numel() for axis in range(result.dim())]
    fitting = [axis for axis, size in enumerate(result.shape) if size * behind[axis] == channels * inner]
    axis = next((axis for axis in fitting if inner % behind[axis] == 0), None)
    if axis is None:
        return None
    each = inner // behind[axis]
    out = make(result, axis, value.live.repeat(each))

    def pull() -> None:
        value.needed |= out.kept.reshape(channels, each).any(axis=1)

    return Flow([out], pull)


def _permutation(name: Any, args: tuple[Any, ...], value: Value, result: Tensor) -> Flow:
    order = list(range(len(value.shape)))
    if name is aten.permute:
        order = [axis % len(order) for axis in args[1]]
    else:
        one, other = args[1:3] if name is aten.transpose else (0, len(order) - 1)
        order[one], order[other] = order[other], order[one]
    out = make(result, order.index(value.axis), value.live)
    return Flow([out], lambda: value.need(value.axis, out.kept))


def _reduction(args: tuple[Any, ...], value: Value, result: Tensor) -> Flow | None:
    rank = len(value.shape)
    dims = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else None
    reduced = {axis % rank for axis in dims} if dims else set(range(rank))
    if value.axis in reduced:
        return None
    axis = value.axis if result.dim() == rank else value.axis - sum(r < value.axis for r in reduced)
    out = make(result, axis, value.live)
    return Flow([out], lambda: value.need(value.axis, out.kept))
