"""Fixtures of the ops' tests: every implementation there is, chosen and restored around each test."""

import os
import shutil
from collections.abc import Iterator

# Before torch is loaded: threads that spin while they wait make tests several times slower on shared cores.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import cases
import pytest

# The CUDA kernels are compiled by nvcc and executed on the CPU. Where there is none, their tests are left out of a
# whole run, which says so, and fail where they are asked for (make test-gpu-kernels).
NVCC = shutil.which(os.environ.get("PTXRUN_NVCC", "nvcc"))
collect_ignore_glob = [] if NVCC else ["test_cuda_*.py", "ptxrun/*"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if NVCC is None:
        terminalreporter.section("CUDA kernels: NOT TESTED, there is no nvcc on the PATH")


def _name(implementation: cases.Implementation) -> str:
    return implementation.name


@pytest.fixture(params=cases.IMPLEMENTATIONS, ids=_name)
def implementation(request: pytest.FixtureRequest) -> Iterator[cases.Implementation]:
    """Each implementation, the compiled CPU one at each of its instruction sets."""
    with cases.active(request.param) as active:
        yield active


@pytest.fixture(params=cases.REGISTERED, ids=_name)
def registered(request: pytest.FixtureRequest) -> Iterator[cases.Implementation]:
    """One implementation of each registration: for tests of the dispatcher, not of the values."""
    with cases.active(request.param) as active:
        yield active
