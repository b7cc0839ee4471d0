"""A search for a Pareto front of accuracy against cost, by NSGA-II of pymoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .encoding import WIDEST, Encoding
from .evolution import Evolution, as_encodings, first_population
from .space import Population, Space
from .state import Search, StateError

_NO_ACCURACY = 100.0  # error in percent


class ParetoSearch(Search):
    """NSGA-II: error and a cost are minimised together, within the budget.

    What is outside of the budget is not evaluated; pymoo is told how far outside it is. No state of pymoo's is kept:
    all of it follows from the seed and the scores, and a search that goes on asks and tells again what it did before.

    Args:
        space, evolution, iterations, seed, start: as for :class:`Search`; of the evolution the population counts.
        objective: the metric to weigh against accuracy.

    Raises:
        ImportError: without pymoo, saying how to get it.

    Source:
        Deb et al., "A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II", 2002; Blank and Deb, "pymoo", 2020.
    """

    algorithm = "nsga2"

    def __init__(
        self,
        space: Space,
        evolution: Evolution,
        iterations: int,
        seed: int,
        objective: str = "macs",
        start: Sequence[Encoding] = (),
    ) -> None:
        self.objective = objective
        self.start = list(start)
        super().__init__(space, evolution, iterations, seed, start)

    def _first(self, start: Sequence[Encoding]) -> list[Encoding]:
        chosen = [encoding for encoding in dict.fromkeys(start) if self.space.within(np.array([encoding]))[0]]
        drawn = first_population(self.rng, self.space, self.evolution)
        sampled = list(dict.fromkeys([*chosen, *drawn]))[: self.evolution.population]
        self.pymoo = _make_nsga2(np.array(sampled), self.evolution.population, self.space.genes, self.seed)
        return self._ask()

    def _ask(self) -> list[Encoding]:
        """What pymoo wants to know next and is within the budget."""
        self.asked = self.pymoo.ask()
        rows = _rows(self.asked)
        return list(dict.fromkeys(as_encodings(rows[self.space.within(rows)])))

    def _next(self) -> list[Encoding]:
        """Tell pymoo what it asked for, and ask again."""
        rows = _rows(self.asked)
        encodings, costs, excess = as_encodings(rows), self.space.costs(rows)[self.objective], self.space.excess(rows)
        errors = [
            100 - self.evaluated[encoding].top1 if encoding in self.evaluated else _NO_ACCURACY
            for encoding in encodings
        ]
        self.asked.set("F", np.column_stack([errors, costs]), "G", np.abs(excess)[:, None])
        for individual in self.asked:
            individual.evaluated.update({"F", "G"})
        self.pymoo.tell(infills=self.asked)
        return self._ask()

    @property
    def done(self) -> bool:
        """Whether all generations are evaluated."""
        return self.generation >= self.iterations

    def advance(self) -> None:
        """Go on to the next generation, of which everything may be outside of the budget."""
        if self.population:
            super().advance()
            return
        self.history.append({**self.history[-1], "evaluated": len(self.evaluated)})
        self.generation += 1
        self.population = self._next() if self.generation < self.iterations else []

    def front(self) -> list[Encoding]:
        """The encodings that no other one beats in both accuracy and cost, the cheapest first."""
        encodings = list(self.evaluated)
        costs = self.space.costs(np.array(encodings))[self.objective]
        return pareto_front(self.fitness(), dict(zip(encodings, costs.tolist())))

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "objective": self.objective}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        generation, population, evaluated, history = self.generation, self.population, self.evaluated, self.history
        self.rng = np.random.default_rng(self.seed)
        self.population = self._first(self.start)
        for _ in range(generation):
            self.population = self._next()
        self.generation, self.evaluated, self.history = generation, evaluated, history
        if generation >= self.iterations:
            self.population = []
        elif self.population != population:
            raise StateError("this release of pymoo does not repeat the search that was saved: search anew")


def pareto_front(fitness: Mapping[Encoding, float], costs: Mapping[Encoding, float]) -> list[Encoding]:
    """Those that no other one beats in both, the cheapest first; of equals the smaller encoding."""
    front: list[Encoding] = []
    for encoding in sorted(fitness, key=lambda e: (costs[e], -fitness[e], e)):
        if not front or fitness[encoding] > fitness[front[-1]]:
            front.append(encoding)
    return front


def _rows(asked: Any) -> Population:
    return np.asarray(asked.get("X")).round().astype(np.int64)


def _make_nsga2(first: Population, population: int, genes: int, seed: int) -> Any:
    try:
        from pymoo.algorithms.moo.nsga2 import NSGA2
        from pymoo.core.problem import Problem
        from pymoo.core.termination import NoTermination
        from pymoo.operators.crossover.ux import UniformCrossover
        from pymoo.operators.mutation.pm import PolynomialMutation
        from pymoo.operators.repair.rounding import RoundingRepair
    except ModuleNotFoundError as error:
        raise ImportError(
            "--algorithm nsga2 needs pymoo: pip install 'fastprune[search]', or pip install pymoo"
        ) from error
    problem = Problem(n_var=genes, n_obj=2, n_ieq_constr=1, xl=0, xu=WIDEST, vtype=int)
    algorithm = NSGA2(
        pop_size=population,
        sampling=first,
        crossover=UniformCrossover(prob=0.9),
        mutation=PolynomialMutation(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    algorithm.setup(problem, termination=NoTermination(), seed=seed, verbose=False)
    return algorithm
