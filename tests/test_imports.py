"""What is loaded before it is used: every process that imports fastprune waits for it."""

import subprocess
import sys

HEAVY = ("torchvision", "torch._dynamo", "torch._inductor", "sympy", "triton", "matplotlib", "PIL", "tyro", "tqdm")


def loaded_by(statement: str) -> set[str]:
    """Those of `HEAVY` that a statement loads beyond what torch does."""
    script = f"""
import sys, torch
before = set(sys.modules)
{statement}
print(*({set(HEAVY)!r} & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import fastprune") == set()


def test_training_loads_torchvision_when_its_networks_or_data_are_used() -> None:
    assert "torchvision" not in loaded_by("import fastprune.train\nfastprune.models.create('resnet20')")
    assert "torchvision" in loaded_by("import fastprune.train\nfastprune.models.create('resnet18')")
