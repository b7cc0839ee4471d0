"""What is known of every channel of a network: which are constant, which belong together, and who reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

__all__ = ["Analysis", "Channels", "Ids", "Read", "Sum", "Values"]

Ids = NDArray[np.int64]
Values = NDArray[np.float64]


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
    shared: set[str] = field(default_factory=set)
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
