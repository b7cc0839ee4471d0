"""How the ops are timed: the device, the rows of each test, and where the results go."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any

import device as devices
import layers
import peaks
import pytest
import rows
import table
from layers import Measure, Work
from pytest_benchmark.fixture import BenchmarkFixture

from fastprune import ops

DEVICE = pytest.StashKey[devices.Device]()
PEAKS = pytest.StashKey[peaks.Peaks | None]()
RESULTS = pytest.StashKey[list[table.Result]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the ops are timed: cpu (default), cuda or cuda:<index>")


def pytest_configure(config: pytest.Config) -> None:
    """Find the device, and make the places where results gather."""
    config.addinivalue_line("markers", "rivals(*names, ops, gpu, host): the rows of a test; see bench/rows.py")
    try:
        config.stash[DEVICE] = devices.create(config.getoption("device"))
    except ValueError as error:
        raise pytest.UsageError(f"--device: {error}") from error
    config.stash[PEAKS] = None
    config.stash[RESULTS] = []


@pytest.hookimpl(trylast=True)  # behind pytest's own, for the rows to vary fastest
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each row."""
    marker = metafunc.definition.get_closest_marker("rivals")
    if marker:
        chosen = list(rows.rows(metafunc.config.stash[DEVICE], *marker.args, **marker.kwargs))
        metafunc.parametrize("row", chosen, ids=str, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Leave out the tests that have no rows on this device, each of which pytest has made one to be skipped."""
    items[:] = [item for item in items if isinstance(item.callspec.params["row"], rows.Row)]


def pytest_itemcollected(item: pytest.Item) -> None:
    """Have the plugin take time as the device does."""
    item.add_marker(pytest.mark.benchmark(timer=item.config.stash[DEVICE].timer))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, None, None]:
    """Forget a row that was interrupted before its first round: the plugin would fail, and write no results at all."""
    benchmarks = session.config._benchmarksession.benchmarks
    benchmarks[:] = [benchmark for benchmark in benchmarks if benchmark.stats.data]
    return (yield)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> devices.Device:
    """Where the test runs."""
    return request.config.stash[DEVICE]


@pytest.fixture(params=layers.NAMES)
def network(request: pytest.FixtureRequest, device: devices.Device) -> layers.Network:
    """ResNet-56 (all launch overhead) and ResNet-50 (all memory and arithmetic)."""
    return layers.network(request.param).to(device.name)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[rows.Row]:
    """The row, with its backend chosen."""
    with rows.chosen(request.param.backend):
        yield request.param


@pytest.fixture
def rival(row: rows.Row) -> str:
    """Who is timed."""
    return row.rival


@pytest.fixture
def ready(device: devices.Device, row: rows.Row) -> Callable[[devices.Call], devices.Call]:
    """Turn a call into what the row times: itself, or a graph of it, which runs it a few times first."""
    return device.capture if row.mode == "graph" else lambda call: call


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, device: devices.Device, row: rows.Row
) -> Measure:
    """Time `call` in the group (op, network); `seconds` is about how long to spend."""
    stash = request.config.stash
    if stash[PEAKS] is None and isinstance(device, devices.CudaDevice) and benchmark.enabled:
        stash[PEAKS] = peaks.measure(device)

    def run(op: str, network: layers.Network, call: Callable[[], Any], work: Work, seconds: float = 0.6) -> None:
        benchmark.group = f"{op} {network.name}"
        benchmark.extra_info.update(bytes=work.bytes, flops=work.flops)
        rounds = int(min(max(seconds / device.seconds(call), 3), 200))
        benchmark.pedantic(call, setup=device.flush, rounds=rounds, warmup_rounds=min(rounds // 3, 10))
        if benchmark.stats is None:  # --benchmark-disable: run once, not timed
            return
        result = table.Result(op, network.name, row, benchmark.stats.stats.median, work)
        benchmark.extra_info.update({name: round(rate, 2) for name, rate in result.rates(stash[PEAKS]).items()})
        stash[RESULTS].append(result)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the machine, the table and the promised ratios."""
    results, found = config.stash[RESULTS], config.stash[PEAKS]
    if not results:
        return
    terminalreporter.section("fastprune: median times")
    terminalreporter.write_line(str(config.stash[DEVICE]))
    if found:
        terminalreporter.write_line(str(found))
    for line in table.table(results, found):
        terminalreporter.write_line(line)
    if found is None:
        terminalreporter.section("fastprune: expected ratios")
        for line in table.verdicts(results, ops.cpu_isa()):
            terminalreporter.write_line(line)
