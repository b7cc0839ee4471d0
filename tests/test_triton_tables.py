"""The tables of Triton's launchers on a GPU that is late: streams, graphs, what is kept and what is given back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from late_gpu import LateGpu
from torch import Tensor

from fastprune.kernels import device_tables, layers, tables
from fastprune.kernels.gram import covariance_work

SHAPES = [(40, 16, 3, 3), (24, 40), (9, 5, 3, 1)]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Weight:
    """What launchers ask a weight for; the seed decides where it lies."""

    place: torch.device
    seed: int
    sizes: tuple[int, ...]

    # Names and signatures of Tensor.
    device = property(lambda self: self.place)
    shape = property(lambda self: torch.Size(self.sizes))

    def data_ptr(self) -> int:
        return (self.seed + 1 << 20) + 4096 * len(self.sizes) * self.sizes[0]

    def element_size(self) -> int:
        return 4

    def numel(self) -> int:
        return self.shape.numel()

    def stride(self) -> tuple[int, ...]:
        return torch.empty(self.sizes, device="meta").stride()


def grid(device: torch.device, seed: int) -> list[Tensor]:
    made = layers.grid_of([Weight(device, seed, shape) for shape in SHAPES])  # type: ignore[list-item]
    return [made.lines, made.addresses]


def decorrelation(device: torch.device, seed: int) -> list[Tensor]:
    weights = [Weight(device, seed, shape) for shape in SHAPES]
    made = tables.Call(weights, "covariance", True, None, "highest").table(covariance_work)  # type: ignore[arg-type]
    return [made.lines, made.tasks]


Make = Callable[[torch.device, int], list[Tensor]]
BOTH = pytest.mark.parametrize("make", [grid, decorrelation])


def right(make: Make, seed: int) -> list[int]:
    return [value for table in make(CPU, seed) for value in table.flatten().tolist()]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[LateGpu]:
    kept = [layers._lines, layers._addresses, tables.table_of]
    for function in kept:
        function.cache.cache_clear()
    with LateGpu(monkeypatch) as active:
        yield active
        for function in kept:
            function.cache.cache_clear()


@BOTH
def test_eager_calls_share_a_table(gpu: LateGpu, make: Make) -> None:
    first, again = make(gpu.name, 1), make(gpu.name, 1)
    assert all(one.data_ptr() == other.data_ptr() for one, other in zip(first, again))
    found = gpu.read(*again)
    assert found == []
    gpu.synchronize()
    assert found == right(make, 1)


@BOTH
def test_a_table_dropped_before_it_is_read(gpu: LateGpu, make: Make) -> None:
    """Kernels in flight still read it: its memory is used again behind them."""
    found = [gpu.read(*make(gpu.name, seed)) for seed in range(200)]
    gpu.synchronize()
    assert found == [right(make, seed) for seed in range(200)]
    assert gpu.in_use[gpu.stream] < 100 * len(right(make, 0))


@BOTH
def test_an_eager_call_before_the_first_replay(gpu: LateGpu, make: Make) -> None:
    with gpu.capture() as graph:
        captured = gpu.read(*make(gpu.name, 1))
    eager = gpu.read(*make(gpu.name, 1))
    gpu.synchronize()
    assert eager == right(make, 1)
    graph.replay()
    gpu.synchronize()
    assert captured == right(make, 1)


@BOTH
def test_two_graphs(gpu: LateGpu, make: Make) -> None:
    graphs, found = [], []
    for _ in range(2):
        with gpu.capture() as graph:
            found.append(gpu.read(*make(gpu.name, 1)))
        graphs.append(graph)
    for index in (1, 0):
        graphs[index].replay()
        gpu.synchronize()
        assert found[index] == right(make, 1)


@BOTH
@pytest.mark.parametrize("warm", [False, True])
def test_many_tables_between_capture_and_replay(gpu: LateGpu, make: Make, warm: bool) -> None:
    if warm:
        make(gpu.name, 1)
    with gpu.capture() as graph:
        captured = [gpu.read(*make(gpu.name, seed)) for seed in (1, 2)]
    for seed in range(3, 150):
        make(gpu.name, seed)
    graph.replay()
    gpu.synchronize()
    assert captured == [right(make, seed) for seed in (1, 2)]


@BOTH
def test_two_streams(gpu: LateGpu, make: Make) -> None:
    with gpu.on(2):
        first = gpu.read(*make(gpu.name, 1))
    with gpu.on(3):
        second = gpu.read(*make(gpu.name, 1))
        gpu.synchronize()
    assert second == right(make, 1)
    assert first == []
    with gpu.on(2):
        gpu.synchronize()
    assert first == right(make, 1)


@BOTH
def test_graphs_leave_nothing(gpu: LateGpu, make: Make) -> None:
    """Not even pinned memory, which PyTorch's allocator would not give back."""
    for seed in range(20):
        with gpu.capture() as graph:
            make(gpu.name, seed)
        graph.reset()
        assert gpu.in_use[graph] == 0
    assert gpu.pinned_in_captures == 0
    for function in (layers._lines, layers._addresses, tables.table_of):
        assert function.cache.cache_info().currsize == 0


@BOTH
def test_a_table_in_a_graph_is_written_anew(gpu: LateGpu, make: Make) -> None:
    """Its memory serves what comes after it in the graph, too."""
    with gpu.capture() as graph:
        captured = gpu.read(*make(gpu.name, 1))
        assert gpu.in_use[graph] == 0
        later = gpu.read(*make(gpu.name, 2))
    for _ in range(2):
        graph.replay()
        gpu.synchronize()
        assert (captured, later) == (right(make, 1), right(make, 2))


def test_any_int64_and_any_shape(gpu: LateGpu) -> None:
    for host in (torch.tensor([[0, -1], [2**62 + 1, -(2**63)]]), torch.empty(0, 5, dtype=torch.int64)):
        with gpu.capture() as graph:
            captured = gpu.read(table := device_tables.put(host, gpu.name))
        assert table.shape == host.shape
        graph.replay()
        gpu.synchronize()
        assert captured == host.flatten().tolist()
