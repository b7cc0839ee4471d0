"""Where a search stands: its generation, its random numbers and everything evaluated, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..runlog import write_json
from .encoding import Encoding
from .evolution import Evolution, best, first_population, load_generator, next_population, save_generator
from .fitness import Score
from .space import Space

_VERSION = 1


class StateError(ValueError):
    """The state of a search cannot be used; the message says why, and what to do."""


class Search:
    """A search by the original evolution, generation after generation.

    ``pending()`` is what to evaluate next, ``record`` takes the scores in any order, ``advance`` goes on to the next
    generation; ``save`` and ``load`` keep all of it. What comes out depends on the seed and on the scores alone.

    Args:
        space: the encodings to choose from.
        evolution: how it goes.
        iterations: generations.
        seed: of all random numbers.
        start: encodings that the first generation begins with, as far as they are within the budget.

    Attributes:
        generation: the one that is evaluated (0-based); ``iterations`` at the end.
        population: its encodings.
        evaluated: the score of every encoding seen, in the order of their generations.
        history: of each finished generation, the best validation top-1 so far and the mean of the generation.

    Raises:
        BudgetError: if nothing keeps within the budget.
    """

    algorithm = "evolution"

    def __init__(
        self, space: Space, evolution: Evolution, iterations: int, seed: int, start: Sequence[Encoding] = ()
    ) -> None:
        self.space, self.evolution, self.iterations, self.seed = space, evolution, iterations, seed
        self.rng = np.random.default_rng(seed)
        self.generation = 0
        self.evaluated: dict[Encoding, Score] = {}
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0  # spent evaluating
        self.batch_size: int | None = None  # of the evaluation, once it is known
        self.population = self._first(start)

    def _first(self, start: Sequence[Encoding]) -> list[Encoding]:
        chosen = [encoding for encoding in dict.fromkeys(start) if self.space.within(np.array([encoding]))[0]]
        drawn = first_population(self.rng, self.space, self.evolution)
        return list(dict.fromkeys([*chosen, *drawn]))[: self.evolution.population]

    def _next(self) -> list[Encoding]:
        return next_population(self.rng, self.space, self.evolution, self.fitness())

    @property
    def done(self) -> bool:
        """Whether all generations are evaluated, or no new encoding is left within the budget."""
        return self.generation >= self.iterations or not self.population

    def pending(self) -> list[Encoding]:
        """What of this generation is not evaluated yet."""
        return [encoding for encoding in self.population if encoding not in self.evaluated]

    def record(self, encoding: Encoding, score: Score) -> None:
        """Take the score of an encoding; that of one which is known already is left out."""
        self.evaluated.setdefault(encoding, score)

    def fitness(self) -> dict[Encoding, float]:
        """Validation top-1 of every encoding seen."""
        return {encoding: score.top1 for encoding, score in self.evaluated.items()}

    def best(self, count: int = 1) -> list[Encoding]:
        """The fittest of all seen."""
        return best(self.fitness(), count)

    def front(self) -> list[Encoding]:
        """The Pareto front, of a search for one."""
        return []

    def advance(self) -> None:
        """Go on to the next generation.

        Raises:
            RuntimeError: if this one is not evaluated.
        """
        if self.pending():
            raise RuntimeError(f"{len(self.pending())} encodings of generation {self.generation} are not evaluated")
        scores = [self.evaluated[encoding].top1 for encoding in self.population]
        best_top1 = self.evaluated[self.best()[0]].top1
        self.history.append({"best": best_top1, "mean": float(np.mean(scores)), "evaluated": len(self.evaluated)})
        # The table's order is that of the generations, whatever the order in which scores came.
        known = list(dict.fromkeys([*(e for e in self.evaluated if e not in self.population), *self.population]))
        self.evaluated = {encoding: self.evaluated[encoding] for encoding in known}
        self.generation += 1
        self.population = self._next() if self.generation < self.iterations else []

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {
            "version": _VERSION,
            "settings": self._settings(),
            "generation": self.generation,
            "population": [list(encoding) for encoding in self.population],
            "rng": save_generator(self.rng),
            "history": self.history,
            "evaluated": [[list(encoding), score.top1, score.loss] for encoding, score in self.evaluated.items()],
            "seconds": self.seconds,
            "batch_size": self.batch_size,
        }

    def _settings(self) -> dict[str, Any]:
        """What the result depends on besides the scores: a state goes on with the same only."""
        return {
            "algorithm": self.algorithm,
            "network": self.space.description.name,
            "resolution": self.space.resolution,
            "num_classes": self.space.num_classes,
            "budget": {metric: list(limits) for metric, limits in sorted(self.space.budget.items())},
            "evolution": vars(self.evolution),
            "iterations": self.iterations,
            "seed": self.seed,
        }

    def save(self, path: Path) -> None:
        """Write the state, atomically."""
        write_json(path, self.to_json(), "the state of the search")

    def load(self, path: Path) -> None:
        """Go on from :meth:`save`.

        Raises:
            StateError: for a file that is damaged, or of a search with other settings; the message names them.
        """
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["version"] != _VERSION:
                raise StateError(f"{path} has version {state['version']!r}, this fastprune reads {_VERSION}")
            here, there = json.loads(json.dumps(self._settings())), state["settings"]
            differing = [
                f"{name} was {there.get(name)} and is {value}"
                for name, value in here.items()
                if there.get(name) != value
            ]
            if differing:
                raise StateError(
                    f"{path} is of a search with other settings ({'; '.join(differing)}): go on with the same, "
                    "or search anew in another --out, with --pruning-net naming this search's folder"
                )
            self._restore(state)
        except (ValueError, KeyError, TypeError, OSError) as error:
            if isinstance(error, StateError):
                raise
            raise StateError(f"{path} is not the state of a search, or is damaged: {error}") from error

    def _restore(self, state: dict[str, Any]) -> None:
        self.generation, self.history = state["generation"], state["history"]
        self.seconds, self.batch_size = state["seconds"], state["batch_size"]
        self.population = _tuples(state["population"])
        self.evaluated = {tuple(encoding): Score(top1, loss) for encoding, top1, loss in state["evaluated"]}
        self.rng = load_generator(state["rng"])


def _tuples(encodings: Iterable[Sequence[int]]) -> list[Encoding]:
    return [tuple(encoding) for encoding in encodings]
