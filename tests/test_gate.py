"""The gate runs every step, says what took how long, and fails if one failed. `make` is not the real one."""

import os
import shutil
import subprocess
from pathlib import Path

GATE = Path(__file__).resolve().parent.parent / ".ci" / "run"
MAKE = """#!/bin/sh
case $1 in
    lint) echo "a comma is missing"; exit 2;;
    test) sleep 2; echo "===== 7 passed in 1.5s ====="; (setsid sleep 60 &);;
    test-*) echo "===== 5 passed in 1.0s =====";;
    train) echo "trained, but no summary";;
esac
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """The gate in a folder where there is nothing but programs that pretend."""
    (folder / ".ci").mkdir()
    shutil.copy(GATE, folder / ".ci")
    write_program(folder / ".ci/.venv/bin/python", "#!/bin/sh\necho versions\n")
    write_program(folder / "programs/make", MAKE)
    write_program(folder / "programs/nvcc", "#!/bin/sh\n")
    environment = {**os.environ, "PATH": f"{folder / 'programs'}:{os.environ['PATH']}", **environment}
    return subprocess.run(
        [folder / ".ci/run"], env=environment, capture_output=True, text=True, timeout=50, check=False
    )


def test_a_step_that_fails_keeps_no_other_from_running(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1, done.stderr
    assert "a comma is missing" in done.stdout
    times = done.stdout.partition("== what took how long\n")[2].splitlines()
    seconds = [int(line.split(" s  ")[0]) for line in times if " s  " in line]
    assert seconds[:-1] == sorted(seconds[:-1], reverse=True)
    assert seconds[[line.endswith(" s  test") for line in times].index(True)] >= 2
    assert sum(line.endswith("lint: FAILED") for line in times) == 1
    assert {"failed: lint", "failed: train for an epoch"} <= set(times)
    assert times[-2:] == ["===== 5 passed in 1.0s =====", "===== 7 passed in 1.5s ====="]


def test_the_gate_ends_by_itself_before_it_is_cut_off(tmp_path: Path) -> None:
    done = run(tmp_path, GATE_MINUTES="0")
    assert done.returncode == 1
    assert "\ntest: stopped after 1 s\n" in done.stdout
