"""Which channels of a network stay when it is made smaller, and why those that could have gone."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, fx

from .channels import Analysis, Channels, Ids, Read, Sum, is_layer, why_whole

__all__ = ["Selected"]


@dataclass
class Selected:
    """Which channels stay, and why those that could have gone."""

    analysis: Analysis
    round_to: int
    kept: set[int] = field(default_factory=set)
    why: dict[int, str] = field(default_factory=dict)
    shifts: dict[fx.Node, Tensor] = field(default_factory=dict)  # that BatchNorms take over, see shrink

    def __post_init__(self) -> None:
        for read in self.analysis.reads:
            self._keep_what_is_needed(read)
        for read in self.analysis.reads:
            if read.how == "padded":
                for group in np.unique(np.flatnonzero(self._weighed(read)) * read.groups // len(read.channels.ids)):
                    self._keep_a_carrier(read, int(group))
        layers = [node for node in self.analysis.network.graph.nodes if self._is_layer(node)]
        grouped = [read for read in self.analysis.reads if read.groups > 1]
        before = -1
        while before < len(self.kept):
            # Layers share channels: what one has to keep may bring another out of step.
            before = len(self.kept)
            for node in layers:
                self._keep_multiple(self.analysis.results[node])
            for node, own in self.analysis.sums.items():
                self._keep_what_a_branch_writes(node, own)
            for read in grouped:
                self._keep_groups_alike(read)

    def _is_layer(self, node: fx.Node) -> bool:
        if node.op != "call_module" or node not in self.analysis.results:
            return False
        return is_layer(self.analysis.network.get_submodule(str(node.target)))

    def index(self, channels: Channels) -> Ids:
        """The positions, among these channels, of those that stay."""
        return np.flatnonzero([root in self.kept for root in self.analysis.roots(channels.ids).tolist()])

    def _keep(self, root: int, why: str) -> None:
        if root not in self.kept:
            self.kept.add(root)
            self.why[root] = why

    def _keep_what_is_needed(self, read: Read) -> None:
        computed = np.isnan(read.channels.constants)
        needed = computed & self._weighed(read) if read.how != "all" else np.ones_like(computed)
        why = why_whole(self.analysis, read.node) if read.how == "all" else f"not constant for {read.node.target}"
        for root in self.analysis.roots(read.channels.ids[needed]).tolist():
            self._keep(root, why)

    def _weighed(self, read: Read) -> NDArray[np.bool_]:
        """Which channels a layer multiplies by weights that are not 0 all: those of groups with a filter."""
        written = np.isnan(self.analysis.results[read.node].constants).reshape(read.groups, -1)
        return written.any(1).repeat(len(read.channels.ids) // read.groups)

    def carrier(self, read: Read, group: int = 0) -> int | None:
        """The position of the constant channel that carries the others' shares: the largest of those that stay.

        None if there is none, or only such as are small beside those that go: weights would have to be large by as
        much, and what they multiply is known to a few digits.
        """
        span = _span(read.channels, group, read.groups)
        sizes = np.abs(np.nan_to_num(read.channels.constants))
        stay = np.intersect1d(self.index(read.channels), span)
        best = max(stay.tolist(), key=lambda i: sizes[i], default=None)
        return best if best is not None and sizes[best] > 0 and 2 * sizes[best] >= sizes[span].max() else None

    def _keep_a_carrier(self, read: Read, group: int) -> None:
        constants, stays = read.channels.constants, self.index(read.channels)
        span = _span(read.channels, group, read.groups)
        gone = np.setdiff1d(span[np.nan_to_num(constants[span]) != 0], stays)
        if len(gone) and self.carrier(read, group) is None:
            best = gone[np.abs(constants[gone]).argmax()]
            self._keep(self.analysis.root(int(read.channels.ids[best])), f"carries constants to {read.node.target}")

    def _keep_multiple(self, channels: Channels) -> None:
        """Keep more until there is one channel, and a multiple."""
        stay = len(self.index(channels))
        wanted = min(-(-max(stay, 1) // self.round_to) * self.round_to, len(channels.ids))
        self._keep_more(channels.ids, wanted, "round_to" if self.round_to > 1 else "the last of its layer")

    def _keep_what_a_branch_writes(self, node: fx.Node, own: Sum) -> None:
        """Keep in the stream what a branch has for other reasons than that it is needed there."""
        if not own.is_constant:
            ids = self.analysis.results[node].ids[self.index(own.channels)]
            self._keep_more(ids, len(ids), f"added to by {own.branch.target}")

    def _keep_groups_alike(self, read: Read) -> None:
        """Keep as many inputs and filters in each group that has any."""
        sides = read.channels, self.analysis.results[read.node]
        spans = [[side.ids[_span(side, group, read.groups)] for group in range(read.groups)] for side in sides]
        counts = np.array([[self._count(ids) for ids in side] for side in spans])
        alive = counts.any(0)
        for side, most in zip(spans, counts.max(1), strict=True):
            for group in np.flatnonzero(alive):
                self._keep_more(side[group], max(int(most), 1), f"groups of {read.node.target} are alike")

    def _count(self, ids: Ids) -> int:
        return sum(root in self.kept for root in self.analysis.roots(ids).tolist())

    def _keep_more(self, ids: Ids, wanted: int, why: str) -> None:
        """Keep the first of those that would go until so many stay."""
        roots = self.analysis.roots(ids).tolist()
        stay = self._count(ids)
        for root in roots:
            if stay >= wanted:
                return
            if root not in self.kept:
                self._keep(root, why)
                stay += roots.count(root)


def _span(channels: Channels, group: int, groups: int) -> Ids:
    """The positions of a group's channels."""
    each = len(channels.ids) // groups
    return np.arange(group * each, (group + 1) * each)
