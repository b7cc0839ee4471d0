"""Build, test and bench on a machine with a GPU, and write one report to send back: `make gpu-check`.

What fails is in the report, too, and the steps behind it run nevertheless; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import device as devices
import torch

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """A command, and how many of its last lines the report takes over."""

    title: str
    command: list[str]
    lines: int = 400


@dataclass(frozen=True)
class Outcome:
    """What came of a step."""

    step: Step
    status: int
    seconds: float
    output: list[str]

    @property
    def verdict(self) -> str:
        return "ok" if self.status == 0 else f"FAILED ({self.status})"


def steps(device: str) -> list[Step]:
    """All of them, in order."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "--tb=short"]
    # The ops' tests with the kernels on the GPU in place of those executed on the CPU, and the launchers' own tests.
    tests = ["-m", "", "-k", "cuda-gpu or triton-gpu or test_gpu.py", "--timeout=600"]
    # torch.compile takes minutes for some of the rivals.
    bench = ["bench/", "--benchmark-only", "--benchmark-quiet", "--device", device, "--timeout=1800"]
    return [
        Step("Machine", ["nvidia-smi"], 60),
        Step("Build", [os.environ.get("MAKE", "make"), "environment", "FASTPRUNE_CUDA=1"], 100),
        Step("fastprune.info", [python, "-m", "fastprune.info"]),
        Step("Tests", [*pytest, "tests", *tests]),
        Step("Bench", [*pytest, *bench]),
    ]


def run(step: Step) -> Outcome:
    """Run it; what it prints is seen at once, and kept."""
    print(f"\n== {step.title}: {' '.join(step.command)}", flush=True)
    start, output = time.monotonic(), []
    try:
        process = subprocess.Popen(
            step.command, cwd=ROOT, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as error:  # there is no such program
        print(error, flush=True)
        return Outcome(step, 127, 0.0, [str(error)])
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        output.append(line.rstrip("\n"))
    return Outcome(step, process.wait(), time.monotonic() - start, output)


def commit() -> str:
    """Of the sources; with `-dirty` where they were changed since."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(outcomes: Sequence[Outcome], planned: Sequence[Step]) -> str:
    """The report as Markdown."""
    if len(outcomes) < len(planned):
        verdict = "not finished"
    else:
        verdict = "ok" if all(outcome.status == 0 for outcome in outcomes) else "FAILED"
    lines = [
        f"# fastprune on a GPU: {verdict}",
        "",
        f"Commit {commit()}, {platform.platform()}, Python {platform.python_version()}, torch {torch.__version__} with "
        f"CUDA {torch.version.cuda}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC.",
        "",
        "| step | result | minutes |",
        "|---|---|---|",
        *(f"| {outcome.step.title} | {outcome.verdict} | {outcome.seconds / 60:.1f} |" for outcome in outcomes),
    ]
    for outcome in outcomes:
        kept = outcome.output[-outcome.step.lines :]
        left_out = len(outcome.output) - len(kept)
        lines += ["", f"## {outcome.step.title}", "", f"`{' '.join(outcome.step.command)}`", "", "```"]
        lines += [*([f"({left_out} lines left out)"] if left_out else []), *kept, "```"]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Replace the file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    with scratch.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def check(planned: Sequence[Step], path: Path) -> int:
    """Run the steps, the report growing with each; 0 if none failed."""
    outcomes: list[Outcome] = []
    for step in planned:
        outcomes.append(run(step))
        write(path, report(outcomes, planned))
    failed = [outcome.step.title for outcome in outcomes if outcome.status]
    print(f"\nThe report is in {path}." + (f" FAILED: {', '.join(failed)}." if failed else ""), flush=True)
    return 1 if failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; `arguments` are the command line's, the process's own if None."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__)
    parser.add_argument("--device", default="cuda", help="the GPU to bench: cuda or cuda:<index>; all are tested")
    parser.add_argument("--report", type=Path, default=ROOT / "runs" / "gpu-report.md", help="the file to write")
    options = parser.parse_args(arguments)
    try:
        index = devices.index_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    if index is None:
        parser.error("the device must be a GPU")
    return check(steps(options.device), options.report)


if __name__ == "__main__":
    sys.exit(main())
