"""Latencies add up from a table of layers, which is kept in a file and says how good it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_metapruning_pruning_net import TINY
from torch import nn

from fastprune.metapruning.evolution import Evolution, first_population
from fastprune.metapruning.latency import LatencyTable, Setting, TableError, measure_ms, open_table
from fastprune.metapruning.settings import parse
from fastprune.metapruning.space import BudgetError, Space


class Clock:
    """Measures by a formula: a part for each convolution, and in a whole network 20 % more, and 3 ms."""

    def __init__(self, noise: float = 0.0) -> None:
        self.calls = 0
        self.noise = noise
        self.rng = np.random.default_rng(0)

    def __call__(self, module: nn.Module, shape: tuple[int, ...]) -> float:
        self.calls += 1
        layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        ms = sum(0.1 + 1e-4 * layer.weight.numel() for layer in layers)
        whole = shape[1] == 3 and len(layers) > 1
        return (1.2 * ms + 3 if whole else ms) * (1 + self.noise * self.rng.standard_normal())


def table(path: Path, clock: Clock) -> LatencyTable:
    return LatencyTable(path / "table.json", TINY, 12, 5, Setting(), clock)


def test_predictions_are_those_of_the_whole_network(tmp_path: Path) -> None:
    clock = Clock()
    latencies = table(tmp_path, clock)
    checked = latencies.fit_and_check()
    assert checked["worst"] < 1e-6
    assert (latencies.scale, latencies.offset) == pytest.approx((1.2, 3.0))
    assert "within 0.0 % of what was measured (mean 0.0 %)" in latencies.said()
    encoding = (7, 3, 21)
    assert latencies(np.array([encoding]))[0] == pytest.approx(latencies.measure_networks([encoding])[0])


def test_each_shape_is_measured_once_and_kept(tmp_path: Path) -> None:
    clock = Clock()
    latencies = table(tmp_path, clock)
    population = np.random.default_rng(0).integers(31, size=(30, 3))
    first = latencies(population)
    measured = clock.calls
    assert measured == 7 * len(latencies.entries) < 7 * 30 * 6  # in seven rounds
    assert (latencies(population) == first).all()
    again = table(tmp_path, clock)
    assert (again(population) == first).all()
    assert clock.calls == measured


def test_the_table_says_when_it_is_not_good_enough(tmp_path: Path) -> None:
    latencies = table(tmp_path, Clock(noise=0.2))
    latencies.fit_and_check()
    assert latencies.checked["worst"] > 0.05
    assert "MORE THAN 5 %" in latencies.said()
    assert json.loads(latencies.path.read_text())["checked"] == latencies.checked


def test_a_budget_of_latency_is_kept(tmp_path: Path) -> None:
    latencies = table(tmp_path, Clock())
    latencies.fit_and_check()
    widest = latencies(np.array([[30] * 3]))[0]
    space = Space(TINY, 12, 5, {"latency_ms": (None, widest / 2)}, latencies)
    population = np.random.default_rng(1).integers(31, size=(50, 3))
    assert (space.within(population) == (latencies(population) <= widest / 2)).all()
    assert space.costs_of((30,) * 3)["latency_ms"] == widest
    impossible = Space(TINY, 12, 5, {"latency_ms": (None, 0.1)}, latencies)
    with pytest.raises(BudgetError, match=r"latency_ms at most 0.1.*% off"):
        first_population(np.random.default_rng(0), impossible, Evolution(4, 0, 0))


def test_a_damaged_table_is_told(tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text("[]", encoding="utf-8")
    with pytest.raises(TableError, match=r"is not a table of latencies.*delete it"):
        table(tmp_path, Clock())


def test_measuring_takes_longer_for_more_work() -> None:
    setting = Setting()
    small, large = (measure_ms(nn.Conv2d(c, c, 3, padding=1), (1, c, 32, 32), setting, 5, 1) for c in (4, 128))
    assert 0 < small < large


def test_tables_are_kept_apart_by_what_they_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastprune.metapruning.latency.measure_ms", lambda module, shape, _: Clock()(module, shape))
    common = ["--recipe", "quick", "--data-root", str(tmp_path), "--max-latency-ms", "5", "--device", "cpu"]
    common += ["--precision", "fp32"]  # a search has decided what auto is by then
    one = open_table(parse(common), 32, 10)
    other = open_table(parse([*common, "--latency-batch", "2"]), 32, 10)
    assert one.path != other.path
    assert one.path.parent == tmp_path / "latency"
    assert one.checked["worst"] < 1e-6
    written = json.loads(other.path.read_text(encoding="utf-8"))
    assert written["setting"]["batch"] == 2
    assert written["setting"]["threads"] == torch.get_num_threads()
