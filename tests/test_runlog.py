"""What a run tells while it goes, and what it leaves in its folder."""

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from run_records import FILTERS, LAYERS, record

from fastprune import report, runlog
from fastprune.runlog import Progress, RunLog, duration, write_json

# ---- progress ----


class Clock:
    """Stands for ``time.monotonic``: as late as it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(runlog.time, "monotonic", clock)
    return clock


def run(progress: Progress, clock: Clock, steps: range, seconds: float) -> None:
    progress.start_epoch((steps.start - 1) // progress.steps_per_epoch, (steps.start - 1) % progress.steps_per_epoch)
    for step in steps:
        clock.now += seconds
        progress.step(step, 1.25)
    progress.end_epoch()


def test_elsewhere_than_on_a_terminal_there_are_plain_lines(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    run(Progress(2, 50, 50, 100), clock, range(51, 60), 20.0)
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines() == [
        "epoch 2/2  step 2/50  loss 1.250",
        "epoch 2/2  step 4/50  loss 1.250",
        "epoch 2/2  step 6/50  loss 1.250",
        "epoch 2/2  step 8/50  loss 1.250",
    ]


def test_on_a_terminal_there_is_a_bar(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run(Progress(3, 50, 10, 150), clock, range(11, 51), 20.0)
    assert "epoch 1/3:  20%" in terminal.getvalue()  # ten of its steps were behind
    assert "10/50" in terminal.getvalue()
    assert "step 12/50" not in capsys.readouterr().out


@pytest.mark.parametrize(("limit", "text"), [(1000, "about 33 min"), (100, "about 3 min")])
def test_the_rest_of_the_run_is_estimated_after_its_first_steps(
    clock: Clock, capsys: pytest.CaptureFixture[str], limit: int, text: str
) -> None:
    progress = Progress(10, 100, 0, limit)
    run(progress, clock, range(1, 4), 500.0)  # the first steps are slow, and not counted
    capsys.readouterr()
    run(progress, clock, range(4, 20), 2.0)
    estimates = [line for line in capsys.readouterr().out.splitlines() if "about" in line]
    assert estimates == [f"{text} of training left (tests not counted)"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (42, "42 s"), (420, "7 min"), (3 * 3600 + 5 * 60, "3 h 05 min")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- files ----


def test_the_files_of_a_run(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    log = RunLog(folder, {"model": "resnet20"})
    assert json.loads((folder / "config.json").read_text()) == {"model": "resnet20"}
    assert (folder / "metrics.jsonl").read_text() == ""
    layers = {"layers": LAYERS, "filters_per_layer": FILTERS}
    records = [record(1), {**record(2), **layers}, {**record(3), **layers}]
    for each in records:
        log.add(each)
    assert log.records == records
    assert report.read_metrics(folder) == records
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert ["layers" in json.loads(line) for line in lines] == [True, False, False]


def test_a_run_goes_on_from_its_records(tmp_path: Path) -> None:
    log = RunLog(tmp_path, {})
    for epoch in (1, 2, 3):
        log.add(record(epoch))
    again = RunLog(tmp_path, {}, report.read_metrics(tmp_path)[:1])
    again.add(record(2, 99.0))
    assert [(r["epoch"], r["test"]["top1"]) for r in report.read_metrics(tmp_path)] == [(1, 50.0), (2, 99.0)]


def test_json_is_readable_and_refuses_what_is_no_number(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1]}, "a thing")
    assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"), "a thing")
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1]}


def test_tensorboard_gets_every_figure_if_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path), 2)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            written.append(("flush", 0, 0))

    module: Any = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(runlog.importlib.util, "find_spec", lambda name: name == "tensorboard")
    RunLog(tmp_path, {}, [record(1)]).add(record(2))
    assert {("test/top1", 50.0, 2), ("train/loss", 0.5, 2), ("sparsity", 42.0, 2), ("lr", 0.1, 2)} <= set(written)
    assert written[-1][0] == "flush"


def test_without_tensorboard_there_is_no_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog.importlib.util, "find_spec", lambda name: None)
    log = RunLog(tmp_path, {})
    log.add(record(1))
    assert log.board is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl"]
