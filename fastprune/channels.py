"""What is known of every channel of a network: which are constant, which belong together, and who reads them.

A pruned filter's output is constant; a BatchNorm or an activation makes another constant of it. A channel that is
constant wherever somebody reads it need not be computed, if every reader can take its share of the constant over.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.nn import functional

from .graph import shape
from .nn import MaskedConv2d
from .stochastic_depth import is_stochastic_depth

Ids = NDArray[np.int64]
Values = NDArray[np.float64]

_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.ELU, nn.SELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.Tanh, nn.Sigmoid),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
)
_ELEMENTWISE: set[Any] = {
    *(functional.relu, functional.relu6, functional.silu, functional.gelu, functional.elu, functional.leaky_relu),
    *(functional.hardswish, functional.hardsigmoid, functional.hardtanh, functional.mish, functional.sigmoid),
    *(torch.relu, torch.sigmoid, torch.tanh, "relu", "relu_", "sigmoid", "tanh"),
}
# In eval mode, or always, what they do to a constant is nothing.
_IDENTITIES = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout),
    *(nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
_IDENTITY: set[Any] = {
    *(functional.max_pool2d, functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d, torch.max_pool2d),
    *("contiguous", "clone"),
}
_ADD: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_MULTIPLY: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}

# Those that a branch must be spared, for each channel of its stream, to be worth a Scatter.
MULTIPLICATIONS_PER_CHANNEL = 32


@dataclass
class Channels:
    """The channels of a node's result, in its dimension 1.

    Attributes:
        ids: which channel of the network each is; channels that elementwise operations bring together get one number.
        constants: the value that a channel has everywhere, NaN for one that is computed.
    """

    ids: Ids
    constants: Values


@dataclass
class Read:
    """A layer, or something unknown, that reads channels.

    Attributes:
        node: the reader.
        channels: what it reads.
        how: ``bias``: a constant moves into its bias; ``padded``: a constant is 0 outside of the image, so that another
            constant channel has to carry it; ``all``: it needs every channel as it is.
        groups: of a convolution, each of which reads its share of the channels.
    """

    node: fx.Node
    channels: Channels
    how: Literal["bias", "padded", "all"]
    groups: int = 1


@dataclass
class Sum:
    """An addition of a branch with constant channels, which it need not write, to a residual stream.

    Attributes:
        stream: the operand whose channels are those of the sum.
        branch: the other; its constant channels are channels of their own.
        channels: those of the branch.
    """

    stream: fx.Node
    branch: fx.Node
    channels: Channels

    @property
    def is_constant(self) -> bool:
        """Whether nothing of the branch is computed."""
        return not np.isnan(self.channels.constants).any()


@dataclass
class Analysis:
    """Of a traced network in eval mode; see :func:`analyse`."""

    network: fx.GraphModule
    weights: Mapping[str, Tensor]
    exact: bool = True
    results: dict[fx.Node, Channels] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    sums: dict[fx.Node, Sum] = field(default_factory=dict)
    parents: list[int] = field(default_factory=list)

    def fresh(self, count: int) -> Ids:
        """New channels."""
        ids = np.arange(len(self.parents), len(self.parents) + count)
        self.parents.extend(ids.tolist())
        return ids

    def root(self, channel: int) -> int:
        """The number of all channels that belong together with this one."""
        while self.parents[channel] != channel:
            self.parents[channel] = self.parents[self.parents[channel]]
            channel = self.parents[channel]
        return channel

    def roots(self, ids: Ids) -> Ids:
        """The same for many."""
        return np.array([self.root(int(channel)) for channel in ids], np.int64)

    def unite(self, first: Ids, second: Ids) -> None:
        """Let channels belong together, pair by pair."""
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            self.parents[self.root(b)] = self.root(a)


def effective_weights(network: fx.GraphModule, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name of each convolution and linear layer, its weight with what is pruned at 0."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = module.weight.detach()
            mask = masks.get(name, module.mask if isinstance(module, MaskedConv2d) else None)
            if mask is not None:
                rows = mask if mask.dim() == weight.dim() else mask.view(-1, *[1] * (weight.dim() - 1))
                weight = torch.where(rows, weight, 0)
            found[name] = weight
    return found


def analyse(network: fx.GraphModule, weights: Mapping[str, Tensor], exact: bool = True) -> Analysis:
    """Follow the channels of a network, traced with an example input, from its input to its output.

    Args:
        network: of :func:`fastprune.graph.trace`.
        weights: of :func:`effective_weights`.
        exact: False takes constants for the same beyond the border of the image, where padding has zeros.
    """
    found = Analysis(network, weights, exact)
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    for node in network.graph.nodes:
        if node.op == "output":
            _read_all(found, node)
            continue
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            # A layer that is called twice has one weight for two sets of channels.
            shared = calls[node.target] > 1 and any(True for _ in module.parameters())
            result = None if shared else _module(found, node, module)
        else:
            result = _function(found, node)
        if result is None:
            _read_all(found, node)
            size = shape(node)
            if size is not None and len(size) > 1:
                channels = Channels(found.fresh(size[1]), np.full(size[1], np.nan))
                found.results[node] = channels
                found.reads.append(Read(node, channels, "all"))  # nobody can make it write fewer
        elif len(result.ids):
            found.results[node] = result
    _forget_what_nobody_needs(found)
    return found


def _forget_what_nobody_needs(found: Analysis) -> None:
    """Leave out what only writes branches that are constant."""
    needed = {node for node in found.network.graph.nodes if node.op in ("output", "placeholder")}
    for node in reversed(found.network.graph.nodes):
        if node in needed:
            own = found.sums.get(node)
            needed.update([own.stream] if own is not None and own.is_constant else node.all_input_nodes)
    found.results = {node: channels for node, channels in found.results.items() if node in needed}
    found.reads = [read for read in found.reads if read.node in needed]
    found.sums = {node: own for node, own in found.sums.items() if node in needed}


def _read_all(found: Analysis, node: fx.Node) -> None:
    for source in node.all_input_nodes:
        if source in found.results:
            found.reads.append(Read(node, found.results[source], "all"))


def _module(found: Analysis, node: fx.Node, module: nn.Module) -> Channels | None:
    """The result of a module; None for one that is not known."""
    source = found.results.get(node.all_input_nodes[0]) if node.all_input_nodes else None
    if source is None or len(node.all_input_nodes) != 1:
        return None
    ids, constants = source.ids, source.constants
    if isinstance(module, nn.Conv2d):
        return _convolution(found, node, module, source)
    size = shape(node.all_input_nodes[0])
    if isinstance(module, nn.Linear) and size is not None and len(size) == 2:
        found.reads.append(Read(node, source, "bias"))
        return _written(found, found.weights[str(node.target)], module.bias)
    if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm1d)) and module.running_mean is not None:
        return Channels(ids, _normalised(module, constants))
    if isinstance(module, _ELEMENTWISE_MODULES):
        return Channels(ids, _applied(module, constants))
    if _is_identity(module):
        return source
    if isinstance(module, nn.AvgPool2d):
        plain = not found.exact or (module.padding in (0, (0, 0)) and not module.ceil_mode)
        # An average counts zeros beyond the border, or leaves them out.
        return Channels(ids, constants if plain else np.where(constants == 0, 0.0, np.nan))
    if isinstance(module, nn.Flatten) and module.start_dim == 1 and module.end_dim == -1:
        return _flattened(node, source)
    return None


def _is_identity(module: nn.Module) -> bool:
    """Whether a constant is the same behind it, in eval mode."""
    return isinstance(module, _IDENTITIES) or is_stochastic_depth(module)


def is_depthwise(module: nn.Module) -> bool:
    """Whether each channel has a filter of its own."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def _convolution(found: Analysis, node: fx.Node, module: nn.Conv2d, source: Channels) -> Channels | None:
    weight = found.weights[str(node.target)]
    padded = found.exact and module.padding not in (0, (0, 0), "valid") and module.padding_mode == "zeros"
    if is_depthwise(module):
        own = _written(found, weight, module.bias).constants
        sums = weight.double().flatten(1).sum(1).cpu().numpy()
        bias = np.zeros(len(sums)) if module.bias is None else module.bias.detach().double().cpu().numpy()
        inner = np.where((source.constants == 0) | (not padded), source.constants * sums + bias, np.nan)
        return Channels(source.ids, np.where(np.isnan(own), inner, own))
    found.reads.append(Read(node, source, "padded" if padded else "bias", module.groups))
    return _written(found, weight, module.bias)


