"""The comparison with Torch-Pruning runs, gives both the same work, and does without Torch-Pruning."""

import json
from pathlib import Path
from typing import Any

import compare_small_models
import pytest

FLAGS = """
    --limit-train 64 --limit-test 32 --image-size 8 --batch-size 32 --epochs 1 --fine-tune 1
    --batches 2 --engines eager --seconds 0
"""
SMALL = FLAGS.split()


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["networks"]}


def test_both_get_the_same_work_and_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch_pruning", reason="Torch-Pruning is an optional rival")
    result = compare_small_models.main([*SMALL, "--json", str(tmp_path / "out.json")])
    rows = by_name(result)
    assert list(rows) == ["dense", "fastprune", "torch-pruning"]
    assert rows["fastprune"]["macs"] < rows["dense"]["macs"]
    assert 0.8 * rows["fastprune"]["macs"] < rows["torch-pruning"]["macs"] <= rows["fastprune"]["macs"]
    assert all(0 <= row["after"] <= 100 and row["seconds_training"] > 0 for row in rows.values())
    assert [timing["name"] for timing in result["latency"]["timings"]] == list(rows)
    assert json.loads((tmp_path / "out.json").read_text())["networks"] == result["networks"]
    assert "torch-pruning" in capsys.readouterr().out


def test_without_torch_pruning_fastprune_is_measured_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_small_models, "find_spec", lambda name: None)
    result = compare_small_models.main(SMALL)
    assert list(by_name(result)) == ["dense", "fastprune"]
    assert result["torch_pruning"] is None
    assert result["options"]["precision"] in ("fp32", "bf16")
    assert "Torch-Pruning is not installed (pip install torch-pruning)" in capsys.readouterr().out
