"""Records of a run that never ran, and a folder that holds them: for the tests of reports and plots."""

import json
from pathlib import Path
from typing import Any

LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
FILTERS = [16, 16, 32]
CONFIG = {"model": "resnet56", "data": "cifar10", "recipe": "faithful", "epochs": 300}


def record(epoch: int, top1: float = 50.0, **changes: Any) -> dict[str, Any]:
    kept = [8, 0, 24]
    scores = {"loss": 0.5, "top1": top1, "top5": 95.0}
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train": {**scores, "top1": top1 + 1},
        "test": scores,
        "penalty": 1.5,
        "sparsity": 40.0 + epoch,
        "kept_filters": sum(kept),
        "filters": sum(FILTERS),
        "kept_per_layer": kept,
        "lr": 0.1,
        "images_per_s": 100.0 * epoch,
        "seconds": 2.0,
        **({"layers": LAYERS, "filters_per_layer": FILTERS} if epoch == 1 else {}),
        **changes,
    }


def write(run: Path, records: list[dict[str, Any]], config: dict[str, Any] | None = None, tail: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (run / "metrics.jsonl").write_text(lines + tail, encoding="utf-8")
    if config is not None:
        (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return run
