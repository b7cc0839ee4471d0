"""Tests of GPU kernels whose verdict is known: executed again only where something changed that it depends on.

A plugin of pytest, at work where `--verdicts` is given. `check` (the gate) leaves out what `clean.txt` has with the
key that it has now, but for a tenth that is drawn anew each time; `update` leaves out all of that, and writes down what
the others came to; `rewrite` executes everything and writes that down.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import ptxrun
import pytest

from . import table
from .keys import Keys

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("clean.txt")
INTERPRETED = "triton-interpreted"  # these tests run in a process of their own
PHASES = {"setup", "call", "teardown"}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("verdicts", "tests of GPU kernels whose verdict is known")
    group.addoption(
        "--verdicts", choices=("check", "update", "rewrite"), help="what to do with the table of clean tests"
    )
    group.addoption("--verdicts-seed", type=int, help="repeat the draw of an earlier `--verdicts=check`")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--verdicts"):
        config.pluginmanager.register(Verdicts(config))


def versions() -> dict[str, str]:
    """Of what compiles and computes. Python's own changes no result."""
    nvcc = "none"
    if ptxrun.NVCC:
        told = subprocess.run([ptxrun.NVCC, "--version"], capture_output=True, text=True, check=True).stdout
        nvcc = re.findall(r"release .*", told)[-1]
    return {"nvcc": nvcc} | {name: metadata.version(name).split("+")[0] for name in ("triton", "torch", "numpy")}


def is_drawn(seed: int, nodeid: str) -> bool:
    """Whether a clean test is of the tenth that this seed executes again."""
    return int(hashlib.sha256(f"{seed} {nodeid}".encode()).hexdigest(), 16) % 10 == 0


def updated(clean: dict[str, str], keys: dict[str, str], passed: dict[str, bool], gone: set[str]) -> dict[str, str]:
    """The table after a run: what passed with its key, without what did not pass or is gone; the rest stays."""
    kept = {nodeid: key for nodeid, key in clean.items() if nodeid not in gone and nodeid not in passed}
    return kept | {nodeid: keys[nodeid] for nodeid, clean_now in passed.items() if clean_now and keys.get(nodeid)}


class Verdicts:
    """Chooses what is executed, and gathers what it came to. With xdist each process chooses, the first one gathers."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.mode = config, config.getoption("--verdicts")
        given = getattr(config, "workerinput", {}).get("verdicts seed", config.getoption("--verdicts-seed"))
        self.seed: int = secrets.randbelow(10**6) if given is None else given
        self.phases: defaultdict[str, list[tuple[str, bool]]] = defaultdict(list)
        self.params: dict[str, dict[str, Any]] = {}
        self.chosen: dict[str, Any] = {}

    @property
    def command(self) -> str:
        interpreted = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
        arguments = [*self.config.invocation_params.args, f"--verdicts-seed={self.seed}"]
        return f"{interpreted}{os.path.relpath(sys.executable)} -m pytest {shlex.join(map(str, arguments))}"

    def pytest_report_header(self) -> str:
        return f"verdicts: {self.mode}" + (f", seed {self.seed}: {self.command}" if self.mode == "check" else "")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Iterator[None]:
        collected = [item.nodeid for item in items]
        yield
        for item in items:
            if item.get_closest_marker("gpu_kernels") or INTERPRETED in item.name:
                self.params[item.nodeid] = item.callspec.params if hasattr(item, "callspec") else {}
        found, known = self._keys(), table.read(TABLE)
        clean = {nodeid for nodeid, key in found.items() if known.get(nodeid) == key}
        again = {nodeid for nodeid in clean if self.mode == "check" and is_drawn(self.seed, nodeid)}
        left_out = set() if self.mode == "rewrite" else clean - again
        self.config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left_out])
        items[:] = [item for item in items if item.nodeid not in left_out]
        counts = {"total": len(found), "left out": len(left_out), "again": len(again)}
        self.chosen = {"keys": found, "collected": collected, **counts}

    def _keys(self) -> dict[str, str]:
        keys = Keys(ROOT, versions())
        return {nodeid: keys.key(nodeid, params) for nodeid, params in self.params.items()}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.phases[report.nodeid].append((report.when, report.passed))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["verdicts seed"] = self.seed

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.chosen = getattr(node, "workeroutput", {}).get("verdicts", self.chosen)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.chosen.get("left out"):
            session.exitstatus = pytest.ExitCode.OK  # all of them are known to be clean
        if self.params and self.mode != "check":  # what was edited meanwhile has no verdict: which of the two ran?
            self.chosen["keys"] = dict(self.chosen["keys"].items() & self._keys().items())
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["verdicts"] = self.chosen
        elif self.mode != "check" and self.chosen:
            passed = {
                nodeid: set(phases) == {(phase, True) for phase in PHASES} for nodeid, phases in self.phases.items()
            }
            known = table.read(TABLE)
            table.write(TABLE, updated(known, self.chosen["keys"], passed, self._gone(known)))

    def _gone(self, known: dict[str, str]) -> set[str]:
        """The tests in the table that their file has no more, of the kind that this process collects."""
        if self.mode != "rewrite" or any("::" in argument for argument in self.config.args):
            return set()  # not all tests of a file were generated
        collected = set(self.chosen["collected"])
        files = {nodeid.split("::")[0] for nodeid in collected}
        interpreted = any(INTERPRETED in nodeid for nodeid in collected)
        same = {nodeid for nodeid in known if (INTERPRETED in nodeid) == interpreted}
        return {nodeid for nodeid in same - collected if nodeid.split("::")[0] in files}

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.chosen:
            return
        total, left_out, again = self.chosen["total"], self.chosen["left out"], self.chosen["again"]
        terminalreporter.section("verdicts")
        line = f"{left_out} of {total} remembered as clean and left out, {total - left_out - again} executed"
        if self.mode == "check":
            line += f", {again} executed again at random (seed {self.seed}): repeat with\n{self.command}"
        terminalreporter.write_line(line)
