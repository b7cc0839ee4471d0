"""The command runs its stages together and apart, stops at signals, and goes on to the same result."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastprune import checkpoint, search
from fastprune.metapruning import cost
from fastprune.metapruning.encoding import as_text
from fastprune.metapruning.fitness import Fitness
from fastprune.metapruning.settings import RECIPES, SearchConfig, parse, read_config
from fastprune.metapruning.training import PruningTrainer
from fastprune.train import Interrupted

# Everything small: MobileNetV1's layers are few, and 8 pixels leave it one.
TINY = dataclasses.replace(
    RECIPES["quick"],
    data="embedded",
    image_size=8,
    limit_train=80,
    limit_test=20,
    epochs=2,
    batch_size=24,
    population=4,
    iterations=2,
    mutations=2,
    crossovers=1,
    parents=3,
    recalibration=32,
    evaluation_batch=16,
    final_epochs=1,
    final_batch_size=32,
    precision="fp32",
    device="cpu",
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """The same bits everywhere, and quicker for networks as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def summary_of(out: Path) -> Any:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def result_of(out: Path) -> tuple[Any, ...]:
    """What must be the same whatever interrupted the search: all but times."""
    state = json.loads((out / search.STATE).read_text(encoding="utf-8"))
    del state["seconds"]
    tensors = checkpoint.load(search.checkpoint_of(out))["network"]
    return state, {name: tensor.tolist() for name, tensor in tensors.items() if tensor.numel() < 1000}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search done in one go."""
    out = tmp_path_factory.mktemp("whole") / "run"
    torch.set_num_threads(1)
    search.run(dataclasses.replace(TINY, out=out))
    return out


def test_all_stages_report_what_they_found(whole: Path) -> None:
    summary = summary_of(whole)
    assert summary["pruning_net"]["epoch"] == 2
    found = summary["search"]
    assert found["evaluated"] == 8
    assert len(found["history"]) == found["generations"] == 2
    counted = cost("resnet20", found["best"], 8)
    assert found["costs"]["macs"] == counted.macs
    half = cost("resnet20", [30] * 12, 8).macs / 2
    assert 0.8 * half <= counted.macs <= half
    assert found["validation"]["top1"] == max(
        row[1] for row in json.loads((whole / search.STATE).read_text())["evaluated"]
    )
    final = json.loads((whole / "final" / "config.json").read_text(encoding="utf-8"))
    assert final["model"] == f"resnet20@{as_text(found['best'])}"
    assert (final["test_images"], final["train_images"]) == (20, 80)
    assert summary["final"]["last"]["test"]["top1"] >= 0
    for name in ("search.png", "widths.png", "final/curves.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")


def test_stages_alone_come_to_the_same(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = dataclasses.replace(TINY, out=out)
    search.run(dataclasses.replace(first, stage="train"))
    assert "search" not in summary_of(out)
    with pytest.raises(search.SearchError, match=r"no evolution yet: do it with --stage evolve"):
        search.run(dataclasses.replace(first, stage="final", resume=out))
    search.run(dataclasses.replace(first, stage="evolve", resume=out))
    assert "final" not in summary_of(out)
    search.run(dataclasses.replace(first, stage="final", resume=out))
    assert result_of(out) == result_of(whole)
    assert summary_of(out)["final"]["last"]["test"] == summary_of(whole)["final"]["last"]["test"]


@pytest.mark.parametrize("stop", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 5))])
def test_the_training_goes_on_bit_by_bit_from_any_step(stop: int, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = dataclasses.replace(TINY, out=out, stage="train")
    search.run(dataclasses.replace(config, max_steps=stop))
    assert checkpoint.load(search.checkpoint_of(out))["step"] == stop
    with pytest.raises(search.SearchError, match=rf"has done {stop} of 6 steps: finish it with --resume"):
        search.run(dataclasses.replace(config, stage="evolve", resume=out))
    search.run(dataclasses.replace(config, resume=out))
    there, here = (checkpoint.load(search.checkpoint_of(run)) for run in (whole, out))
    assert here["step"] == there["step"] == 6
    for part in ("network", "optimizer"):
        assert _equal(here[part], there[part])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_each_step_has_a_fresh_random_encoding() -> None:
    images = search.split(search.data.embedded(train=40, test=10), 0.25)
    trainer = PruningTrainer(dataclasses.replace(TINY, batch_size=4), images)
    encodings = [trainer.encoding(step) for step in range(200)]
    assert len(set(encodings)) == 200
    assert {gene for encoding in encodings for gene in encoding} == set(range(31))
    assert encodings[7] == trainer.encoding(7)
    seen = []
    trainer.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    for _ in trainer.train_steps(3):
        pass
    assert seen == encodings[:3]


def test_weights_decay_and_biases_do_not() -> None:
    images = search.split(search.data.embedded(train=40, test=10), 0.25)
    trainer = PruningTrainer(TINY, images)
    decayed, others = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (TINY.weight_decay, 0.0)
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len(list(trainer.network.parameters()))


@pytest.mark.parametrize("moment", [3, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (1, 4, 6, 8))])
def test_a_signal_saves_the_evolution_which_goes_on_to_the_same(
    moment: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, evaluated = tmp_path / "run", list[Any]()
    once = Fitness.__call__

    def interrupted(self: Fitness, encoding: Any) -> Any:
        evaluated.append(encoding)
        if len(evaluated) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        return once(self, encoding)

    config = dataclasses.replace(TINY, out=out, stage="train")
    search.run(config)
    monkeypatch.setattr(Fitness, "__call__", interrupted)
    with pytest.raises(Interrupted):
        search.run(dataclasses.replace(config, stage="evolve", resume=out))
    search.run(dataclasses.replace(config, stage="evolve", resume=out))
    assert result_of(out) == result_of(whole)
    assert len(evaluated) == len(set(evaluated)) == 8  # nothing twice


def command(*arguments: object) -> list[str]:
    settings = {
        field.name: getattr(TINY, field.name)
        for field in dataclasses.fields(SearchConfig)
        if field.name not in ("out", "resume", "recipe")
        and getattr(TINY, field.name) not in (None, getattr(RECIPES["quick"], field.name))
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "fastprune.search", "--recipe", "quick", *words, *map(str, arguments)]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_result(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    wait_for = [search.checkpoint_of(out), out / search.STATE, out / "final" / "config.json"]
    arguments = command("--out", out)
    for path in wait_for:
        process = subprocess.Popen(
            arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        deadline = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()  # no chance to save anything
        said = process.communicate()[0]
        assert path.exists(), said
        arguments = command("--resume", out)
    finished = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr
    assert "trained from scratch" in finished.stdout
    assert result_of(out) == result_of(whole)
    assert summary_of(out)["final"]["last"]["test"] == summary_of(whole)["final"]["last"]["test"]


def test_another_search_takes_the_pruning_net_within_another_budget(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = dataclasses.replace(
        TINY, out=out, stage="evolve", pruning_net=whole, min_macs=None, max_macs=None, max_parameters="20%"
    )
    summary = search.run(config)
    assert summary["search"]["share_of_widest"]["parameters"] <= 0.2
    assert not search.checkpoint_of(out).exists()
    assert summary["pruning_net"] == summary_of(whole)["pruning_net"]


def test_a_folder_that_holds_a_search_is_not_written_over(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search.main(command("--out", whole)[3:]) == 1
    assert "holds a search: continue it with --resume" in capsys.readouterr().err


def test_an_impossible_budget_is_told_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert search.main(command("--out", out, "--max-macs", "0.1%", "--min-macs", "0")[3:]) == 1
    assert "no resnet20 has at most" in capsys.readouterr().err
    assert not out.exists()


def test_the_evolution_needs_a_trained_network(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, out=tmp_path / "run", stage="evolve")
    with pytest.raises(search.SearchError, match="no PruningNet yet"):
        search.run(config)


def test_the_checkpoint_of_another_network_is_refused(whole: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, network="resnet32", out=tmp_path / "run", stage="evolve", pruning_net=whole)
    with pytest.raises(search.TrainingError, match="network_name was resnet20 and is resnet32"):
        search.run(config)


def test_recipes_of_the_paper_depend_on_the_network() -> None:
    paper = parse([])
    assert (paper.network, paper.epochs, paper.lr, paper.weight_decay) == ("resnet50", 32, 0.1, 1e-4)
    assert (paper.population, paper.iterations, paper.mutations, paper.crossovers, paper.parents) == (
        50,
        20,
        25,
        25,
        10,
    )
    assert [paper.learning_rate(step, 100) for step in (0, 24, 25, 50, 75, 99)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.001, 0.0001, 0.0001]
    )
    assert paper.budget(224, 1000) == {"flops": (1950e6, 2050e6)}
    mobile = parse(["--network", "mobilenet_v2"])
    assert (mobile.epochs, mobile.lr) == (64, 0.25)
    assert mobile.budget(224, 1000) == {"flops": (None, 330e6)}
    assert parse(["--network", "mobilenet_v1", "--epochs=3"]).epochs == 3


def test_budgets_are_ranges_of_any_metric() -> None:
    config = parse(
        ["--recipe", "quick", "--max-flops", "20M", "--min-parameters=10%", "--max-parameters=100k", "--min-macs=None"]
    )
    assert config.max_macs == "50%"
    whole = cost("resnet20", [30] * 12)
    assert config.budget(32, 10) == {
        "flops": (None, 20e6),
        "macs": (None, whole.macs / 2),
        "parameters": (pytest.approx(whole.parameters / 10), 100e3),
    }


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--network", "vgg"], "no encodings of 'vgg'"),
        (["--validation", "1"], "--validation must be above 0 and below 1"),
        (["--epochs", "0"], "--epochs must be above 0"),
        (["--max-macs", "many"], "expected a number such as 330M"),
        (["--resume", "nowhere"], "is not the folder of a search"),
        (["--layers", "56"], "nrecognized"),
    ],
)
def test_bad_arguments_end_with_a_message(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
    out = capsys.readouterr()
    assert said in out.err + out.out


def test_the_configuration_comes_back(whole: Path) -> None:
    assert read_config(whole) == dataclasses.replace(TINY, out=whole)
    resumed = parse(["--resume", str(whole), "--iterations", "3"])
    assert resumed == dataclasses.replace(TINY, out=whole, resume=whole, iterations=3)


def test_help_is_complete(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')}" in said for field in dataclasses.fields(SearchConfig))


def test_numbers_that_do_not_go_together_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--recipe", "quick", "--data", "embedded", "--population", "4", "--mutations", "3", "--crossovers", "2"]
    assert search.main([*flags, "--precision", "fp32", "--out", str(tmp_path / "run")]) == 1
    assert "error: 3 mutations and 2 crossovers are more than the population of 4" in capsys.readouterr().err
