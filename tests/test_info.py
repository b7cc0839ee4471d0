"""The report names every op's implementation and why, as text and as JSON, with and without compiled modules."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy
import pytest
import torch

import fastprune
from fastprune import info
from fastprune.layer_kinds import FUNCTIONS, METHODS, MODULES


@pytest.fixture
def _chosen_backend() -> Iterator[None]:
    chosen = fastprune.ops.get_backend()
    yield
    fastprune.set_backend(chosen)


def test_it_reports_the_versions_that_run() -> None:
    versions = info.collect()["versions"]
    assert versions["fastprune"] == fastprune.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert versions["numpy"] == numpy.__version__


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "_PACKAGES", ("no-such-package",))
    assert info.collect()["versions"]["no-such-package"] == "not installed"


def test_it_reports_every_op_as_backends_does() -> None:
    rows = info.collect()["ops"]
    assert [tuple(row.values()) for row in rows] == [
        (row.op, row.device, row.implementation, row.why) for row in fastprune.backends()
    ]
    text = info.render(info.collect())
    for row in fastprune.backends():
        assert any(line.split()[:3] == [row.op, row.device, row.implementation] for line in text.splitlines())
        assert row.why in text


@pytest.mark.usefixtures("_chosen_backend")
def test_a_forced_backend_shows() -> None:
    fastprune.set_backend("reference")
    report = info.collect()
    assert report["backend"] == "reference"
    assert {(row["implementation"], row["why"]) for row in report["ops"]} == {("reference", "forced")}
    assert "backend: reference" in info.render(report)


def test_cpu_threads_and_cuda() -> None:
    report = info.collect()
    assert report["cpu"]["name"]
    assert report["cpu"]["instruction_set"] == fastprune.ops.cpu_isa()
    assert report["cpu"]["instruction_sets"] == list(fastprune.ops.cpu_isas())
    assert report["threads"]["torch"] == torch.get_num_threads()
    assert report["threads"]["cores"] >= 1
    assert report["cuda"]["torch"] == torch.version.cuda
    assert len(report["cuda"]["devices"]) == torch.cuda.device_count()
    for device, name in (("cpu", "_cpu"), ("cuda", "_cuda")):
        assert report[device]["module"]["loaded"] == (f"fastprune.{name}" in sys.modules)


def test_a_module_that_torch_cannot_use_is_built_but_not_loaded() -> None:
    report = info.collect()
    report["cuda"] = {"torch": None, "devices": [], "module": {"built": True, "loaded": False}}
    report["cpu"]["module"] = {"built": False, "loaded": False}
    text = info.render(report)
    assert "built, not loaded: this torch has no CUDA" in text
    assert "none: this torch was built without" in text
    assert any(line.split(maxsplit=1) == ["fastprune._cpu", "not built"] for line in text.splitlines())


def test_columns_are_aligned() -> None:
    lines = info.render(info.collect()).splitlines()
    header = next(line for line in lines if "implementation" in line)
    table = lines[lines.index(header) : lines.index(header) + 1 + len(fastprune.backends())]
    for title in ("device", "implementation", "why"):
        column = header.index(title)
        assert all(line[column - 1] == " " and line[column] != " " for line in table)


def test_json_is_the_same_report(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_unknown_flags_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        info.main(["--jsn"])
    assert stopped.value.code == 2
    assert "--jsn" in capsys.readouterr().err


def test_it_runs_as_a_module() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "fastprune.info"],
        env=os.environ | {"FASTPRUNE_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.startswith("Versions\n")
    assert "Ops (backend: reference)" in ran.stdout
    assert ran.stderr == ""


def test_it_lists_the_layers_and_functions(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--layers", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == {*MODULES, *FUNCTIONS, *(f"Tensor.{name}" for name in METHODS)}
    assert rows["Conv2d"]["channels"] == rows["FrozenBatchNorm2d"]["channels"] == "made smaller"
    assert rows["GroupNorm"]["channels"] == rows["functional.conv2d"]["channels"] == "kept whole"
    assert (
        rows["AvgPool2d"]["channels"] == rows["torch.cat"]["channels"] == rows["Tensor.relu_"]["channels"] == "followed"
    )
    assert "divisor_override" in rows["AvgPool2d"]["arguments"]
    info.main(["--layers"])
    told = capsys.readouterr().out
    assert all(name in told for name in rows)
