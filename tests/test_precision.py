"""What ``--precision auto`` comes to: by what the processor says, and what one convolution takes."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import assert_same, config, state
from torch import nn

from fastprune import data, models, precision, search, train
from fastprune.data import ImageData
from fastprune.decisions import Decision, earlier, lines
from fastprune.metapruning.settings import RECIPES as SEARCHES
from fastprune.metapruning.settings import read_config
from fastprune.recipes import RECIPES, parse
from fastprune.trainer import Trainer

SHAPE = (16, 3, 8, 8)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def images() -> ImageData:
    return data.embedded(0, train=50, test=20).resize(8)


@pytest.fixture
def small_data(images: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.plots, "plot_run", lambda run: [])
    monkeypatch.setattr(data, "load", lambda *_, **__: images)


def pretend(monkeypatch: pytest.MonkeyPatch, native: str | None, fp32: float, bf16: float) -> None:
    monkeypatch.setattr(precision, "native_bf16", lambda device: native)
    monkeypatch.setattr(precision, "time_both", lambda *_: {"fp32": fp32, "bf16": bf16})


def refuse(*_: Any) -> None:
    raise AssertionError("something was timed")


def choose() -> precision.Choice:
    return precision.choose(models.create("resnet20"), SHAPE, torch.channels_last)


# ---- the decision ----


@pytest.mark.parametrize(
    ("native", "fp32", "bf16", "chosen"),
    [
        ("AVX512-BF16", 2.0, 1.0, "bf16"),
        ("AVX512-BF16", 1.0, 1.09, "bf16"),  # within the noise: the processor decides
        ("AVX512-BF16", 1.0, 1.2, "fp32"),  # measured wins
        ("AVX512-BF16", 1.0, 13.0, "fp32"),  # an AVX-512 machine under ONEDNN_MAX_CPU_ISA=AVX2
        (None, 1.0, 13.0, "fp32"),
        (None, 1.09, 1.0, "fp32"),
        (None, 1.2, 1.0, "bf16"),  # measured wins
    ],
)
def test_what_is_measured_wins_where_it_is_clear(
    monkeypatch: pytest.MonkeyPatch, native: str | None, fp32: float, bf16: float, chosen: str
) -> None:
    pretend(monkeypatch, native, fp32, bf16)
    choice = choose()
    assert choice.precision == chosen
    assert f"{1e3 * fp32:.2f} ms in fp32, {1e3 * bf16:.2f} ms in bf16" in choice.why
    assert f"this CPU has {native or 'no bf16 arithmetic'}" in choice.why


def test_bf16_that_cannot_run_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("could not create a primitive\nmore")

    monkeypatch.setattr(precision, "time_both", fail)
    assert choose() == precision.Choice("fp32", "bf16 and fp32 could not be compared: could not create a primitive")


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": False}, None),
        ({"avx2": True}, None),
        ({"avx512_bf16": True, "amx_bf16": False}, "AVX512-BF16"),
        ({"avx512_bf16": True, "amx_bf16": True}, "AMX-bf16"),
    ],
)
def test_what_a_cpu_says(monkeypatch: pytest.MonkeyPatch, features: dict[str, bool], name: str | None) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert precision.native_bf16(torch.device("cpu")) == name


@pytest.mark.parametrize(("capability", "name"), [((7, 5), None), ((8, 0), "bf16 of sm_80"), ((9, 0), "bf16 of sm_90")])
def test_what_a_gpu_says(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.native_bf16(torch.device("cuda")) == name


# ---- the measurement ----


def test_the_costliest_kind_of_convolution_is_timed() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
    )
    convolution, inputs = precision.costliest_convolution(model, SHAPE)
    assert convolution is model[2]
    assert inputs == (4, 8, 8)
    alike = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 1) for _ in range(9)))
    assert precision.costliest_convolution(alike, SHAPE)[0] is alike[1]  # each by itself takes less than the first


def test_a_model_without_convolutions_is_told() -> None:
    with pytest.raises(ValueError, match="no convolution to time"):
        precision.costliest_convolution(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), SHAPE)


def test_both_are_timed_and_nothing_changes() -> None:
    model = models.create("resnet20").train()
    model.bn1.eval()
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    convolution, inputs = precision.costliest_convolution(model, SHAPE)
    seconds = precision.time_both(convolution, (4, *inputs), torch.channels_last)
    assert set(seconds) == {"fp32", "bf16"}
    assert all(0 < value < 1 for value in seconds.values())
    assert_same(before, model.state_dict())
    assert torch.equal(generator, torch.get_rng_state())
    assert model.training
    assert not model.bn1.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


# ---- runs ----


def test_which_recipes_leave_it_open() -> None:
    assert {name: recipe.precision for name, recipe in RECIPES.items()} == {
        "fast": "auto",
        "quick": "auto",
        "faithful": "fp32",
        "description": "fp32",
    }
    assert all(recipe.precision == "auto" for recipe in SEARCHES.values())


@pytest.mark.parametrize("forced", ["fp32", "bf16"])
def test_nothing_is_timed_where_a_precision_is_named(
    images: ImageData, monkeypatch: pytest.MonkeyPatch, forced: str
) -> None:
    monkeypatch.setattr(precision, "choose", refuse)
    trainer = Trainer(config(precision=forced), images)
    assert trainer.config.precision == forced
    assert trainer.decided == []


@pytest.mark.parametrize(("bf16", "chosen"), [(0.5, "bf16"), (8.0, "fp32")])
def test_a_run_says_what_it_decided_and_a_resumed_one_keeps_it(
    small_data: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bf16: float,
    chosen: str,
) -> None:
    pretend(monkeypatch, "AVX512-BF16", 1.0, bf16)
    train.run(config(out=tmp_path, precision="auto", max_steps=2))
    said = capsys.readouterr().out
    assert f"on cpu, in {chosen}\n" in said
    assert f"precision {chosen} (asked for: auto): Conv2d(" in said
    first = json.loads((tmp_path / "config.json").read_text())
    assert first["precision"] == first["config"]["precision"] == first["decided"]["precision"]["used"] == chosen
    assert first["decided"]["precision"]["asked"] == "auto"
    monkeypatch.setattr(precision, "choose", refuse)  # on whatever machine it goes on
    resumed = parse(["--resume", str(tmp_path)])
    assert resumed.precision == chosen
    train.run(resumed)
    assert json.loads((tmp_path / "config.json").read_text())["decided"] == first["decided"]


def test_another_precision_for_a_resumed_run_is_no_decision_of_its_own(
    small_data: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch, "AVX512-BF16", 1.0, 0.5)
    train.run(config(out=tmp_path, precision="auto", max_steps=1))
    assert [decision.used for decision in earlier(tmp_path, config(precision="bf16"))] == ["bf16"]
    assert earlier(tmp_path, config(precision="fp32")) == []


def test_auto_trains_as_what_it_comes_to(images: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None, 1.0, 8.0)
    states = []
    for name in ("auto", "fp32"):
        trainer = Trainer(config(precision=name), images)
        list(trainer.train_steps(2))
        states.append(trainer.state_dict())
    assert_same(*states)


def test_a_search_decides_once(
    small_data: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = replace(SEARCHES["quick"], data="embedded", network="resnet20", image_size=8, batch_size=8, device="cpu")
    pretend(monkeypatch, None, 1.0, 0.5)
    search.run(replace(tiny, out=tmp_path, stage="train", max_steps=1, recalibration=8))
    assert "precision bf16 (asked for: auto): Conv2d(" in capsys.readouterr().out
    assert read_config(tmp_path).precision == "bf16"
    assert json.loads((tmp_path / "config.json").read_text())["decided"]["precision"]["asked"] == "auto"


def test_a_damaged_record_of_decisions_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"decided": {"precision": {"is": 1}}}')
    with pytest.raises(ValueError, match=r"config\.json is not a run's configuration"):
        earlier(tmp_path, config())
    (tmp_path / "config.json").write_text("{}")
    assert earlier(tmp_path, config()) == []
    assert earlier(None, config()) == []
    decisions = [Decision("epochs", 6, 3, "so"), Decision("limit_train", None, 5, "so"), Decision("x", 1, 2, "thus")]
    said = ["epochs 3 (asked for: 6), limit train 5 (asked for: all): so", "x 2 (asked for: 1): thus"]
    assert lines(decisions) == said


def test_a_resumed_run_has_its_state(small_data: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, "AVX512-BF16", 1.0, 0.5)
    train.run(config(out=tmp_path / "whole", precision="auto"))
    train.run(config(out=tmp_path / "parts", precision="auto", max_steps=3))
    pretend(monkeypatch, None, 1.0, 8.0)
    train.run(parse(["--resume", str(tmp_path / "parts")]))
    assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"))
