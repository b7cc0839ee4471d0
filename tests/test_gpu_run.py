"""`.gpu/run` and `make gpu-check`: order, limits and the report, with small commands in the place of the steps."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_gpu
from fake_cuda import FakeDevice
from gpu import every_op, run, runner, sources, steps, training
from gpu.runner import Report, Step

from fastprune import data
from fastprune.recipes import Config

ROOT = Path(__file__).resolve().parent.parent
JUNIT = '<testsuites><testsuite tests="{}" failures="{}" errors="0" skipped="1"/></testsuites>'


def python(name: str, code: str, limit_s: float = 30, **settings: object) -> Step:
    return Step(name, f"what {name} is about", [sys.executable, "-S", "-c", code], limit_s, **settings)  # type: ignore[arg-type]


def run_all(folder: Path, planned: list[Step], wanted: list[str] | None = None, seconds: float = 60) -> tuple[int, str]:
    report = Report(folder / "out", "Commit abc", planned)
    status = runner.run_all(report, [step.name for step in planned] if wanted is None else wanted, seconds, folder)
    return status, (folder / "out" / "report.md").read_text()


def rows(report: str) -> list[tuple[str, str]]:
    """The steps of the report's table, and their results."""
    cells = [line.split(" | ") for line in report.splitlines() if line.startswith("| ")]
    return [(row[0].removeprefix("| "), row[1]) for row in cells[1:]]


@pytest.mark.parametrize("odd", ["<testsuite tests='many'/>", "no XML", ""])
def test_odd_results_stop_nothing(tmp_path: Path, odd: str) -> None:
    junit = tmp_path / "tests.xml"
    code = f"open({str(junit)!r}, 'w').write({odd!r}); print('```')"
    planned = [python("tests", code, junit=junit), python("bench", "print(1)")]
    status, text = run_all(tmp_path, planned)
    assert status == 0
    assert rows(text) == [("tests", "ok"), ("bench", "ok")]


def test_a_folder_in_the_place_of_results_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").mkdir()
    planned = [python("tests", "print(1)", junit=tmp_path / "tests.xml"), python("bench", "print(1)")]
    status, text = run_all(tmp_path, planned)
    assert status == 1
    assert rows(text) == [("tests", "FAILED (127)"), ("bench", "ok")]


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    planned = [
        Step("machine", "", ["no-such-program"], 9),
        python("tests", "import sys; print('FAILED a test'); print('warned', file=sys.stderr); sys.exit(3)"),
        python("bench", "print(*range(500), sep='\\n'); print('12.5 % copy')", lines=3),
    ]
    status, text = run_all(tmp_path, planned)
    assert status == 1
    assert text.startswith("# fastprune on a GPU: FAILED\n\nCommit abc, ")
    assert rows(text) == [("machine", "FAILED (127)"), ("tests", "FAILED (3)"), ("bench", "ok")]
    assert "No such file or directory: 'no-such-program'" in text
    assert "FAILED a test\nwarned\n" in text or "warned\nFAILED a test\n" in text
    assert text.endswith("````\n(498 lines left out; the log has them)\n498\n499\n12.5 % copy\n````\n")
    assert "\n497\n" in (tmp_path / "out" / "log.txt").read_text()
    printed = capfd.readouterr().out
    assert "12.5 % copy" in printed
    assert "FAILED: machine, tests.\n" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "report.md"]


def test_all_is_well(tmp_path: Path) -> None:
    status, text = run_all(tmp_path, [python("bench", "print('é', end='')")])
    assert status == 0
    assert text.startswith("# fastprune on a GPU: ok\n")


def test_the_report_grows_in_order(tmp_path: Path) -> None:
    """Each step sees the report as those before it left it."""
    show = (
        "lines = open('out/report.md').read().splitlines(); "
        "print('seen:', sum('| ok |' in line[:20] for line in lines), lines[0])"
    )
    status, text = run_all(tmp_path, [python(name, show) for name in ("first", "2nd", "third")])
    assert status == 0
    assert [line for line in text.splitlines() if line.startswith("seen:")] == [
        f"seen: {before} # fastprune on a GPU: not finished" for before in range(3)
    ]


def test_a_step_that_hangs_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"started = subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); print(started.pid, flush=True); "
        "time.sleep(60)"
    )
    start = time.monotonic()
    status, text = run_all(tmp_path, [python("deaf", deaf, limit_s=2), python("next", "print('ran')")])
    assert time.monotonic() - start < 10
    assert status == 1
    assert rows(text) == [("deaf", "FAILED, stopped at its limit of 2 s"), ("next", "ok")]
    started = next(int(line) for line in text.splitlines() if line.isdecimal())
    for _ in range(100):  # until what reaps orphans has reaped it
        if not is_there(started):
            break
        time.sleep(0.05)
    assert not is_there(started)


