"""The evolution of the original system: pure functions, all randomness from a generator that is handed in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .encoding import CHOICES, WIDEST, Encoding
from .space import Population, Space

_ROUNDS = 20  # of rejection, before encodings are led into the budget
_AT_A_TIME = 1000
_ROUNDS_LED = 4


@dataclass(frozen=True)
class Evolution:
    """How it goes.

    Attributes:
        population: encodings of each generation.
        mutations, crossovers: of them; random ones fill up.
        parents: the best of all seen, from which both come.
        mutation_probability: of each gene.
    """

    population: int = 50
    mutations: int = 25
    crossovers: int = 25
    parents: int = 10
    mutation_probability: float = 0.1

    def __post_init__(self) -> None:
        if self.population < 1 or self.parents < 1 or min(self.mutations, self.crossovers) < 0:
            raise ValueError("evolution needs a population and parents, and no negative numbers of children")
        if self.mutations + self.crossovers > self.population:
            raise ValueError(
                f"{self.mutations} mutations and {self.crossovers} crossovers are more than the population of "
                f"{self.population}"
            )
        if not 0 <= self.mutation_probability <= 1:
            raise ValueError(f"mutation_probability must be in [0, 1], got {self.mutation_probability}")


def save_generator(rng: np.random.Generator) -> dict[str, Any]:
    """The state of a generator, as JSON takes it."""
    return dict(rng.bit_generator.state)


def load_generator(state: Mapping[str, Any]) -> np.random.Generator:
    """The generator that goes on from :func:`save_generator`."""
    rng = np.random.default_rng()
    rng.bit_generator.state = state
    return rng


def best(fitness: Mapping[Encoding, float], count: int) -> list[Encoding]:
    """The ``count`` fittest, highest first; of equals the smaller encoding, whatever the order of evaluation."""
    return sorted(fitness, key=lambda encoding: (-fitness[encoding], encoding))[:count]


def first_population(rng: np.random.Generator, space: Space, evolution: Evolution) -> list[Encoding]:
    """Random encodings within the budget.

    Raises:
        BudgetError: if there are none, or none is found.
    """
    space.check_possible()
    return random_encodings(rng, space, evolution.population, ())


def next_population(
    rng: np.random.Generator, space: Space, evolution: Evolution, fitness: Mapping[Encoding, float]
) -> list[Encoding]:
    """The next generation: mutations and crossovers of the best of all seen, random ones to fill; none seen before.

    There are fewer where no more new ones are found within the budget, down to none.

    Args:
        rng: where all random numbers come from; it moves on.
        space: the budget.
        evolution: how many of what.
        fitness: of every encoding evaluated so far.
    """
    parents = np.array(best(fitness, evolution.parents), dtype=np.int64)
    seen = set(fitness)
    children = mutations(rng, space, parents, evolution.mutations, seen, evolution.mutation_probability)
    seen.update(children)
    crossed = crossovers(rng, space, parents, evolution.crossovers, seen)
    seen.update(crossed)
    children += crossed
    return children + random_encodings(rng, space, evolution.population - len(children), seen, at_least=0)


def mutations(
    rng: np.random.Generator,
    space: Space,
    parents: Population,
    count: int,
    seen: Collection[Encoding],
    probability: float,
    rounds: int = 10,
) -> list[Encoding]:
    """At most ``count`` new mutations: genes of a random parent, with ``probability``, moved by 1 to 30 modulo 31."""
    found: dict[Encoding, None] = {}
    for _ in range(rounds):
        if len(found) == count:
            break
        chosen = parents[rng.integers(len(parents), size=count)]
        moved = rng.random(chosen.shape) < probability
        offsets = rng.integers(1, CHOICES, size=chosen.shape)
        _take(found, (chosen + moved * offsets) % CHOICES, space, count, seen)
    return list(found)


def crossovers(
    rng: np.random.Generator,
    space: Space,
    parents: Population,
    count: int,
    seen: Collection[Encoding],
    rounds: int = 10,
) -> list[Encoding]:
    """At most ``count`` new crossovers: each gene from one or the other of two distinct parents, with equal chance."""
    found: dict[Encoding, None] = {}
    if len(parents) < 2:
        return []
    for _ in range(rounds):
        if len(found) == count:
            break
        first = rng.integers(len(parents), size=count)
        second = (first + rng.integers(1, len(parents), size=count)) % len(parents)
        from_first = rng.random((count, space.genes)) < 0.5
        _take(found, np.where(from_first, parents[first], parents[second]), space, count, seen)
    return list(found)


def random_encodings(
    rng: np.random.Generator, space: Space, count: int, seen: Collection[Encoding], at_least: int = 1
) -> list[Encoding]:
    """At most ``count`` new encodings within the budget.

    Uniform ones as long as they fall into it now and then. Into a narrower budget others are led, gene by gene.

    Raises:
        BudgetError: if fewer than ``at_least`` are found, saying how far the nearest was.
    """
    found: dict[Encoding, None] = {}
    if count <= 0:
        return []
    at_a_time = 4 * count if "latency_ms" in space.budget else _AT_A_TIME  # its layers may have to be measured
    for _ in range(_ROUNDS):
        _take(found, rng.integers(CHOICES, size=(at_a_time, space.genes)), space, count, seen)
        if len(found) == count:
            return list(found)
    for _ in range(_ROUNDS_LED):
        tried = _led_into_budget(rng, space, rng.integers(CHOICES, size=(4 * count, space.genes)))
        _take(found, tried, space, count, seen)
        if len(found) == count:
            break
    if len(found) < at_least:
        raise space.too_far(tried)
    return list(found)


def lead_into_budget(rng: np.random.Generator, space: Space, encoding: Encoding) -> list[Encoding]:
    """The encoding itself if it is within the budget, else one near it that is; none if none is found."""
    return as_encodings(_within(space, _led_into_budget(rng, space, np.array([encoding], dtype=np.int64))))


def _within(space: Space, rows: Population) -> Population:
    return rows[space.within(rows)]


def _led_into_budget(rng: np.random.Generator, space: Space, population: Population) -> Population:
    """Each encoding moved gene by gene, down where it costs too much, up where too little, until it is within."""
    moved, outside = population.copy(), np.arange(len(population))
    for _ in range(4 * WIDEST * space.genes):
        excess = space.excess(moved[outside])
        outside, towards = outside[excess != 0], -np.sign(excess[excess != 0]).astype(np.int64)
        if len(outside) == 0:
            break
        genes = rng.integers(space.genes, size=len(outside))
        moved[outside, genes] = np.clip(moved[outside, genes] + towards, 0, WIDEST)
    return moved


def _take(found: dict[Encoding, None], rows: Population, space: Space, count: int, seen: Collection[Encoding]) -> None:
    """Add those of the rows that are within the budget and new, up to ``count`` in all."""
    for encoding in as_encodings(_within(space, rows)):
        if len(found) == count:
            return
        if encoding not in seen:
            found[encoding] = None


def as_encodings(population: Iterable[Sequence[int]] | Population) -> list[Encoding]:
    """The rows as tuples."""
    rows = population.tolist() if isinstance(population, np.ndarray) else population
    return [tuple(row) for row in rows]
