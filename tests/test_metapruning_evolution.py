"""The evolution keeps to its budget and its rules, and is a function of its generator."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastprune.metapruning import Encoding, costs, describe
from fastprune.metapruning.evolution import (
    Evolution,
    best,
    crossovers,
    first_population,
    load_generator,
    mutations,
    next_population,
    save_generator,
)
from fastprune.metapruning.fitness import Score
from fastprune.metapruning.space import BudgetError, Space, quantity
from fastprune.metapruning.state import Search, StateError

SMALL = Evolution(population=8, mutations=3, crossovers=3, parents=4)


def space(network: str = "resnet20", **budget: tuple[float | None, float | None]) -> Space:
    description = describe(network)
    return Space(description, description.resolution, description.num_classes, budget)


def fitness_of(encodings: list[Encoding]) -> dict[Encoding, float]:
    return {encoding: float(sum(encoding) % 17) for encoding in encodings}


@pytest.mark.parametrize(
    ("network", "budget"),
    [
        ("resnet50", {"flops": (1950e6, 2050e6)}),
        ("mobilenet_v1", {"flops": (None, 330e6)}),
        ("mobilenet_v2", {"flops": (None, 330e6)}),
        ("resnet20", {"macs": (16e6, 20e6), "parameters": (None, 150e3)}),
        ("resnet50", {"flops": (None, 150e6)}),  # a random encoding is never as small
        ("resnet20", {"macs": (40e6, None)}),
    ],
)
def test_every_generation_is_within_the_budget_and_new(
    network: str, budget: Mapping[str, tuple[float | None, float | None]]
) -> None:
    searched = space(network, **budget)
    rng = np.random.default_rng(0)
    seen: dict[Encoding, float] = {}
    for generation in range(4):
        population = (
            next_population(rng, searched, Evolution(), seen)
            if generation
            else first_population(rng, searched, Evolution())
        )
        assert len(population) == len(set(population)) == 50
        assert not set(population) & set(seen)
        counted = costs(network, population)
        for metric, (low, high) in budget.items():
            values = getattr(counted, metric)
            assert values.max() <= (high or np.inf)
            assert values.min() >= (low or 0)
        seen.update(fitness_of(population))


def test_the_first_population_is_uniform_where_all_is_allowed() -> None:
    population = np.array(first_population(np.random.default_rng(0), space(), Evolution(population=2000)))
    counts = np.bincount(population.ravel(), minlength=31)
    expected = population.size / 31
    assert ((counts - expected) ** 2 / expected).sum() < 60  # chi square with 30 degrees of freedom: p < 0.001


def test_mutations_move_a_tenth_of_the_genes_anywhere() -> None:
    parent = (7,) * 12
    rng = np.random.default_rng(0)
    children = np.array(mutations(rng, space(), np.array([parent]), 2000, {parent}, 0.1, rounds=50))
    moved = children != 7
    # One that equals its parent is not new, nor is one that was there before, which is likely where one gene has moved.
    assert 0.1 / (1 - 0.9**12) < moved.mean() < 0.2
    assert set(np.unique(children[moved])) == set(range(31)) - {7}


def test_crossovers_take_each_gene_from_one_of_two_distinct_parents() -> None:
    parents = np.array([[i] * 12 for i in (3, 11, 25)])
    rng = np.random.default_rng(0)
    children = crossovers(rng, space(), parents, 300, {tuple(row) for row in parents.tolist()})
    assert len(children) == 300
    counts = [len(set(child)) for child in children]
    assert set(counts) == {2}
    pairs = {frozenset(child) for child in children}
    assert pairs == {frozenset({3, 11}), frozenset({3, 25}), frozenset({11, 25})}
    from_first = np.mean([child[0] == min(child) for child in children])
    assert 0.4 < from_first < 0.6
    assert crossovers(rng, space(), parents[:1], 5, ()) == []


def test_children_are_mutations_crossovers_and_random_ones_of_the_best() -> None:
    rng = np.random.default_rng(0)
    seen = {(i,) * 12: float(i) for i in range(20)}  # the best 4 are 19, 18, 17, 16
    population = next_population(rng, space(), SMALL, seen)
    for child in population[:3]:
        nearest = min(sum(gene != parent for gene in child) for parent in (16, 17, 18, 19))
        assert 1 <= nearest <= 6
    for child in population[3:6]:
        assert set(child) <= {16, 17, 18, 19}
    assert all(len(set(child)) > 4 for child in population[6:])


def test_the_best_does_not_depend_on_the_order() -> None:
    scores = {(1, 2): 3.0, (0, 5): 3.0, (9, 9): 4.0, (4, 4): 1.0}
    assert best(scores, 3) == [(9, 9), (0, 5), (1, 2)]
    assert best(dict(reversed(scores.items())), 3) == [(9, 9), (0, 5), (1, 2)]


def test_the_generator_comes_back_from_json() -> None:
    rng = np.random.default_rng(5)
    rng.random(7)
    again = load_generator(json.loads(json.dumps(save_generator(rng))))
    assert rng.integers(1 << 30, size=9).tolist() == again.integers(1 << 30, size=9).tolist()


def test_an_impossible_budget_says_how_far_it_is() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(BudgetError, match=r"resnet50 has at most 80,000,000 flops.*has 85,693,617, 5,693,617 more"):
        first_population(rng, space("resnet50", flops=(None, 80e6)), SMALL)
    with pytest.raises(
        BudgetError, match=r"at least 5,000,000,000 macs: the widest has 4,089,184,256, 910,815,744 less"
    ):
        first_population(rng, space("resnet50", macs=(5e9, None)), SMALL)
    with pytest.raises(BudgetError, match=r"budget of macs is empty: at least 2 and at most 1"):
        space(macs=(2.0, 1.0))
    # Each limit is possible alone, both are not.
    with pytest.raises(BudgetError, match=r"macs at least 35,000,000; parameters at most 50,000.*% off: .*parameters"):
        first_population(rng, space(macs=(35e6, None), parameters=(None, 50e3)), SMALL)
    with pytest.raises(ValueError, match="not 'seconds'"):
        space(seconds=(1.0, 2.0))
    with pytest.raises(ValueError, match="needs a table"):
        space(latency_ms=(1.0, 2.0))


def test_a_budget_of_few_encodings_ends_the_search() -> None:
    narrow = space(macs=(None, 309_600.0))  # the narrowest has 309,564
    search = Search(narrow, SMALL, 50, seed=0)
    generations = 0
    while not search.done:
        for encoding in search.pending():
            search.record(encoding, Score(1.0, 1.0))
        search.advance()
        generations += 1
    assert generations < 50
    assert search.evaluated


@given(st.floats(0.001, 1e6), st.sampled_from(["", "k", "K", "M", "G"]))
def test_quantities(number: float, unit: str) -> None:
    factor = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}[unit]
    assert quantity(f"{number!r}{unit}") == pytest.approx(number * factor)


def test_quantities_are_shares_too_and_nothing_else() -> None:
    assert quantity("50%", 40e6) == 20e6
    for text in ("", "x", "M", "-1", "nan", "inf", "%"):
        with pytest.raises(ValueError, match="expected a number"):
            quantity(text, 1.0)
    with pytest.raises(ValueError, match="a share of what"):
        quantity("50%")


def test_the_uniform_network_is_the_nearest() -> None:
    searched = space()
    chosen = searched.uniform("macs", 20e6)
    assert len(set(chosen)) == 1
    all_of_it = costs("resnet20", [[choice] * 12 for choice in range(31)]).macs
    assert chosen[0] == np.abs(all_of_it - 20e6).argmin()


def search_of(
    seed: int = 0, start: list[Encoding] | None = None, **budget: tuple[float | None, float | None]
) -> Search:
    return Search(space(**(budget or {"macs": (15e6, 22e6)})), SMALL, 5, seed, start or [])


def score(encoding: Encoding) -> Score:
    return Score(float(sum(encoding) % 17), 0.5)


@settings(max_examples=10, deadline=None)
@given(st.data())
def test_a_search_saved_at_any_moment_goes_on_to_the_same_result(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("state") / "evolution.json"

    def to_the_end(search: Search, interrupted_at: set[int]) -> Search:
        moment = 0
        while not search.done:
            for encoding in search.pending():
                if moment in interrupted_at:  # what was not saved since is lost
                    search = search_of()
                    search.load(path)
                    interrupted_at.remove(moment)
                    break
                search.record(encoding, score(encoding))
                moment += 1
                if moment % 3 == 0:
                    search.save(path)
            else:
                search.advance()
                search.save(path)
        return search

    search_of().save(path)
    once = to_the_end(search_of(), set())
    search_of().save(path)
    again = to_the_end(search_of(), data.draw(st.sets(st.integers(0, 39), max_size=5)))
    assert (again.evaluated, again.best(8), again.history) == (once.evaluated, once.best(8), once.history)
    assert list(again.evaluated) == list(once.evaluated)
    assert len(once.evaluated) == 40


def test_scores_may_come_in_any_order_and_count_once() -> None:
    one, other = search_of(), search_of()
    while not one.done:
        for encoding in one.pending():
            one.record(encoding, score(encoding))
        for encoding in reversed(other.pending()):
            other.record(encoding, score(encoding))
            other.record(encoding, Score(0.0, 0.0))
        one.advance()
        other.advance()
    assert list(one.evaluated.items()) == list(other.evaluated.items())


def test_a_search_may_start_from_encodings() -> None:
    inside, outside = search_of().population[0], (0,) * 12
    assert search_of(1, [inside, outside]).population[0] == inside
    assert outside not in search_of(1, [inside, outside]).population
    assert len(search_of(1, [inside, outside]).population) == 8


def test_another_searches_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evolution.json"
    search_of().save(path)
    with pytest.raises(StateError, match=r"other settings \(seed was 0 and is 1\)"):
        search_of(1).load(path)
    with pytest.raises(StateError, match=r"budget was .*--pruning-net"):
        search_of(macs=(15e6, 23e6)).load(path)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(StateError, match="is not the state of a search"):
        search_of().load(path)
    with pytest.raises(RuntimeError, match="8 encodings of generation 0 are not evaluated"):
        search_of().advance()


def test_wrong_settings_of_the_evolution_are_refused() -> None:
    with pytest.raises(ValueError, match="5 mutations and 4 crossovers are more than the population of 8"):
        Evolution(8, 5, 4)
    with pytest.raises(ValueError, match="mutation_probability"):
        Evolution(mutation_probability=1.5)
    with pytest.raises(ValueError, match="population"):
        Evolution(population=0, mutations=0, crossovers=0)
