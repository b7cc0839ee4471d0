"""Make `.gpu/`, what a machine with a GPU and no network needs besides a clone of this repository: `make gpu-pack`.

There, `bash .gpu/run` installs the wheels, tests and measures. The folder holds fastprune's wheel with CUDA code for
sm_90 and PTX for later GPUs, wheels of pure Python, and CIFAR-10 if it is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gpu import images, sources

ROOT = Path(__file__).resolve().parent.parent.parent
ARCHITECTURES = "9.0+PTX"
CARRIED = ("tyro", "expecttest")  # with what they need; torch's own packages and pytest's are taken to be there
LIMIT_BYTES = 40_000_000
RUN = """#!/usr/bin/env bash
# Made by `make gpu-pack`. For example: bash .gpu/run --minutes 8
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
export PYTHONPATH="$here/../bench"
exec "${PYTHON:-python3}" -m gpu.run --pack "$here" "$@"
"""


def wheel(folder: Path, build: Path) -> None:
    """Build fastprune's wheel into `folder`, from a copy of the sources in `build`, where objects stay for the next."""
    for name in (*sources.FOLDERS, "build/lib", "build/bdist"):
        for stale in build.glob(f"{name}*"):
            shutil.rmtree(stale)
    for name in sources.FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, build / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, build)
    pip("wheel", str(build), "--no-build-isolation", "--no-deps", "--wheel-dir", str(folder))


def pip(command: str, *arguments: str) -> None:
    """Run pip in this tree, where PIP_CONSTRAINT is found; what fails raises CalledProcessError."""
    quiet = ["--disable-pip-version-check", "--no-input", "--quiet"]
    environment = {**os.environ, "FASTPRUNE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURES}
    subprocess.run([sys.executable, "-m", "pip", command, *quiet, *arguments], cwd=ROOT, env=environment, check=True)


def carry(folder: Path) -> None:
    """Download wheels for any Python 3 and machine: what is not pure Python is an error."""
    any_machine = ["--implementation", "py", "--abi", "none", "--platform", "any", "--python-version", "3.12"]
    pip("download", "--only-binary=:all:", *any_machine, "--dest", str(folder), *CARRIED)


def finish(folder: Path, target: Path, limit: int = LIMIT_BYTES) -> int:
    """Put the finished folder in the place of `target`, and return its size in bytes.

    Raises:
        ValueError: if it is larger than the limit; the target is left as it was.
    """
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(sizes.values())
    if total > limit:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:3]
        named = ", ".join(f"{path.relative_to(folder)} {sizes[path] / 1e6:.1f} MB" for path in largest)
        raise ValueError(
            f"the pack has {total / 1e6:.1f} MB, more than the {limit / 1e6:g} MB that can be carried; largest: "
            f"{named}. Give a smaller image folder, or none"
        )
    if target.exists():
        shutil.rmtree(target)
    folder.replace(target)
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; `arguments` are the command line's, the process's own if None."""
    parser = argparse.ArgumentParser(prog="gpu-pack", description=__doc__)
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as JPEG files: train/<class>/*.jpg and test/<class>/*.jpg")
    options = parser.parse_args(arguments)
    build = ROOT / "build" / "gpu"
    staging = build / "pack"
    if staging.exists():
        shutil.rmtree(staging)
    (staging / "wheels").mkdir(parents=True)
    try:
        if options.cifar:  # the quick one first: its errors come at once
            count = images.pack(options.cifar.expanduser(), staging / "cifar10.jpegs")
            print(f"packed {count:,} images", flush=True)
        carry(staging / "wheels")
        print(f"building the wheel for {ARCHITECTURES} (a few minutes the first time)", flush=True)
        made_of = {"commit": sources.commit(ROOT), "sources": sources.digest(ROOT)}
        wheel(staging / "wheels", build)
        (staging / "pack.json").write_text(json.dumps(made_of, indent=1) + "\n")
        (staging / "run").write_text(RUN)
        (staging / "run").chmod(0o755)
        size = finish(staging, ROOT / ".gpu")
    except (ValueError, OSError) as error:
        print(f"gpu-pack: error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"gpu-pack: error: {' '.join(error.cmd)} failed", file=sys.stderr)
        return 1
    for path in sorted(path for path in (ROOT / ".gpu").rglob("*") if path.is_file()):
        print(f"{path.stat().st_size / 1e6:8.2f} MB  {path.relative_to(ROOT)}")
    print(f"{size / 1e6:8.2f} MB in all. On the machine with the GPU: bash .gpu/run --minutes 8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
