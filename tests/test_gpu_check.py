"""`make gpu-check`: what it runs, and the report, with other commands in the place of a GPU machine's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import ROOT, Step


def python(title: str, code: str, lines: int = 400) -> Step:
    return Step(title, [sys.executable, "-c", code], lines)


def test_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "report.md"
    planned = [
        Step("Machine", ["no-such-program"]),
        python("Tests", "import sys; print('FAILED a test'); print('warned', file=sys.stderr); sys.exit(3)"),
        python("Bench", "print(*range(500), sep='\\n'); print('12.5 % copy')", lines=3),
    ]
    assert gpu_check.check(planned, path) == 1
    text = path.read_text()
    assert text.startswith("# fastprune on a GPU: FAILED\n")
    assert f"torch {torch.__version__}" in text
    assert "| Machine | FAILED (127) | 0.0 |\n| Tests | FAILED (3) | 0.0 |\n| Bench | ok | 0.0 |\n" in text
    assert "No such file or directory: 'no-such-program'" in text
    assert "FAILED a test\n" in text  # beside the errors, and the bench ran behind it
    assert "warned\n" in text
    assert text.endswith("```\n(498 lines left out)\n498\n499\n12.5 % copy\n```\n")
    printed = capfd.readouterr().out
    assert "12.5 % copy" in printed
    assert printed.endswith(f"The report is in {path}. FAILED: Machine, Tests.\n")
    assert list(path.parent.iterdir()) == [path]


def test_all_is_well(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    assert gpu_check.check([python("Bench", "print('é', end='')")], path) == 0
    assert path.read_text().startswith("# fastprune on a GPU: ok\n")


def test_a_run_that_was_stopped_has_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gpu_check.run(python("Build", "print('built')"))

    def run(step: Step) -> gpu_check.Outcome:
        if step.title == "Bench":
            raise KeyboardInterrupt
        return first

    monkeypatch.setattr(gpu_check, "run", run)
    with pytest.raises(KeyboardInterrupt):
        gpu_check.check([first.step, python("Bench", "")], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# fastprune on a GPU: not finished\n")
    assert "```\nbuilt\n```" in text


def test_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("cuda", "cuda needs a GPU, and torch"), ("cpu", "the device must be a GPU")):
        with pytest.raises(SystemExit) as exited:
            gpu_check.main(["--device", device, "--report", str(tmp_path / "report.md")])
        assert exited.value.code == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_with_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ran: list[Step] = []

    def run(step: Step) -> gpu_check.Outcome:
        ran.append(step)
        return gpu_check.Outcome(step, 0, 1.0, [])

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.main(["--device", "cuda:1", "--report", str(tmp_path / "report.md")]) == 0
    assert [step.title for step in ran] == ["Machine", "Build", "fastprune.info", "Tests", "Bench"]
    assert "FASTPRUNE_CUDA=1" in ran[1].command
    assert "cuda:1" in ran[4].command


@pytest.mark.slow
def test_the_tests_it_runs_are_those_of_gpus() -> None:
    (tests,) = (step for step in gpu_check.steps("cuda") if step.title == "Tests")
    ran = subprocess.run([*tests.command, "--collect-only"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = [line for line in ran.stdout.splitlines() if "::" in line]
    assert any("test_in_a_graph" in line for line in found)
    assert all("tests/test_gpu.py" in line or "cuda-gpu" in line or "triton-gpu" in line for line in found)


def test_the_bench_it_runs_is_the_bench() -> None:
    (bench,) = (step for step in gpu_check.steps("cuda") if step.title == "Bench")
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")])
    command = [*bench.command, "-p", "fake_cuda", "-k", "floor"]
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "fastprune: median times" in ran.stdout
    assert "(bare read) graph" in ran.stdout


def test_make_has_it() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("FASTPRUNE_", "MAKE"))}
    command = ["make", "-n", "gpu-check", "VENV=venv", "ARGS=--device cuda:1"]
    shown = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert shown.stdout.splitlines()[-1] == "venv/bin/python bench/gpu_check.py --device cuda:1", shown
