"""Filters that can only be removed together, and filters that cannot be removed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .channels import Analysis, Ids, Read, analyse, effective_weights, why_whole
from .graph import trace

__all__ = ["Coupling", "Written", "written_channels"]


@dataclass(frozen=True)
class Written:
    """What the filters of a convolution write.

    Attributes:
        ids: ``[F]``, the channel of the network that each writes; equal where filters write the same channel, as those
            do whose outputs are added up.
        removable: ``[F]``, whether :func:`fastprune.compact` can remove it once it is pruned.
        why: why the others cannot go; empty where all can.
    """

    ids: Ids
    removable: NDArray[np.bool_]
    why: str


def written_channels(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> dict[str, Written]:
    """By name of each convolution that the forward uses, what its filters write.

    Args:
        model: that :func:`fastprune.graph.trace` can trace. Not changed.
        example_input: for shapes; nothing is computed with it.

    Raises:
        ValueError: for a model that cannot be traced.
    """
    network = trace(model, example_input)
    # Whatever the weights are now: filters that begin as zeros will not stay so.
    weights = {name: torch.ones_like(weight) for name, weight in effective_weights(network, {}).items()}
    analysis = analyse(network, weights)
    modules = dict(network.named_modules())
    # Of several readers the last is named: the output, where it is one of them.
    whole = {
        int(root): read for read in analysis.reads if read.how == "all" for root in analysis.roots(read.channels.ids)
    }
    found = {}
    for node, channels in analysis.results.items():
        name = str(node.target)
        if node.op == "call_module" and isinstance(modules[name], nn.Conv2d):
            ids = analysis.roots(channels.ids)
            readers = [whole.get(root) for root in ids.tolist()]
            why = {_why(analysis, read, name): None for read in readers if read is not None}
            removable = np.array([read is None for read in readers], np.bool_)
            found[name] = Written(ids, removable, ", ".join(why))
    return found


def _why(analysis: Analysis, read: Read, layer: str) -> str:
    """Why a channel that a layer writes stays: who needs every one of its channels, or makes it so."""
    node = read.node
    if node.op == "placeholder":
        return "tied to the input"
    if node.target == layer and layer not in analysis.shared:
        return "compact() cannot follow it"
    if node.target != layer and analysis.results.get(node) is read.channels:
        return f"added to what {node.target if isinstance(node.target, str) else node.name} writes"
    return why_whole(analysis, node)


class Coupling:
    """What filters score together that write the same channel.

    Args:
        filters: by layer, ``F``, in the order of the scores.
        written: the channels that filters write, ``ids`` of :func:`written_channels`; of other layers they stand alone.

    Attributes:
        group: ``[N]`` int64, a number for each filter; coupled ones have the same.
    """

    def __init__(self, filters: Mapping[str, int], written: Mapping[str, Ids]) -> None:
        alone = -1 - np.arange(sum(filters.values()))
        starts = np.cumsum([0, *filters.values()])
        channels = [
            written.get(name, alone[start : start + count]) for (name, count), start in zip(filters.items(), starts)
        ]
        _, group, counts = np.unique(np.concatenate(channels), return_inverse=True, return_counts=True)
        order = np.argsort(group, kind="stable")
        places = np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)
        members = np.full((len(counts), counts.max()), len(group))  # filled up with N
        members[group[order], places] = order
        self.group, self._members, self._counts = map(torch.from_numpy, (group, members, counts))

    @property
    def coupled(self) -> Tensor:
        """``[N]`` bool: whether a filter shares its score with others."""
        return (self._counts > 1)[self.group]

    def together(self, scores: Tensor) -> Tensor:
        """Every filter's score replaced by the mean over those it is coupled with, which then are equal.

        Args:
            scores: ``[N]`` floating point.

        Returns:
            ``[N]``, of the same dtype. The order of the sums is fixed.
        """
        if self.group.device != scores.device:  # once
            self.group, self._members, self._counts = (
                tensor.to(scores.device) for tensor in (self.group, self._members, self._counts)
            )
        padded = torch.cat([scores, scores.new_zeros(1)])
        means = padded[self._members].sum(1) / self._counts
        return means.to(scores.dtype)[self.group]