def test_what_left_its_group_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps the step's output open."""
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    code = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(5)'], "
        "start_new_session=True)"
    )
    start = time.monotonic()
    status, _ = run_all(tmp_path, [python("leaves", code)])
    assert status == 0
    assert time.monotonic() - start < 4


def test_a_step_is_interrupted_before_its_limit_to_write_its_results(tmp_path: Path) -> None:
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt:\n    print('written')\n    raise SystemExit(2)"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a script; steps inherit it
    try:
        outcome = runner.run(python("slow", code), 4, tmp_path, io.StringIO())
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.output, outcome.stopped, outcome.ok) == (["written"], True, False)
    assert 3 <= outcome.seconds < 4


@pytest.mark.parametrize(("failed", "verdict"), [(0, "ok, stopped"), (1, "FAILED, stopped"), (None, "FAILED, stopped")])
def test_an_open_ended_step_passes_by_what_it_did(failed: int | None, verdict: str, tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text("of an earlier run")
    write = "" if failed is None else f"open({str(junit)!r}, 'w').write({JUNIT.format(7, failed)!r}); "
    step = python("rows", f"{write}import time; time.sleep(60)", 1, junit=junit, open_ended=True)
    outcome = runner.run(step, 1, tmp_path, io.StringIO())
    assert outcome.verdict.startswith(verdict)
    assert outcome.tests == ({} if failed is None else {"passed": 6 - failed, "failed": failed, "skipped": 1})


def test_tests_are_counted_and_results_of_an_earlier_run_removed(tmp_path: Path) -> None:
    junit, old = tmp_path / "tests.xml", tmp_path / "old.json"
    old.touch()
    code = f"open({str(junit)!r}, 'w').write({JUNIT.format(9, 2)!r}); raise SystemExit(1)"
    status, text = run_all(tmp_path, [python("tests", code, junit=junit, writes=[old])])
    assert status == 1
    assert "| tests | FAILED (1) | 6 passed, 2 failed, 1 skipped | 0 |" in text
    assert not old.exists()


def test_what_is_left_out_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    planned = [
        python("first", ""),
        python("unwanted", "raise SystemExit(1)"),
        python("long", "import time; time.sleep(60)"),
        python("late", ""),
    ]
    start = time.monotonic()
    status, text = run_all(tmp_path, planned, ["first", "long", "late"], seconds=7)
    assert time.monotonic() - start < 9
    assert status == 1
    assert [result for _, result in rows(text)] == [
        "ok",
        "left out: not asked for",
        "FAILED, stopped at its limit of 7 s",
        "left out: no time left",
    ]
    assert text.startswith("# fastprune on a GPU: FAILED\n")
    assert "Left out: unwanted (not asked for); late (no time left)." in capfd.readouterr().out


def test_nothing_runs_where_what_all_need_failed(tmp_path: Path) -> None:
    planned = [python("install", "raise SystemExit(1)", essential=True), python("tests", "")]
    status, text = run_all(tmp_path, planned, ["tests"])
    assert status == 1
    assert rows(text) == [("install", "FAILED (1)"), ("tests", "left out: nothing can run without install")]


def place(tmp_path: Path, pack: Path | None = None, fake: bool = False) -> steps.Place:
    return steps.Place(ROOT, tmp_path / "out", tmp_path / "scratch", pack, fake, 2)


def test_the_steps_come_in_the_order_of_what_they_teach(tmp_path: Path) -> None:
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "fastprune.whl").touch()
    planned = steps.planned(place(tmp_path, pack=tmp_path), minutes=8)
    names = ["info", "gpu", "ops-cuda", "training", "bench", "memcheck", "racecheck", "ops-triton", "bench-compile"]
    assert [step.name for step in planned] == ["install", *names]
    assert planned[0].command[-1].endswith("fastprune.whl")
    assert [step.name for step in steps.planned(place(tmp_path), minutes=8)] == names
    longer = steps.planned(place(tmp_path), minutes=16)
    assert [step.limit_s for step in longer] == [2 * step.limit_s for step in steps.planned(place(tmp_path), minutes=8)]
    assert "compute-sanitizer" in longer[names.index("memcheck")].command


def test_few_files_come_out(tmp_path: Path) -> None:
    """With the report and the log at most eight, which is what some machines hand back."""
    written = {"report.md", "log.txt"}
    for step in steps.planned(place(tmp_path), minutes=8):
        paths = [*step.writes, *([step.junit] if step.junit else [])]
        written |= {path.name for path in paths if path.parent == tmp_path / "out"}
    assert written == {
        *("report.md", "log.txt", "gpu.xml", "ops-cuda.xml", "ops-triton.xml"),
        *("training.json", "bench.json", "bench-compile.json"),
    }


