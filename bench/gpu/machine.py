"""The step `info`: what the machine is, and that the fastprune that is tested is the one that was carried."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

import fastprune
from fastprune import info, kernels, ops


def problems(site: Path | None, fake: bool) -> Iterator[str]:
    """What makes the other steps' results those of something else."""
    for module in (fastprune, kernels):
        place = Path(module.__file__ or "").resolve()
        if site and not place.is_relative_to(site.resolve()):
            yield f"{module.__name__} is imported from {place}, not from the wheel in {site}"
    if not fake and not torch.cuda.is_available():
        yield f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU"
    if "fastprune._cuda" not in sys.modules:
        yield "fastprune._cuda is not loaded"
    for entry in ops.backends():
        if entry.device == "cuda" and entry.implementation != "cuda":
            yield f"{entry.op} is served by {entry.implementation} on GPUs, not by its CUDA kernel: {entry.why}"


def main() -> int:
    """Print both; the exit status is 1 if there is a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", type=Path, help="the folder that fastprune must have come from")
    parser.add_argument("--fake", action="store_true", help="no GPU is needed")
    options = parser.parse_args()
    for command in (["nvidia-smi"], ["nvcc", "--version"]):
        if shutil.which(command[0]):
            sys.stdout.flush()
            subprocess.run(command, check=False)
    info.main([])
    found = list(problems(options.site, options.fake))
    for problem in found:
        print(f"PROBLEM: {problem}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
