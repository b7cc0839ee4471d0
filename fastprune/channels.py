"""Follow the channels of a network: which are constant, which belong together, and who reads them.

A pruned filter's output is constant; a BatchNorm or an activation makes another constant of it. A channel that is
constant wherever somebody reads it need not be computed, if every reader can take its share of the constant over.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, fx, nn

from .channel_rules import is_convolution, is_depthwise, is_followed, is_norm, result_of
from .channel_state import Analysis, Channels, Ids, Read, Sum, Values
from .graph import read_by_forward, shape
from .nn import MaskedConv2d, along_filters

__all__ = ["Analysis", "Channels", "Ids", "Read", "Sum", "Values", "analyse", "effective_weights", "is_layer"]
__all__ += ["is_convolution", "is_depthwise", "is_norm", "why_whole"]


def is_layer(module: nn.Module) -> bool:
    """Whether it is a convolution or a linear layer whose weights masks can be of: of the very class."""
    return is_convolution(module) or type(module) is nn.Linear


def effective_weights(network: fx.GraphModule, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name of each convolution and linear layer of the very class, its weight with what is pruned at 0."""
    found = {}
    for name, module in network.named_modules():
        if is_layer(module):
            assert isinstance(module, (nn.Conv2d, nn.Linear))
            weight = module.weight.detach()
            mask = masks.get(name, module.mask if isinstance(module, MaskedConv2d) else None)
            if mask is not None:
                weight = torch.where(along_filters(mask, weight), weight, 0)
            found[name] = weight
    return found


def analyse(network: fx.GraphModule, weights: Mapping[str, Tensor], exact: bool = True) -> Analysis:
    """Follow the channels of a network, traced with an example input, from its input to its output.

    Args:
        network: of :func:`fastprune.graph.trace`.
        weights: of :func:`effective_weights`.
        exact: False takes constants for the same beyond the border of the image, where padding has zeros.
    """
    found = Analysis(network, weights, exact, shared=_shared(network))
    for node in network.graph.nodes:
        if node.op == "output":
            _read_all(found, node)
            continue
        result = None if node.target in found.shared else result_of(found, node)
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


def _shared(network: fx.GraphModule) -> set[str]:
    """The modules whose tensors serve more than one purpose: called twice, read by the forward, or tied to others."""
    nodes = network.graph.nodes
    owners: defaultdict[int, set[str]] = defaultdict(set)
    for name, module in network.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                owners[id(tensor)].add(name)
    tied = {name for names in owners.values() if len(names) > 1 for name in names}
    calls = Counter(str(node.target) for node in nodes if node.op == "call_module")
    twice = {name for name, count in calls.items() if count > 1 and network.get_submodule(name).state_dict()}
    return (tied | twice | read_by_forward(network.graph)) - {""}


def why_whole(found: Analysis, node: fx.Node) -> str:
    """Why a node needs every channel that it reads, and writes all of its own."""
    if node.op == "output":
        return "writes the output"
    if node.target in found.shared:
        return f"{node.target} serves more than once"
    if node.op == "call_module" and not is_followed(found.network.get_submodule(str(node.target))):
        return f"{node.target} has a hook or a forward of its own"
    return f"read whole by {node.target if isinstance(node.target, str) else node.name}"


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
