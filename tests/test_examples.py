"""The examples run as they are, with the real libraries, and print what they say they print."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# The rate decides how many filters are kept; coupled ones at the threshold go together, and min_kept brings a few back.
PRINTED = {  # a number in what is printed, and its bounds
    "plain_loop.py": (r"epoch 1: test accuracy [\d.]+%, sparsity [\d.]+ %\nlayer (?s:.*)\nall +784 +(\d+)", 384, 420),
    "torchvision_model.py": (r"rate 0\.60: (\d+) filters kept, loss [\d.]+\nmasks are final", 1914, 1960),
    "timm_model.py": (r"layer4\.0\.conv2 +512 +(\d+) +50\.0% +\d+ above the layer threshold, .*\d+ more for", 256, 256),
    "lightning_callback.py": (r"8 steps: (\d+) filters kept, sparsity [\d.]+ %", 384, 420),
    "transformers_trainer.py": (r"16 steps: (\d+) filters kept, sparsity [\d.]+ %", 72, 80),
}


def test_every_example_is_here() -> None:
    assert sorted(PRINTED) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", PRINTED)
def test_runs_and_prints(name: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    pattern, least, most = PRINTED[name]
    found = re.search(pattern, done.stdout)
    assert found, done.stdout
    assert least <= int(found[1]) <= most, done.stdout
