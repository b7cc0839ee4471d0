"""Which convolutions write a network's output, told without an example input."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional

from .graph import trace_as_is
from .tracer import asks_for_size

__all__ = ["output_layers"]

# Behind one of these, a channel is no longer a channel of what it was made of.
_MIXING_MODULES = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.MultiheadAttention)
_MIXING_FUNCTIONS: set[Any] = {
    *(functional.conv1d, functional.conv2d, functional.conv3d, functional.linear, functional.bilinear),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
}


def output_layers(model: nn.Module) -> set[str]:
    """The names of the convolutions whose filters are channels of the output, or go into them one by one.

    They are met on the way back from the output of the traced forward, which ends at convolutions and linear layers.

    Raises:
        ValueError: for a model that cannot be traced.
    """
    network, found = trace_as_is(model), set()
    modules = dict(network.named_modules())
    pending, seen = [node for node in network.graph.nodes if node.op == "output"], set()
    while pending:
        node = pending.pop()
        if node in seen or asks_for_size(node) or node.target in _MIXING_FUNCTIONS:
            continue
        seen.add(node)
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d):
            found.add(str(node.target))
        if not isinstance(module, _MIXING_MODULES):
            pending.extend(node.all_input_nodes)
    return found
