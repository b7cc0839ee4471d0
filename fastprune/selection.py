"""Which filters stay, given their scores: a threshold, global or per layer, and what every layer keeps."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import arguments, ops

Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class Selection:
    """The rule that turns scores into a mask. Nothing of it leaves the device.

    Attributes:
        filters: of each layer, ``F``.
        scope: ``global``: one threshold ``sort(s)[int(N · rate)]`` over all layers; ``layer``: one for each,
            ``sort(s_l)[int(F · rate)]``. A filter is kept when ``s > t``, strictly.
        min_kept: filters that a layer keeps whatever the threshold, its best; all of a layer that has fewer.
        round_to: a layer's kept filters are brought up to a multiple of it, by its best pruned ones.
        pinned: positions, among all N, of filters that always stay, not all of any layer. The threshold is over the
            others.
    """

    filters: tuple[int, ...]
    scope: Scope = "global"
    min_kept: int = 1
    round_to: int = 1
    pinned: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.scope not in ("global", "layer"):
            raise ValueError(f"scope must be global or layer, got {self.scope!r}")
        object.__setattr__(self, "min_kept", arguments.whole_number("min_kept", self.min_kept, 0))
        object.__setattr__(self, "round_to", arguments.whole_number("round_to", self.round_to, 1))

    @property
    def is_threshold(self) -> bool:
        """Whether one global threshold is all there is to it."""
        return self.scope == "global" and self.min_kept == 0 and self.round_to == 1 and not self.pinned

    def select(self, scores: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """The mask of ``[N]`` float32 scores, and what of it the threshold alone keeps; both ``[N]`` bool."""
        if self.pinned:  # above every threshold, and behind all others when they are counted from below
            scores = scores.masked_fill(_stays(self.pinned, len(scores), scores.device), torch.inf)
        above = self.by_threshold(scores, rate)
        return self.bring_back(scores, above), above

    def by_threshold(self, scores: Tensor, rate: float) -> Tensor:
        """``[N]`` bool: above the threshold of ``[N]`` float32 scores, those of pinned filters infinite."""
        if self.scope == "global":
            return scores > ops.kth_threshold(scores, int((scores.numel() - len(self.pinned)) * rate))
        layer, _, sizes = _places(self.filters, scores.device)
        if self.pinned:
            stays = _stays(self.pinned, len(scores), scores.device)
            sizes = sizes - torch.zeros_like(sizes).index_add_(0, layer, stays.long())
        ranked = self._by_layer(scores, torch.inf).sort(dim=1).values
        thresholds = ranked.gather(1, (sizes.double() * rate).long()[:, None])
        return scores > thresholds[layer, 0]

    def bring_back(self, scores: Tensor, mask: Tensor) -> Tensor:
        """``[N]`` bool: the mask and what ``min_kept`` and ``round_to`` add to it; of equals, the first of a layer."""
        if self.min_kept == 0 and self.round_to == 1:
            return mask
        layer, index, sizes = _places(self.filters, scores.device)
        wanted = torch.zeros_like(sizes).index_add_(0, layer, mask.long()).clamp(min=self.min_kept)
        wanted = torch.minimum((wanted + self.round_to - 1) // self.round_to * self.round_to, sizes)
        # A pruned filter never scores above a kept one, so the best `wanted` of a layer contain all that are kept.
        order = self._by_layer(scores, -torch.inf).argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(order.shape[1], device=scores.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(1, order, ranks)
        return mask | (rank[layer, index] < wanted[layer])

    def _by_layer(self, scores: Tensor, padding: float) -> Tensor:
        """``[L, max F]``, rows filled up with ``padding``."""
        layer, index, sizes = _places(self.filters, scores.device)
        table = scores.new_full((len(sizes), max(self.filters)), padding)
        table[layer, index] = scores
        return table


@functools.lru_cache(maxsize=16)
def _places(filters: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each of the N filters, its layer and its index in it; and F of each layer. Once, for a GPU's sake."""
    layer = torch.cat([torch.full((count,), i) for i, count in enumerate(filters)])
    index = torch.cat([torch.arange(count) for count in filters])
    return layer.to(device), index.to(device), torch.tensor(filters).to(device)


@functools.lru_cache(maxsize=16)
def _stays(pinned: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """``[N]`` bool: whether a filter is pinned."""
    stays = torch.zeros(count, dtype=torch.bool)
    stays[list(pinned)] = True
    return stays.to(device)
