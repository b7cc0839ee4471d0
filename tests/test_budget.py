"""A run with ``--minutes`` ends in time, says what it leaves out, and is otherwise the run that it would be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import assert_same, config, state

from fastprune import budget, checkpoint, data, report, train
from fastprune.data import ImageData
from fastprune.recipes import RECIPES, parse
from fastprune.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images() -> ImageData:
    return data.embedded(0, train=50, test=20).resize(8)


@pytest.fixture
def small_data(images: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.plots, "plot_run", lambda run: [])
    monkeypatch.setattr(data, "load", lambda *_, **__: images)


def pretend(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(budget, "seconds_per_step", lambda trainer: seconds)


# 10 minutes allow 450 s of epochs; an epoch of 10,000 images in batches of 100, and 2,500 tested, is 110 steps' work.
@pytest.mark.parametrize(
    ("seconds", "epochs", "train_images", "test_images"),
    [
        (0.6, 6, None, None),
        (0.7, 5, None, None),
        (1.0, 4, None, None),
        (1.4, 3, 9740, 2435),  # 2.9 epochs: three, of a few images less
        (13.6, 3, 1002, 250),
        (1e5, 3, 200, 100),  # there is no run that ends in time: the least that makes new masks
    ],
)
def test_fewer_epochs_then_fewer_images(
    seconds: float, epochs: int, train_images: int | None, test_images: int | None
) -> None:
    asked = config(epochs=6, batch_size=100, minutes=10)
    fewer, decided = budget.fitted(asked, 10_000, 2_500, seconds)
    assert (fewer.epochs, fewer.limit_train, fewer.limit_test) == (epochs, train_images, test_images)
    used = {decision.field: decision.used for decision in decided}
    changed = {"epochs": fewer.epochs, "limit_train": fewer.limit_train, "limit_test": fewer.limit_test}
    assert used == {name: value for name, value in changed.items() if value != getattr(asked, name)}
    assert all("; there is no shorter one" in decision.why for decision in decided) == (seconds == 1e5 or not decided)
    if seconds < 1e5:
        spent = fewer.epochs * seconds / 100 * ((fewer.limit_train or 10_000) + 0.4 * (fewer.limit_test or 2_500))
        assert spent <= 450


def test_a_run_of_few_epochs_keeps_them() -> None:
    fewer, _ = budget.fitted(config(epochs=1, batch_size=100, minutes=10), 10_000, 2_500, 40.0)
    assert fewer.epochs == 1
    assert fewer.limit_train == 1022


def test_a_step_is_timed_over_a_few(images: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(config(minutes=10, batch_size=5), images)
    assert 0 < budget.seconds_per_step(trainer) < 10
    assert trainer.step == 6
    slow = Trainer(config(minutes=1e-9, batch_size=5), images)
    budget.seconds_per_step(slow)
    assert slow.step == 2  # what passes the patience ends it
    short = Trainer(config(minutes=10, batch_size=50), images)
    assert budget.seconds_per_step(short) > 0  # an epoch of one step


def test_only_the_quick_recipe_has_a_time() -> None:
    assert {name: recipe.minutes for name, recipe in RECIPES.items() if recipe.minutes is not None} == {"quick": 10}
    assert parse(["--recipe", "quick", "--minutes", "None"]).minutes is None


def test_the_measurement_leaves_nothing_behind(small_data: None, tmp_path: Path) -> None:
    """Model, optimizer, pruner, sums and records are those of a run without it, to the last bit."""
    changes: dict[str, Any] = {"cutout": 4, "epochs": 2}
    train.run(config(out=tmp_path / "without", **changes))
    train.run(config(out=tmp_path / "with", minutes=1000, **changes))
    assert_same(state(tmp_path / "without"), state(tmp_path / "with"))
    records = [
        [{name: record[name] for name in ("step", "train", "test", "kept_per_layer")} for record in found]
        for found in (report.read_metrics(tmp_path / name) for name in ("without", "with"))
    ]
    assert records[0] == records[1]


def test_it_is_written_before_the_first_step_said_and_kept(
    small_data: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 45 s for epochs; one epoch is 58 images' work.
    pretend(monkeypatch, 10.0)
    written: dict[str, Any] = {}
    train_step = Trainer.train_step

    def step_and_look(trainer: Trainer, indices: torch.Tensor) -> None:
        if not written:
            written.update(json.loads((tmp_path / "config.json").read_text()))
        train_step(trainer, indices)

    monkeypatch.setattr(Trainer, "train_step", step_and_look)
    train.run(config(out=tmp_path, epochs=6, minutes=1, max_steps=2))
    said = capsys.readouterr().out
    assert "epochs 3 (asked for: 6), limit train 32 (asked for: all): a step took 10 s: the run asked for" in said
    assert "and --minutes is 1 (--minutes None for no limit)" in said
    assert (written["config"]["epochs"], written["config"]["limit_train"]) == (3, 32)
    assert written["train_images"] == 32
    assert written["decided"]["epochs"]["asked"] == 6

    def refuse(trainer: Trainer) -> float:
        raise AssertionError("a resumed run was timed")

    monkeypatch.setattr(budget, "seconds_per_step", refuse)
    assert train.main(["--resume", str(tmp_path)]) == 0
    assert checkpoint.load(tmp_path / train.CHECKPOINT)["step"] == 3 * 2
    assert "(asked for: all): decided when the run began: a step took 10 s" in capsys.readouterr().out
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["decided"] == written["decided"]
    assert stored["config"]["minutes"] == 1


def test_a_run_that_ends_in_time_is_left_as_it_is(
    small_data: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, 0.01)
    train.run(config(out=tmp_path, epochs=1, minutes=10, max_steps=1))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["decided"] == {}
    assert (stored["config"]["epochs"], stored["config"]["limit_train"]) == (1, None)


def test_the_data_is_loaded_once(
    images: ImageData, small_data: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The images that are left are those that a run with these limits would have."""
    loaded = []
    monkeypatch.setattr(data, "load", lambda *_, **__: loaded.append(1) or images)
    pretend(monkeypatch, 10.0)
    shortened, _ = train.prepare(made := config(out=tmp_path, epochs=6, minutes=1), train.load_data(made))
    limits = shortened.config.limit_train, shortened.config.limit_test
    assert limits[0] < 50
    assert len(loaded) == 1
    assert torch.equal(shortened.images.train_images, images.subset(*limits).train_images)


def test_minutes_for_a_resumed_run_are_refused(
    small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(config(out=tmp_path, max_steps=1))
    assert train.main(["--resume", str(tmp_path), "--minutes", "5"]) == 1
    assert "--minutes 5 is for a fresh run" in capsys.readouterr().err
    assert train.main(["--resume", str(tmp_path), "--minutes", "None", "--max-steps", "2"]) == 0


def test_another_precision_for_a_resumed_run_keeps_the_other_decisions(
    small_data: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, 10.0)
    train.run(config(out=tmp_path, epochs=6, minutes=1, max_steps=1))
    train.main(["--resume", str(tmp_path), "--precision", "auto", "--max-steps", "2"])
    decided = json.loads((tmp_path / "config.json").read_text())["decided"]
    assert set(decided) == {"epochs", "limit_train", "precision"}
    assert all(set(entry) == {"field", "asked", "used", "why"} for entry in decided.values())
