"""NSGA-II finds a Pareto front within the budget, and goes on from its file to the same one."""

from pathlib import Path

import numpy as np
import pytest

from fastprune.metapruning import Encoding, describe
from fastprune.metapruning.evolution import Evolution
from fastprune.metapruning.fitness import Score
from fastprune.metapruning.nsga2 import ParetoSearch, pareto_front
from fastprune.metapruning.plots import plot_search
from fastprune.metapruning.space import Space
from fastprune.metapruning.state import StateError

pytest.importorskip("pymoo", reason="pymoo is an extra: pip install 'fastprune[search]'")

DESCRIPTION = describe("resnet20")


def space(high: float | None = 30e6) -> Space:
    return Space(DESCRIPTION, 32, 10, {"macs": (None, high)} if high else {})


def search(seed: int = 0, iterations: int = 4, high: float | None = 30e6, population: int = 12) -> ParetoSearch:
    return ParetoSearch(space(high), Evolution(population, 0, 0), iterations, seed, "macs")


def score(encoding: Encoding) -> Score:
    """Wider is better, the first genes most."""
    return Score(sum(gene / (i + 1) for i, gene in enumerate(encoding)), 0.0)


def to_the_end(found: ParetoSearch, generations: int = 100) -> ParetoSearch:
    while not found.done and generations:
        for encoding in found.pending():
            found.record(encoding, score(encoding))
        found.advance()
        generations -= 1
    return found


def test_the_front_is_what_nothing_beats() -> None:
    fitness = {(1,): 10.0, (2,): 20.0, (3,): 15.0, (4,): 30.0, (5,): 30.0, (6,): 5.0}
    costs = {(1,): 1.0, (2,): 2.0, (3,): 3.0, (4,): 4.0, (5,): 4.0, (6,): 0.5}
    assert pareto_front(fitness, costs) == [(6,), (1,), (2,), (4,)]


def test_it_keeps_to_the_budget_and_evaluates_nothing_twice() -> None:
    found = search()
    seen: list[Encoding] = []
    while not found.done:
        seen += found.pending()
        for encoding in found.pending():
            found.record(encoding, score(encoding))
        found.advance()
    assert len(seen) == len(set(seen)) == len(found.evaluated) > 24
    assert found.space.costs(np.array(seen))["macs"].max() <= 30e6
    front = found.front()
    for encoding in front:
        macs, top1 = found.space.costs_of(encoding)["macs"], score(encoding).top1
        beaten = [
            other
            for other in seen
            if found.space.costs_of(other)["macs"] <= macs and score(other).top1 >= top1 and other != encoding
        ]
        assert not beaten


def test_generations_improve_the_front() -> None:
    found = search(iterations=25, high=None, population=20)
    first = to_the_end(found, 1).front()
    last = to_the_end(found).front()

    def dominated(front: list[Encoding]) -> float:
        """The area below the front: accuracy over the share of the widest network's MACs."""
        shares = [found.space.costs_of(encoding)["macs"] / 40_813_184 for encoding in front]
        tops = [score(encoding).top1 for encoding in front]
        return sum(top * (right - left) for top, left, right in zip(tops, shares, [*shares[1:], 1.0]))

    assert dominated(last) > 1.1 * dominated(first)
    assert len(last) > 8


def test_a_saved_search_goes_on_to_the_same(tmp_path: Path) -> None:
    whole = to_the_end(search())
    path = tmp_path / "evolution.json"
    interrupted = to_the_end(search(), 2)
    for encoding in interrupted.pending()[:3]:
        interrupted.record(encoding, score(encoding))
    interrupted.save(path)
    again = search()
    again.load(path)
    assert (again.generation, len(again.evaluated)) == (2, len(interrupted.evaluated))
    to_the_end(again)
    assert again.evaluated == whole.evaluated
    assert again.front() == whole.front()
    again.save(path)
    finished = search()
    finished.load(path)
    assert finished.done
    assert finished.front() == whole.front()
    with pytest.raises(StateError, match="seed was 0 and is 1"):
        search(1).load(path)


def test_other_seeds_search_otherwise() -> None:
    assert search(0).population != search(1).population


def test_the_front_is_drawn(tmp_path: Path) -> None:
    found = to_the_end(search())
    costs = found.space.costs(np.array(list(found.evaluated)))
    drawn = plot_search(tmp_path, DESCRIPTION, found.evaluated, found.best()[0], costs, "macs", found.front())
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
