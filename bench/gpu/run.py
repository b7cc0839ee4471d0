"""Test and measure fastprune on a GPU within so many minutes: `bash .gpu/run` where `make gpu-pack` packed it.

The steps run in the order of what they teach, each within its own limit; one that fails or hangs does not stop the
next. The report grows with each and names what was left out. The exit status is 0 if all that ran passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpu import sources, steps
from gpu.runner import Report, run_all

ROOT = Path(__file__).resolve().parent.parent.parent
WORKERS = 12  # at most: each has a CUDA context


def parse(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu/run", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=steps.MINUTES, help="for all steps together (default: %(default)s)"
    )
    parser.add_argument("--steps", nargs="+", choices=names, default=names, metavar="STEP", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="the folder of the results (default: $OUT, or runs/gpu)")
    parser.add_argument(
        "--pack", type=Path, help="what `make gpu-pack` made; without it, fastprune is installed already"
    )
    parser.add_argument(
        "--fake", action="store_true", help="try the steps out without a GPU, on the tests' fake of one"
    )
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    options.out = (options.out or Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")).resolve()
    return options


def described(pack: Path | None) -> str:
    """Which sources are run.

    Raises:
        ValueError: if the pack was made of others than those it lies beside.
    """
    if pack is None:
        return f"Commit {sources.commit(ROOT)}"
    made_of = json.loads((pack / "pack.json").read_text())
    if made_of["sources"] != sources.digest(ROOT):
        raise ValueError(f"{pack} was made of other sources than those in {ROOT}: run `make gpu-pack` again")
    return f"Commit {made_of['commit']}"


def apart(scratch: Path) -> Path:
    """A copy of what the steps need of the tree, without fastprune itself, which would hide the installed one."""
    tree = scratch / "tree"
    tree.mkdir()
    for name in ("tests", "bench", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; `arguments` are the command line's, the process's own if None."""
    nowhere = steps.Place(ROOT, ROOT, ROOT, None, False, 1)
    options = parse(arguments, [step.name for step in steps.planned(nowhere, steps.MINUTES)])
    try:
        about = described(options.pack)
    except (OSError, KeyError, ValueError) as error:
        print(f"gpu/run: error: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the step that runs is ended, too
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    with tempfile.TemporaryDirectory(prefix="fastprune-gpu-", ignore_cleanup_errors=True) as folder:
        scratch = Path(folder)
        pack = options.pack and options.pack.resolve()
        tree = apart(scratch) if pack else ROOT
        workers = min(os.cpu_count() or 1, WORKERS)
        place = steps.Place(tree, options.out, scratch, pack, options.fake, workers)
        os.environ.update(place.environment())
        report = Report(options.out, about, steps.planned(place, options.minutes))
        return run_all(report, options.steps, options.minutes * 60, tree)


if __name__ == "__main__":
    sys.exit(main())
