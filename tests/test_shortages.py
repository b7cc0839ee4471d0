"""Where memory or the disk run out, commands say so in a line, and leave what was there."""

import errno
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import command, state
from torch import nn

import fastprune
from fastprune import export, search, train
from fastprune.memory import is_out_of_memory
from fastprune.trainer import Trainer

SHORTAGES = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: not enough memory: you tried to allocate"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]


@pytest.mark.parametrize("error", SHORTAGES, ids=["python", "cuda", "cpu", "cpu, older"])
def test_commands_say_that_memory_ran_out(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(*_: Any, **__: Any) -> Any:
        raise error

    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("expected 3 channels"))
    monkeypatch.setattr(train.data, "load", short)
    assert train.main(command(tmp_path / "run")) == 1
    monkeypatch.setattr(export, "compact", short)
    fastprune.save(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path / "net.safetensors", torch.zeros(1, 3, 2, 2))
    assert export.main([str(tmp_path / "net.safetensors"), "--format", "pt2"]) == 1
    assert search.main(["--recipe", "quick", "--out", str(tmp_path / "search")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(": error: memory ran out")[0] for line in said] == [f"fastprune.{c}" for c in COMMANDS]
    assert said[0].endswith(". A smaller --batch-size, or --accumulate, takes less. No checkpoint was written yet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.safetensors"]


COMMANDS = ["train", "export", "search"]


def test_a_run_whose_memory_runs_out_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_step, settings = Trainer.train_step, {"limit_train": 32, "limit_test": 8, "image_size": 8}

    def short(trainer: Trainer, indices: Any) -> None:
        if trainer.step == 3:
            raise SHORTAGES[2]
        train_step(trainer, indices)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", short)
        assert train.main(command(tmp_path, **settings)) == 1
    assert capsys.readouterr().err.endswith(f". The last checkpoint is whole: continue with --resume {tmp_path}\n")
    assert train.main(["--resume", str(tmp_path)]) == 0
    assert state(tmp_path)["step"] == 4


def test_other_errors_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(train.data, "load", wrong)
    for run in (train.main, search.main):
        with pytest.raises(RuntimeError, match="a fault of ours"):
            run(["--recipe", "quick", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("kind", ["onnx", "pt2", "safetensors"])
def test_an_export_to_a_full_disk_leaves_the_file_before(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fastprune.save(nn.Sequential(nn.Conv2d(3, 4, 1)), tmp_path / "net", torch.zeros(1, 3, 2, 2))
    (tmp_path / "out").write_text("before")
    monkeypatch.setattr(fastprune.checkpoint, "os", types.SimpleNamespace(**{**vars(os), "fsync": full}))
    assert export.main([str(tmp_path / "net"), "--format", kind, "--out", str(tmp_path / "out")]) == 1
    assert "error: [Errno 28] could not write the" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "out"]
