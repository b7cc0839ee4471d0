"""How results are taken and shown: one table of all ops, and the ratios that are promised."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import layers
import pytest
import torch
from layers import Measure, Work
from pytest_benchmark.fixture import BenchmarkFixture

from fastprune import ops


@dataclass(frozen=True)
class Result:
    """One timed rival."""

    op: str
    network: str
    rival: str
    seconds: float  # median
    work: Work


_RESULTS = pytest.StashKey[list[Result]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the place where results gather."""
    config.stash[_RESULTS] = []


@pytest.fixture(params=layers.NAMES)
def network(request: pytest.FixtureRequest) -> layers.Network:
    """ResNet-56 (all launch overhead) and ResNet-50 (all memory and arithmetic)."""
    return layers.network(request.param)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Measure:
    """Time `call` in the group (op, network); `seconds` is about how long to spend."""

    def run(
        op: str, network: layers.Network, rival: str, call: Callable[[], Any], work: Work, seconds: float = 0.6
    ) -> None:
        benchmark.group = f"{op} {network.name}"
        benchmark.extra_info.update(bytes=work.bytes, flops=work.flops)
        once = _time_of(call)
        rounds = int(min(max(seconds / once, 3), 200))
        benchmark.pedantic(call, rounds=rounds, iterations=1, warmup_rounds=min(rounds // 3, 10))
        if benchmark.stats is None:  # --benchmark-disable: run once, not timed
            return
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(
            gb_per_s=round(work.bytes / median / 1e9, 2), gflop_per_s=round(work.flops / median / 1e9, 2)
        )
        request.config.stash[_RESULTS].append(Result(op, network.name, rival, median, work))

    return run


def _time_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the machine, the table and the promised ratios."""
    results = config.stash[_RESULTS]
    if not results:
        return
    terminalreporter.section("fastprune: median times")
    terminalreporter.write_line(_machine())
    terminalreporter.write_line(
        f"{'op':<28}{'network':<10}{'rival':<22}{'median ms':>10}{'GB/s':>8}{'GFLOP/s':>9}{'× ours':>8}"
    )
    for result in results:
        ours = _seconds(results, result.op, result.network, "fastprune")
        terminalreporter.write_line(
            f"{result.op:<28}{result.network:<10}{result.rival:<22}{result.seconds * 1e3:>10.3f}"
            f"{result.work.bytes / result.seconds / 1e9:>8.1f}{result.work.flops / result.seconds / 1e9:>9.1f}"
            f"{result.seconds / ours if ours else float('nan'):>8.2f}"
        )
    terminalreporter.section("fastprune: expected ratios")
    for line in _verdicts(results):
        terminalreporter.write_line(line)


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    return (
        f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"backend {ops.get_backend()}, instruction set {ops.cpu_isa()}, load {os.getloadavg()[0]:.1f} "
        f"(times are of use only where nothing else runs)"
    )


def _seconds(results: list[Result], op: str, network: str, *rivals: str) -> float | None:
    """The fastest of the rivals, by the beginning of their names."""
    times = [r.seconds for r in results if (r.op, r.network) == (op, network) and r.rival.startswith(rivals)]
    return min(times) if times else None


def _verdicts(results: list[Result]) -> list[str]:
    """PASS or FAIL for each ratio this project promises, of what was timed in this run."""
    expected = [
        ("update_filter_masks_", "resnet50", "original", 30.0),
        ("update_filter_masks_", "resnet50", "pytorch", 3.0),
        ("covariance fwd+bwd", "resnet56", "pytorch", 2.0),
        ("covariance fwd+bwd", "resnet50", "pytorch", 2.0),
    ]
    ops_timed = dict.fromkeys(result.op for result in results)
    expected += [(op, "resnet56", "pytorch", 1.0) for op in ops_timed if op != "covariance fwd+bwd"]
    lines = []
    for op, network, rival, at_least in expected:
        ours, theirs = _seconds(results, op, network, "fastprune"), _seconds(results, op, network, rival)
        if ours is None or theirs is None:
            continue  # not part of this run (-k)
        ratio = theirs / ours
        verdict = "PASS" if ratio >= at_least else "FAIL"
        lines.append(f"{verdict}  {op:<28}{network:<10}{ratio:>7.2f}× {rival} (expected ≥ {at_least:g}×)")
    return lines
