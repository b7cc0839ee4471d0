"""Runs steps one after another, each within its limit, and rewrites the report after each."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO
from xml.etree import ElementTree

GRACE_S = 10.0  # of a step's limit, what it has to write its results once it is interrupted
LEAST_S = 5.0  # with less time left, no step is begun
FENCE = "````"  # steps may print three


@dataclass(frozen=True)
class Step:
    """A command and how long it may take."""

    name: str
    about: str
    command: Sequence[str]
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)  # beside that of all steps
    junit: Path | None = None  # where it writes its tests' results
    writes: Sequence[Path] = ()  # other results; those of an earlier run are removed
    open_ended: bool = False  # its limit is how it is meant to end
    essential: bool = False  # without it, no other step can run
    lines: int = 200  # of its output, the last so many go into the report


@dataclass(frozen=True)
class Outcome:
    """What became of a step."""

    step: Step
    status: int
    stopped: bool  # at its limit
    seconds: float
    limit_s: float
    output: list[str]

    @property
    def tests(self) -> dict[str, int]:
        """Passed, failed and skipped tests, of those that were run before it ended; empty without a file of them."""
        try:
            suites = list(ElementTree.parse(self.step.junit or "").iter("testsuite"))
            count = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped")}
            failed = sum(int(suite.get(name, 0)) for suite in suites for name in ("failures", "errors"))
        except (OSError, ValueError, ElementTree.ParseError):
            return {}
        passed = count["tests"] - count["skipped"] - failed
        return {"passed": passed, "failed": failed, "skipped": count["skipped"]}

    @property
    def ok(self) -> bool:
        """Whether it passed; an open-ended one that was stopped, if what it did until then passed."""
        if self.stopped:
            return self.step.open_ended and self.tests.get("failed", 1) == 0
        return self.status == 0

    @property
    def verdict(self) -> str:
        """For the report."""
        verdict = "ok" if self.ok else "FAILED"
        if self.stopped:
            verdict += f", stopped at its limit of {self.limit_s:.0f} s"
        elif self.status:
            verdict += f" ({self.status})"
        return verdict


def run(step: Step, limit_s: float, folder: Path, log: IO[str]) -> Outcome:
    """Run it in `folder`; what it prints is seen at once, and goes into the log.

    Some time before the limit it is interrupted, as by Ctrl-C; at the limit, it and all it started are killed.
    """
    start, output = time.monotonic(), []

    def tell(line: str) -> None:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()

    def read(lines: IO[str]) -> None:
        for line in lines:
            tell(line)
            output.append(line.rstrip("\n"))

    tell(f"\n== {step.name}, at most {limit_s:.0f} s: {' '.join(step.command)}\n")
    try:
        for path in (*step.writes, *([step.junit] if step.junit else [])):
            path.unlink(missing_ok=True)
        process = subprocess.Popen(
            step.command,
            cwd=folder,
            env={**os.environ, **step.environment},
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_apart,
        )
    except OSError as error:  # there is no such program, or something lies where its results go
        tell(f"{error}\n")
        return Outcome(step, 127, False, 0.0, limit_s, [str(error)])
    assert process.stdout is not None
    reader = Thread(target=read, args=(process.stdout,), daemon=True)
    reader.start()
    stopped = False
    try:
        grace = min(GRACE_S, limit_s / 4)
        stopped = not _ended(process, limit_s - grace)
        if stopped:
            process.send_signal(signal.SIGINT)
            _ended(process, grace)
    finally:
        _kill_group(process.pid)
    status = process.wait()
    reader.join(GRACE_S)  # what left the group may hold the pipe for ever
    return Outcome(step, status, stopped, time.monotonic() - start, limit_s, output)


def _apart() -> None:
    """In a process group of its own, so that all of it can be killed; and interrupts end it, as by default."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _ended(process: subprocess.Popen[str], within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_group(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


@dataclass
class Report:
    """What is written after each step."""

    folder: Path
    about: str  # of what was run
    planned: Sequence[Step]
    outcomes: list[Outcome] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)  # by step, why

    @property
    def ok(self) -> bool:
        """Whether anything ran and all that ran passed."""
        return bool(self.outcomes) and all(outcome.ok for outcome in self.outcomes)

    def write(self) -> None:
        """Replace the file in one piece."""
        path = self.folder / "report.md"
        scratch = path.with_suffix(".tmp")
        with scratch.open("w", encoding="utf-8") as file:
            file.write("\n".join(self._lines()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)

    def _lines(self) -> Iterator[str]:
        finished = len(self.outcomes) + len(self.left_out) == len(self.planned)
        verdict = "ok" if self.ok else "FAILED"
        yield f"# fastprune on a GPU: {verdict if finished else 'not finished'}"
        yield ""
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
        yield f"{self.about}, {platform.platform()}, Python {platform.python_version()}, {when} UTC."
        yield ""
        yield "| step | result | tests | seconds | |"
        yield "|---|---|---|---|---|"
        outcomes = {outcome.step.name: outcome for outcome in self.outcomes}
        for step in self.planned:
            if outcome := outcomes.get(step.name):
                tests = ", ".join(f"{count} {name}" for name, count in outcome.tests.items() if count)
                yield f"| {step.name} | {outcome.verdict} | {tests} | {outcome.seconds:.0f} | {step.about} |"
            elif step.name in self.left_out:
                yield f"| {step.name} | left out: {self.left_out[step.name]} | | | {step.about} |"
        for outcome in self.outcomes:
            kept = outcome.output[-outcome.step.lines :]
            dropped = len(outcome.output) - len(kept)
            yield from ("", f"## {outcome.step.name}", "", f"`{' '.join(outcome.step.command)}`", "", FENCE)
            yield from ([f"({dropped} lines left out; the log has them)"] if dropped else [])
            yield from (*kept, FENCE)


def run_all(report: Report, wanted: Sequence[str], seconds: float, folder: Path) -> int:
    """Run those of the report's steps that are wanted, in order, as long as there is time; 0 if all that ran passed."""
    deadline = time.monotonic() + seconds
    blocked = ""
    report.folder.mkdir(parents=True, exist_ok=True)
    report.write()
    with (report.folder / "log.txt").open("w", encoding="utf-8") as log:
        for step in report.planned:
            left_s = deadline - time.monotonic()
            if step.name not in wanted and not step.essential:
                report.left_out[step.name] = "not asked for"
            elif blocked:
                report.left_out[step.name] = f"nothing can run without {blocked}"
            elif left_s < LEAST_S:
                report.left_out[step.name] = "no time left"
            else:
                outcome = run(step, min(step.limit_s, left_s), folder, log)
                report.outcomes.append(outcome)
                if step.essential and not outcome.ok:
                    blocked = step.name
            report.write()
    failed = [outcome.step.name for outcome in report.outcomes if not outcome.ok]
    print(f"\nThe report is in {report.folder / 'report.md'}.")
    if failed:
        print(f"FAILED: {', '.join(failed)}.")
    if report.left_out:
        print("Left out: " + "; ".join(f"{name} ({why})" for name, why in report.left_out.items()) + ".")
    return 0 if report.ok else 1
