"""Fixtures of the ops' tests: every implementation there is, chosen and restored around each test."""

import os
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is loaded: threads that spin while they wait make tests several times slower on shared cores.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

# The bench's modules are tested, too, and serve as the devices of test_gpu.py.
sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import cases
import pytest
import torch
import triton_interpreter
from _pytest.mark.expression import Expression  # what -m is read with
from dead_worker import pytest_configure, pytest_handlecrashitem, pytest_sessionfinish, pytest_testnodedown  # noqa: F401
from ptxrun import NVCC

pytest_plugins = ["verdicts"]

# The CUDA kernels are compiled by nvcc and executed on the CPU. Where there is none, their tests are left out of a
# whole run, which says so, and fail where they are asked for (make test-gpu-kernels).
collect_ignore_glob = [] if NVCC else ["test_cuda_*.py", "ptxrun/*"]


# Begun first, since xdist gives a file to one process: the last one to begin is what the others wait for.
LONGEST = (
    *("train", "distributed", "examples", "op_sgd_step", "search", "compact", "bench", "integrations", "export"),
    *("random_networks", "random_networks_recipes"),
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not NVCC:
        terminalreporter.section("CUDA kernels: NOT TESTED, there is no nvcc: pip install '.[gpu-tests]'")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-architecture",
        action="store_true",
        help="run each case of the ops on every simulated GPU, not on one of them (twice the time)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is about the kernels of GPUs, for `make test-gpu-kernels`; each case of the ops on one architecture."""
    for item in items:
        if item.path.name.startswith(("test_cuda_", "test_triton_")) or item.path.parent.name == "ptxrun":
            item.add_marker(pytest.mark.gpu_kernels)
    longest = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: longest.get(item.path.stem.removeprefix("test_"), len(longest)))
    if not config.getoption("--every-architecture"):
        left_out = {item for item in items if _is_for_another(item)}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]


def _is_for_another(item: pytest.Item) -> bool:
    """Whether a case of an op runs on another architecture than the item's; which one, its name decides."""
    found = re.search(r"(cuda|triton)-(sm_\d+)", item.name)
    if found is None or not item.path.name.startswith("test_op_"):
        return False
    own = item.nodeid.replace(found[0], found[1])
    return cases.ARCHITECTURES[zlib.crc32(own.encode()) % len(cases.ARCHITECTURES)] != found[2]


def _parameters(implementations: list[cases.Implementation], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(implementation, id=implementation.name, marks=marks) for implementation in implementations]


if cases.INTERPRETED:
    triton_interpreter.repair()

SIMULATED = _parameters(cases.SIMULATED, pytest.mark.slow, pytest.mark.gpu_kernels)
EVERY = _parameters(cases.INTERPRETED) or [*_parameters(cases.HOST), *SIMULATED, *_parameters(cases.ON_GPU)]


def _selects(expression: str, marks: set[str]) -> bool:
    """Whether `-m` takes a test with these marks."""
    return Expression.compile(expression).evaluate(lambda name: name in marks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each implementation that `-m` selects; of the others there would be thousands of tests to deselect."""
    if "implementation" in metafunc.fixturenames:
        expression = metafunc.config.option.markexpr
        own = [mark.name for mark in metafunc.definition.iter_markers()]
        selected = [
            parameter
            for parameter in EVERY
            if not expression or _selects(expression, {*own, *(mark.name for mark in parameter.marks)})
        ]
        metafunc.parametrize("implementation", selected, indirect=True)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many small tensors, whose ops are too short to be shared, and for tests that compare bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def implementation(request: pytest.FixtureRequest) -> Iterator[cases.Implementation]:
    """Each implementation, the compiled CPU one at each of its instruction sets."""
    with cases.active(request.param) as active:
        yield active


@pytest.fixture(params=_parameters(cases.HOST))
def on_host(request: pytest.FixtureRequest) -> Iterator[cases.Implementation]:
    """Those that may look at values and raise: not the ones of GPUs, which nothing waits for."""
    with cases.active(request.param) as active:
        yield active


@pytest.fixture(params=_parameters(cases.REGISTERED))
def registered(request: pytest.FixtureRequest) -> Iterator[cases.Implementation]:
    """One implementation of each registration: for tests of the dispatcher, not of the values."""
    with cases.active(request.param) as active:
        yield active