@pytest.mark.slow
def test_every_step_runs_on_the_fake_device(tmp_path: Path) -> None:
    status = run.main(["--fake", "--minutes", "60", "--out", str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert status == 0, text
    assert len(rows(text)) == 9


def test_every_op_is_called_on_the_fake_device(tmp_path: Path) -> None:
    fake = place(tmp_path, fake=True)
    step = next(step for step in steps.planned(fake, minutes=8) if step.name == "memcheck")
    environment = {**os.environ, **fake.environment(), **step.environment}
    ran = subprocess.run(step.command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert all(f"{name} " in ran.stdout for name in test_gpu.CALLS)
    assert "channels-last: ok" in ran.stdout


def test_an_op_that_fails_keeps_no_other_from_being_called(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("no kernel image")

    names = list(test_gpu.CALLS)
    monkeypatch.setitem(test_gpu.CALLS, names[1], (test_gpu.CALLS[names[1]][0], fail))
    monkeypatch.setattr(sys, "argv", ["every_op", "--fake"])
    assert every_op.main() == 1
    said = capsys.readouterr().out
    assert f"{names[1]} " in said
    assert "FAILED: RuntimeError: no kernel image" in said
    assert f"{names[-1]} " in said
    monkeypatch.setattr(every_op, "answers", lambda device: False)
    assert every_op.main() == 1
    assert f"{names[-1]} " not in capsys.readouterr().out


@pytest.mark.parametrize("failing", ["eager", "captured"])
def test_what_was_measured_is_written_though_the_other_way_fails(
    failing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    figures = [{"images_per_s": 1.0, "loss": 2.0, "top1": 3.0}]
    monkeypatch.setattr(training, "eager", lambda trainer: figures)
    monkeypatch.setattr(training, "captured", lambda trainer, device: [{**figures[0], "loss": 2.2}])
    config = Config(model="resnet20", precision="fp32", device="cpu", batch_size=8)
    arguments = config, data.embedded(0, train=10, test=10), FakeDevice(), tmp_path / "training.json"
    assert "do not agree: 2.0000 eager, 2.2000 in a graph" in training.measure(*arguments)
    monkeypatch.setattr(training, failing, fail)
    assert training.measure(*arguments).endswith("RuntimeError: operation not permitted when stream is capturing")
    written = json.loads((tmp_path / "training.json").read_text())
    assert {"eager", "graph"} & set(written) == ({"eager"} if failing == "captured" else set())


def test_without_a_gpu_nothing_passes_for_tested(tmp_path: Path) -> None:
    step = next(step for step in steps.planned(place(tmp_path), minutes=8) if step.name == "gpu")
    environment = {**os.environ, **place(tmp_path).environment(), "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run([*step.command, "--co"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode != 0
    assert "sees no GPU" in ran.stdout
    assert place(tmp_path, fake=True).environment()["FASTPRUNE_NEEDS_GPU"] == "0"


def test_a_fastprune_from_elsewhere_is_a_problem(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpu.machine", "--fake", "--site", str(tmp_path)]
    environment = {**os.environ, **place(tmp_path).environment()}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 1, ran.stderr
    assert f"not from the wheel in {tmp_path}" in ran.stdout
    assert "fastprune._cuda" in ran.stdout  # what serves the ops is said, too


def test_it_needs_nothing_installed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    command = [sys.executable, "-S", "-m", "gpu.run", "--help"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "bench-compile" in ran.stdout


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--steps", "all"]])
def test_usage_errors(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        run.main([*arguments, "--out", str(tmp_path)])
    assert exited.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_pack_of_other_sources_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pack.json").write_text('{"commit": "abc", "sources": "of another time"}')
    assert run.main(["--pack", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "was made of other sources than those in" in capsys.readouterr().err
    (tmp_path / "pack.json").write_text(f'{{"commit": "abc", "sources": "{sources.digest(ROOT)}"}}')
    assert run.described(tmp_path) == "Commit abc"


def test_every_source_counts(tmp_path: Path) -> None:
    for name in (*sources.FOLDERS, "setup.py"):
        origin, copy = ROOT / name, tmp_path / name
        if origin.is_dir():
            shutil.copytree(origin, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(origin, copy)
    before = sources.digest(tmp_path)
    assert before == sources.digest(ROOT)
    for name in ("csrc/cuda/plan.h", "fastprune/ops/sgd_step.py", "kernels/tables.py", "setup.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n")
        after = sources.digest(tmp_path)
        assert after != before
        before = after


def test_make_has_it() -> None:
    outer = ("FASTPRUNE_", "MAKE", "ARGS", "CIFAR")  # of the make that runs the tests
    clean = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    for arguments, expected in (
        (["gpu-check", "ARGS=--steps info"], "PYTHONPATH=bench venv/bin/python -m gpu.run --minutes 60 --steps info"),
        (["gpu-pack", "CIFAR=a b"], "PYTHONPATH=bench venv/bin/python -m gpu.pack --cifar 'a b'"),
    ):
        command = ["make", "-n", "VENV=venv", *arguments]
        shown = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
        assert shown.stdout.splitlines()[-1].strip() == expected, shown
