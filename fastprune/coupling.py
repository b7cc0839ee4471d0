"""Filters that can only be removed together: those whose outputs are added up, or that a depthwise filter reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .channels import Ids, analyse, effective_weights
from .graph import trace

__all__ = ["Coupling", "written_channels"]


def written_channels(model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> dict[str, Ids]:
    """By name of each convolution that the forward uses, the channels of the network that its filters write.

    Args:
        model: that :func:`fastprune.graph.trace` can trace. Not changed.
        example_input: for shapes; nothing is computed with it.

    Returns:
        ``[F]`` numbers; equal where filters write the same channel, as those do whose outputs are added up.

    Raises:
        ValueError: for a model that cannot be traced.
    """
    network = trace(model, example_input)
    # Whatever the weights are now: filters that begin as zeros will not stay so.
    weights = {name: torch.ones_like(weight) for name, weight in effective_weights(network, {}).items()}
    analysis = analyse(network, weights)
    convolutions = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    return {
        str(node.target): analysis.roots(channels.ids)
        for node, channels in analysis.results.items()
        if node.op == "call_module" and node.target in convolutions
    }


class Coupling:
    """What filters score together that write the same channel.

    Args:
        filters: by layer, ``F``, in the order of the scores.
        written: see :func:`written_channels`. Filters of other layers stand alone.

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
