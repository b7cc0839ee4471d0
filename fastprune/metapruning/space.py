"""The encodings that a search may choose from: all of a network's that keep within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .cost import costs
from .description import Description
from .encoding import CHOICES, WIDEST, Encoding

Population: TypeAlias = NDArray[np.int64]
"""``[P, genes]``, one encoding a row."""
Latency: TypeAlias = Callable[[Population], NDArray[np.float64]]

METRICS = ("flops", "macs", "parameters", "latency_ms")
_UNITS = {"k": 1e3, "m": 1e6, "g": 1e9}


class BudgetError(ValueError):
    """No encoding keeps within the budget; the message says how far the nearest one is."""


@dataclass(frozen=True)
class Space:
    """A network's encodings, what they cost, and what they may cost.

    Attributes:
        description: of the network.
        resolution: side of the images in pixels.
        num_classes: logits.
        budget: lowest and highest value of each metric that is limited, both allowed; ``None`` for no limit.
            The metrics are ``flops`` (as the original system counts), ``macs``, ``parameters``, ``latency_ms``.
        latency: predicts milliseconds; needed for a limit on them.
    """

    description: Description
    resolution: int
    num_classes: int
    budget: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    latency: Latency | None = None

    def __post_init__(self) -> None:
        for metric, (low, high) in self.budget.items():
            if metric not in METRICS:
                raise ValueError(f"a budget limits {', '.join(METRICS)}, not {metric!r}")
            if low is not None and high is not None and low > high:
                raise BudgetError(f"the budget of {metric} is empty: at least {low:,.10g} and at most {high:,.10g}")
        if "latency_ms" in self.budget and self.latency is None:
            raise ValueError("a budget of latency needs a table of latencies")

    @property
    def genes(self) -> int:
        """How many there are."""
        return len(self.description.genes)

    def costs(self, population: Population) -> dict[str, NDArray[np.float64]]:
        """Every metric of every encoding, ``[P]`` each; latency where there is a table."""
        counted = costs(self.description, population, self.resolution, self.num_classes)
        found = {name: getattr(counted, name).astype(np.float64) for name in METRICS[:3]}
        if self.latency is not None:
            found["latency_ms"] = self.latency(population)
        return found

    def costs_of(self, encoding: Encoding) -> dict[str, float]:
        """Every metric of one encoding."""
        return {metric: float(values[0]) for metric, values in self.costs(np.array([encoding])).items()}

    def excess(self, population: Population) -> NDArray[np.float64]:
        """How far each encoding is above the budget (positive) or below it (negative), as a share of it: ``[P]``.

        0 within. Of several metrics the one that is farthest off counts.
        """
        worst = np.zeros(len(population))
        if not self.budget:
            return worst
        counted = costs(self.description, population, self.resolution, self.num_classes)
        for metric in self.budget.keys() - {"latency_ms"}:
            off = self._off(metric, getattr(counted, metric))
            worst = np.where(np.abs(off) > np.abs(worst), off, worst)
        if "latency_ms" in self.budget and self.latency is not None:
            left = np.flatnonzero(worst == 0)  # latency may have to be measured: only of those that keep to the rest
            worst[left] = self._off("latency_ms", self.latency(population[left]))
        return worst

    def _off(self, metric: str, values: NDArray[Any]) -> NDArray[np.float64]:
        """The excess of one metric."""
        low, high = self.budget[metric]
        off = np.zeros(len(values))
        if high is not None:
            off += np.maximum(values - high, 0) / max(high, 1e-12)
        if low is not None:
            off -= np.maximum(low - values, 0) / max(low, 1e-12)
        return off

    def within(self, population: Population) -> NDArray[np.bool_]:
        """Which encodings keep within the budget: bool ``[P]``."""
        return self.excess(population) == 0

    def check_possible(self) -> None:
        """Look at the narrowest and the widest network, between which all others are.

        Raises:
            BudgetError: if the limits of one metric lie outside of what there is.
        """
        ends = np.array([[0] * self.genes, [WIDEST] * self.genes])
        found = self.costs(ends)
        for metric in set(self.budget) - {"latency_ms"}:  # a wider layer is not always slower
            (low, high), (least, most) = self.budget[metric], found[metric]
            if high is not None and high < least:
                raise BudgetError(
                    f"no {self.description.name} has at most {high:,.10g} {metric}: the narrowest has {least:,.0f}, "
                    f"{least - high:,.10g} more ({least / max(high, 1e-12):.2f} times as many)"
                )
            if low is not None and low > most:
                raise BudgetError(
                    f"no {self.description.name} has at least {low:,.10g} {metric}: the widest has {most:,.0f}, "
                    f"{low - most:,.10g} less"
                )

    def too_far(self, population: Population) -> BudgetError:
        """What to raise when these encodings, which were tried, are all outside of the budget."""
        excess = self.excess(population)
        nearest = population[np.abs(excess).argmin()][None]
        off = float(np.abs(excess).min())
        limits = "; ".join(f"{metric} {_said(low, high)}" for metric, (low, high) in self.budget.items())
        has = ", ".join(f"{metric} {values[0]:,.10g}" for metric, values in self.costs(nearest).items())
        return BudgetError(
            f"no encoding of {self.description.name} was found within the budget ({limits}); the nearest of "
            f"{len(population):,} tried is {100 * off:.2f} % off: {has}"
        )

    def uniform(self, metric: str, value: float) -> Encoding:
        """The network of one choice for all genes whose ``metric`` is nearest to ``value``."""
        rows = np.repeat(np.arange(CHOICES)[:, None], self.genes, axis=1)
        nearest = int(np.abs(self.costs(rows)[metric] - value).argmin())
        return (nearest,) * self.genes


def _said(low: float | None, high: float | None) -> str:
    limits = (("at least", low), ("at most", high))
    return " and ".join(f"{word} {value:,.10g}" for word, value in limits if value is not None)


def quantity(text: str, whole: float | None = None) -> float:
    """A number as people write it: ``330M``, ``1.5G``, ``200k``, ``12``, or ``50%`` of ``whole``.

    Raises:
        ValueError: for anything else, and for numbers below 0.
    """
    number, unit = text.strip(), 1.0
    if number.endswith("%"):
        if whole is None:
            raise ValueError(f"{text!r}: a share of what? Give a number")
        number, unit = number[:-1], whole / 100
    elif number[-1:].lower() in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1].lower()]
    try:
        value = float(number) * unit
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise ValueError(f"expected a number such as 330M, 1.5G, 200k or 50%, got {text!r}")
    return value
