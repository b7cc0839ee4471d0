"""A run's folder belongs to one process at a time, and to nobody once that is gone."""

import contextlib
import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastprune import run_lock, search, train
from fastprune.run_lock import LOCK, InUseError, held

HOLD = """
import sys, time
from pathlib import Path
from fastprune.run_lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another(folder: Path) -> Any:
    """A process that has it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def left(folder: Path, **changes: Any) -> None:
    """What a process that is gone has left."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    holder = {"host": socket.gethostname(), "pid": gone.pid, "started": "1", "since": "noon", "command": "train"}
    (folder / LOCK).write_text(json.dumps({**holder, **changes}))


def test_it_is_there_while_it_lasts_and_gone_with_a_folder_in_which_nothing_was_done(tmp_path: Path) -> None:
    with held(tmp_path / "a" / "run"):
        holder = json.loads((tmp_path / "a" / "run" / LOCK).read_text())
        assert (holder["host"], holder["pid"]) == (socket.gethostname(), os.getpid())
    assert list((tmp_path / "a").iterdir()) == []


def test_it_goes_with_an_error_and_what_was_done_stays(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="of the run"), held(tmp_path / "run"), held(tmp_path / "run" / "final"):
        raise ValueError("of the run")
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with another(tmp_path) as first:
        message = (
            rf"{re.escape(str(tmp_path))} is in use by process {first.pid} on {socket.gethostname()} \(-c .*\) since "
            r"\d{4}-\d\d-\d\d .*: wait for it or stop it, or choose another --out"
        )
        for _ in range(2):
            with pytest.raises(InUseError, match=message), held(tmp_path):
                pass
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert (tmp_path / LOCK).exists()
        with held(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(
    "changes", [{}, {"pid": os.getppid()}, {"pid": "?"}, {"pid": None}], ids=["gone", "another's number", "no", "none"]
)
def test_what_a_process_left_that_is_gone_is_taken_over(tmp_path: Path, changes: dict[str, Any]) -> None:
    left(tmp_path, **changes)
    with held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", '{"host": ', "[1]", "null"])
def test_what_cannot_be_read_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    with held(tmp_path):
        pass


def test_a_process_that_lives_is_believed_where_files_cannot_be_locked(tmp_path: Path) -> None:
    left(tmp_path, pid=os.getppid(), started=run_lock._start_of(os.getppid()))
    with pytest.raises(InUseError, match=f"in use by process {os.getppid()} on "), held(tmp_path):
        pass


def test_another_machine_is_believed_and_how_to_go_on_is_told(tmp_path: Path) -> None:
    left(tmp_path, host="elsewhere", pid=7)
    message = (
        r"in use by process 7 on elsewhere \(train\) since noon: if it is gone, which cannot be seen from "
        rf"{socket.gethostname()}, remove {re.escape(str(tmp_path / LOCK))}; else choose another --out"
    )
    with pytest.raises(InUseError, match=message), held(tmp_path):
        pass
    (tmp_path / LOCK).unlink()
    with held(tmp_path):
        pass


RACE = """
import os, sys, time
from pathlib import Path
from fastprune.run_lock import InUseError, held
folder, start = Path(sys.argv[1]), time.monotonic() + 0.1
children = []
while len(children) < 3:
    if not (child := os.fork()):
        children = []
        break
    children.append(child)
while time.monotonic() < start:
    pass
had = 0
while had < 50 and time.monotonic() < start + 30:
    try:
        with held(folder):
            os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))
            had += 1
            os.unlink(folder / "alone")
    except InUseError:
        time.sleep(0)
failed = [os.waitpid(child, 0)[1] for child in children]
os._exit(had < 50 or any(failed))
"""


def test_of_those_that_take_over_at_once_one_has_it_at_a_time(tmp_path: Path) -> None:
    left(tmp_path)
    raced = subprocess.run([sys.executable, "-c", RACE, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert (raced.returncode, raced.stderr) == (0, "")


def test_a_file_that_goes_before_it_is_locked_is_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, removed = run_lock._lock, []

    def as_the_first_ends(descriptor: int) -> bool:
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        return lock(descriptor)

    monkeypatch.setattr(run_lock, "_lock", as_the_first_ends)
    with held(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_what_the_killed_were_writing_is_swept(tmp_path: Path) -> None:
    rests = ["checkpoint.safetensors.0123456789ab.tmp", "pruning_net/metrics.json.0123456789ab.tmp"]
    others = ["checkpoint.safetensors", "network.onnx.0123456789ab.tmp", "notes.tmp"]
    (tmp_path / "pruning_net").mkdir()
    for name in (*rests, *others):
        (tmp_path / name).touch()
    with held(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == others


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"could not write who is at work: No space .*in_use\.json"), held(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [train, search])
def test_commands_refuse_a_folder_in_use(tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path):
        assert command.main(["--recipe", "quick", "--out", str(tmp_path), "--data", "embedded"]) == 1
    said = capsys.readouterr()
    assert f"error: {tmp_path} is in use by process {os.getpid()} on " in said.err
    assert said.out == ""
    assert not list(tmp_path.iterdir())
