"""Where the tests of the CUDA kernels find nvcc."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
from ptxrun import find_nvcc


def program(path: Path) -> str:
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return str(path)


def test_named_then_on_the_path_then_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named, on_path = program(tmp_path / "mine" / "nvcc-13"), program(tmp_path / "bin" / "nvcc")
    packaged = program(tmp_path / "site" / "nvidia" / "cu13" / "bin" / "nvcc")
    record = tmp_path / "site" / "nvidia_cuda_nvcc-13.0.88.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-cuda-nvcc\nVersion: 13.0.88\n")
    (record / "RECORD").write_text("nvidia/cu13/bin/nvcc.profile,,\nnvidia/cu13/bin/nvcc,,\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PTXRUN_NVCC", named)
    assert find_nvcc() == named
    monkeypatch.setenv("PTXRUN_NVCC", "nvcc-that-is-not-there")
    assert find_nvcc() == ""  # not another than the one asked for
    monkeypatch.delenv("PTXRUN_NVCC")
    assert find_nvcc() == on_path
    monkeypatch.setenv("PATH", "")
    assert find_nvcc() == packaged


def test_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def files(package: str) -> None:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "files", files)
    monkeypatch.delenv("PTXRUN_NVCC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert find_nvcc() == ""