def _written(found: Analysis, weight: Tensor, bias: Tensor | None) -> Channels:
    """New channels, those of zero filters constant."""
    zero = (weight.flatten(1) == 0).all(1).cpu().numpy()
    values = np.zeros(len(zero)) if bias is None else bias.detach().double().cpu().numpy()
    return Channels(found.fresh(len(zero)), np.where(zero, values, np.nan))


def _normalised(module: nn.BatchNorm2d | nn.BatchNorm1d, constants: Values) -> Values:
    assert module.running_mean is not None
    assert module.running_var is not None
    mean, var = module.running_mean.double(), module.running_var.double()
    weight = None if module.weight is None else module.weight.detach().double()
    bias = None if module.bias is None else module.bias.detach().double()
    given = torch.from_numpy(constants).to(mean.device)[None]
    return functional.batch_norm(given, mean, var, weight, bias, False, 0.0, module.eps)[0].cpu().numpy()


def _applied(function: Callable[..., Tensor], constants: Values, *args: Any, **kwargs: Any) -> Values:
    return function(torch.from_numpy(constants.copy()), *args, **kwargs).numpy()


def _flattened(node: fx.Node, source: Channels) -> Channels | None:
    size = shape(node.all_input_nodes[0])
    if size is None or len(size) < 2:
        return None
    each = math.prod(size[2:])
    return Channels(np.repeat(source.ids, each), np.repeat(source.constants, each))


