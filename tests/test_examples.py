"""The examples run as they are, with the real libraries, and print what they say they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PRINTED = {
    "plain_loop.py": r"epoch 1: test accuracy [\d.]+%, sparsity ([\d.]+) %\nlayer +filters",
    "torchvision_model.py": r"rate 0\.60: (\d+) filters kept, loss [\d.]+\nmasks are final",
    "timm_model.py": r"layer4\.0\.conv2 +512 +256 +50\.0% +\d+ above the layer threshold, (\d+) more for round_to 8",
    "lightning_callback.py": r"8 steps: 397 filters kept, sparsity ([\d.]+) %",
    "transformers_trainer.py": r"16 steps: 72 filters kept, sparsity ([\d.]+) %",
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_runs_and_prints(name: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = re.search(PRINTED[name], done.stdout)
    assert found, done.stdout
    assert float(found[1]) > 0