def _function(found: Analysis, node: fx.Node) -> Channels | None:
    """The result of a function or method; None for one that is not known."""
    if node.op == "placeholder" or node.op == "get_attr":
        return None
    sources = [found.results[source] for source in node.all_input_nodes if source in found.results]
    if node.target == "size" and node.args[1:] and node.args[1] in (0, 2, 3, -1, -2):
        return Channels(found.fresh(0), np.zeros(0))  # nothing about channels
    if node.target in _ADD or node.target in _MULTIPLY:
        return _combined(found, node)
    if node.target is torch.cat:
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        if dim != 1 or len(sources) != len(node.args[0]):  # type: ignore[arg-type]
            return None
        return Channels(*(np.concatenate([getattr(s, part) for s in sources]) for part in ("ids", "constants")))
    if len(sources) != 1:
        return None
    (source,) = sources
    if node.target in _ELEMENTWISE:
        function = getattr(torch, node.target.rstrip("_")) if isinstance(node.target, str) else node.target
        options = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        return Channels(source.ids, _applied(function, source.constants, **options)) if len(node.args) == 1 else None
    if node.target in _IDENTITY:
        return source
    return _reshaped(node, source)


def _reshaped(node: fx.Node, source: Channels) -> Channels | None:
    before, after = shape(node.all_input_nodes[0]), shape(node)
    if before is None or after is None:
        return None
    if node.target in ("mean", torch.mean):
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        listed = dims if isinstance(dims, (list, tuple)) else [dims]
        return source if len(before) == 4 and {d % 4 for d in listed if isinstance(d, int)} == {2, 3} else None
    flattens = len(after) == 2 and after[0] == before[0] and after[1] == math.prod(before[1:])
    if node.target in (torch.flatten, "flatten", "view", "reshape", torch.reshape) and flattens:
        # A size that is written out would be wrong once channels are gone.
        given = [size for arg in node.args[1:] for size in (arg if isinstance(arg, (list, tuple)) else [arg])]
        return None if any(isinstance(size, int) and size > 1 for size in given) else _flattened(node, source)
    return None


def _combined(found: Analysis, node: fx.Node) -> Channels | None:
    """A sum or a product, of two results or of one and a number."""
    function = np.add if node.target in _ADD else np.multiply
    if node.kwargs or len(node.args) != 2:
        return None
    nodes = [arg for arg in node.args if isinstance(arg, fx.Node)]
    sources = [found.results.get(arg) for arg in nodes]
    numbers = [arg for arg in node.args if isinstance(arg, (int, float))]
    first = sources[0]
    if first is None:
        return None
    if len(nodes) == 1 and len(numbers) == 1:
        return Channels(first.ids, function(first.constants, numbers[0]))
    second = sources[1] if len(sources) == 2 else None
    sizes = [shape(arg) for arg in nodes]
    if second is None or any(size is None or len(size) != len(sizes[0] or ()) for size in sizes):
        return None
    if len(first.ids) != len(second.ids):
        return None
    constants = function(first.constants, second.constants)
    if function is np.add and len(sizes[0] or ()) == 4 and sizes[0] == sizes[1]:
        (stream, branch), (node_of_stream, node_of_branch) = (first, second), nodes
        if np.isnan(stream.constants).sum() < np.isnan(branch.constants).sum():
            (stream, branch), (node_of_stream, node_of_branch) = (second, first), nodes[::-1]
        if nodes[0] is not nodes[1] and _pays(found, node_of_branch, branch):
            computed = np.isnan(branch.constants)
            found.unite(stream.ids[computed], branch.ids[computed])
            found.sums[node] = Sum(node_of_stream, node_of_branch, branch)
            return Channels(stream.ids, constants)
    found.unite(first.ids, second.ids)
    if function is np.multiply:  # 0 times whatever it is
        constants = np.where((first.constants == 0) | (second.constants == 0), 0.0, constants)
    return Channels(first.ids, constants)


def _pays(found: Analysis, node: fx.Node, branch: Channels) -> bool:
    """Whether the multiplications that constant channels of a branch cost are worth a :class:`Scatter`.

    What nothing but an addition reads saves them; a Scatter touches every channel of the stream once more.
    """
    constant = int((~np.isnan(branch.constants)).sum())
    if constant in (0, len(branch.ids)):
        return constant > 0
    while len(node.users) == 1 and node.op == "call_module":
        module = found.network.get_submodule(str(node.target))
        (source,) = node.all_input_nodes
        if isinstance(module, nn.Conv2d):
            inputs = np.isnan(found.results[source].constants).sum() if source in found.results else module.in_channels
            each = int(inputs) // module.groups * math.prod(module.kernel_size)
            return constant * each >= MULTIPLICATIONS_PER_CHANNEL * len(branch.ids)
        if not (_is_identity(module) or isinstance(module, (nn.BatchNorm2d, *_ELEMENTWISE_MODULES))):
            break
        node = source
    return False
