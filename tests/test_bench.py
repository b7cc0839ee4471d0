"""The bench: its rows, its table, and its timing on a GPU, with the CPU in the GPU's place."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import device as devices
import peaks
import pytest
import rows
import table
import torch
from fake_cuda import FakeCuda, FakeDevice
from layers import Work

from fastprune import ops

ROOT = Path(__file__).resolve().parent.parent
PEAKS = peaks.Peaks(bytes_per_s=1e12, tf32_flop_per_s=1e14, bf16_flop_per_s=2e14)
HEADER = "op                          network   rival                  median ms    GB/s  GFLOP/s  × ours"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The bench over a tiny network; `--device cuda` is a fake one."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")])
    command = [sys.executable, "-m", "pytest", "bench/", "-q", "--benchmark-only", "-p", "fake_cuda", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def lines_of(output: str, section: str) -> list[str]:
    """The lines of a section of the summary."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip("= ") == section)
    length = next(i for i, line in enumerate(lines[start + 1 :]) if not line or line.startswith(("=", "-")))
    return lines[start + 1 : start + 1 + length]


def test_on_the_cpu() -> None:
    ran = bench()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    machine, header, *results = lines_of(ran.stdout, "fastprune: median times")
    assert "threads" in machine
    assert header == HEADER
    assert len(results) == 39
    assert results[0].startswith("covariance fwd+bwd          tiny      fastprune  ")
    assert lines_of(ran.stdout, "fastprune: expected ratios") == []  # promised for other networks
    assert "39 passed" in ran.stdout


# By op, the rivals that have eager and graph rows, besides ours.
RIVALS = {
    "update_filter_masks_": ["pytorch", "pytorch vector_norm", "pytorch topk", "torch.compile", "(bare read)"],
    "masked_weights": ["pytorch", "pytorch foreach", "torch.compile", "original"],
    "masked_weights fwd+bwd": ["pytorch", "pytorch foreach", "torch.compile", "original"],
    "hyper_weight fwd+bwd": ["pytorch", "torch.compile", "original"],
    "weight_mask": ["pytorch", "pytorch topk", "pytorch foreach", "torch.compile"],
    "sgd_step_": ["pytorch for-loop", "pytorch foreach", "pytorch fused", "torch.compile"],
    "sgd_step_ with channels": ["pytorch for-loop", "pytorch foreach", "pytorch fused", "torch.compile"],
    "covariance fwd+bwd": ["pytorch", "pytorch cov", "torch.compile"],
    "covariance high fwd+bwd": ["pytorch", "torch.compile"],
    "correlation fwd+bwd": ["pytorch", "pytorch cov", "torch.compile"],
    "correlation medium fwd+bwd": ["pytorch", "torch.compile"],
    "kernel-covariance fwd+bwd": ["pytorch", "torch.compile"],
    "orthogonality fwd+bwd": ["pytorch", "torch.compile"],
}
HOST = {
    "update_filter_masks_",
    "weight_mask",
    "sgd_step_",
    "sgd_step_ with channels",
}  # their originals leave the device: eager rows only


@pytest.mark.parametrize("op", ["sgd_step_", pytest.param("", marks=pytest.mark.slow, id="all")])
def test_on_a_gpu(op: str, tmp_path: Path) -> None:
    json_file = tmp_path / "results.json"
    # torch.compile takes its time.
    ran = bench("--device", "cuda", f"--benchmark-json={json_file}", "-k", "sgd and not compile" if op else "")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    machine, found, header, *results = lines_of(ran.stdout, "fastprune: median times")
    assert machine.startswith("Fake GPU, sm_90")
    assert found.startswith("measured peaks: copy ")
    assert header.endswith("  % copy  % TF32  % BF16")
    assert "expected ratios" not in ran.stdout
    timed = {f"{line[:28].strip()}: {line[38 : header.index(' median')].strip()}" for line in results}
    for timed_op in [op] if op else RIVALS:
        rivals = {"fastprune cpu", *RIVALS[timed_op]} - ({"torch.compile"} if op else set())
        assert {f"{timed_op}: {rival}{mode}" for rival in rivals for mode in ("", " graph")} <= timed
        assert (f"{timed_op}: original" in timed and f"{timed_op}: original graph" not in timed) == (timed_op in HOST)
    first = json.loads(json_file.read_text())["benchmarks"][0]
    assert {"bytes", "flops", "gb_per_s", "copy_percent", "tf32_percent", "bf16_percent"} <= set(first["extra_info"])
    assert "timer" in first["options"]["timer"]


INTERRUPT = """
import fake_cuda
ran, flushed = [], []
def pytest_runtest_call(item):
    ran.append(item)
def flush(device):
    flushed.extend([1] if len(ran) == 2 else [])
    if len(flushed) == 2:  # the first is that of the trial call
        raise KeyboardInterrupt
fake_cuda.FakeDevice.flush = flush
"""


def test_results_are_written_when_a_row_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first round, where the plugin would fail at it and write nothing."""
    json_file = tmp_path / "results.json"
    (tmp_path / "interrupt.py").write_text(INTERRUPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ran = bench(
        "--device", "cuda", "-p", "interrupt", f"--benchmark-json={json_file}", "-k", "weight_mask and not compile"
    )
    assert ran.returncode == pytest.ExitCode.INTERRUPTED, ran.stdout + ran.stderr
    assert len(json.loads(json_file.read_text())["benchmarks"]) == 1


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "cuda:-1", ""])
def test_other_devices_are_a_usage_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"the device must be cpu, cuda or cuda:<index>; got '{name}'"):
        devices.create(name)


def test_a_usage_error_is_said() -> None:
    ran = bench("--device", "gpu")
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device: the device must be cpu, cuda or cuda:<index>; got 'gpu'" in ran.stderr


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"cuda needs a GPU, and torch .* sees none"):
        devices.create("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"there is no cuda:1: torch sees 1 GPU"):
        devices.create("cuda:1")


def test_time_is_taken_by_events_after_a_flush() -> None:
    device = FakeDevice()
    device._flushed.fill_(1)
    states = []
    assert 0 <= device.seconds(lambda: states.append(device._flushed.any().item())) < 1
    assert states == [False]
    assert device._flushed.nbytes == 2 * device.properties.L2_cache_size


def test_a_graph_repeats_the_call_on_the_same_memory() -> None:
    device, weight, ran = FakeDevice(), torch.arange(6.0), []

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        ran.append(device.cuda.current)
        weight.add_(1)
        return weight * 2, weight.view(2, 3)[1].sum()

    replay = device.capture(call)
    assert len(ran) == device.warmup_calls + 1
    assert device.cuda.default not in ran  # a graph is captured on a stream of its own
    weight.fill_(1)
    doubled, total = replay()
    assert doubled.tolist() == [4] * 6
    assert total == 6
    assert replay()[0] is doubled
    assert doubled.tolist() == [6] * 6
    assert len(ran) == device.warmup_calls + 1


def test_what_cannot_be_captured_raises() -> None:
    weight = torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        FakeDevice().capture(lambda: weight * weight.sum().item())


def test_the_cpu_calls_again() -> None:
    device, call = devices.CpuDevice(), list
    assert device.capture(call) is call
    assert device.seconds(call) >= 0


@pytest.fixture
def compiled_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `auto` were the compiled CUDA ops, all but one of two, and Triton were there."""
    name = ["auto"]

    def backends() -> list[ops.Implementation]:
        serving = {"auto": ("cuda", "triton"), "triton": ("triton", "triton")}[name[0]]
        return [ops.Implementation(op, "cpu", serves, "") for op, serves in zip(("first", "second"), serving)]

    monkeypatch.setattr(ops, "get_backend", lambda: name[0])
    monkeypatch.setattr(ops, "set_backend", lambda new: name.__setitem__(0, new))
    monkeypatch.setattr(ops, "backends", backends)


@pytest.mark.usefixtures("compiled_and_triton")
def test_ours_has_a_row_for_each_implementation() -> None:
    def labels(*names: str) -> list[tuple[str, str | None]]:
        return [(str(row), row.backend) for row in rows.rows(FakeDevice(), "fastprune high", ops=names)]

    both = [("fastprune cuda high", "auto"), ("fastprune triton high", "triton")]
    graphs = [("fastprune cuda high graph", "auto"), ("fastprune triton high graph", "triton")]
    assert labels("first") == [*both, *graphs]
    assert labels("second") == [("fastprune triton high", "auto"), ("fastprune triton high graph", "auto")]
    assert labels("first", "second")[0] == ("fastprune cuda+triton high", "auto")
    with rows.chosen("triton"):
        assert ops.get_backend() == "triton"
    assert ops.get_backend() == "auto"


def test_without_triton_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        if name == "triton":
            raise RuntimeError("backend 'triton' is not there")

    monkeypatch.setattr(ops, "set_backend", refuse)
    assert list(rows.implementations(FakeDevice(), ["weight_mask"]).values()) == ["auto"]


def test_rows_of_other_devices() -> None:
    everything = {"ops": ["weight_mask"], "gpu": ["pytorch topk"], "host": ["original"]}
    here = list(rows.rows(devices.CpuDevice(), "fastprune", "pytorch", **everything))
    assert [(str(row), row.backend) for row in here] == [("fastprune", None), ("pytorch", None), ("original", None)]
    assert list(rows.rows(devices.CpuDevice(), gpu=["pytorch topk"])) == []
    there = list(rows.rows(FakeDevice(), "pytorch", **everything))
    assert list(map(str, there)) == ["pytorch", "pytorch graph", "pytorch topk", "pytorch topk graph", "original"]


def result(label: str, mode: str, seconds: float) -> table.Result:
    return table.Result("weight_mask", "resnet56", rows.Row(label, label, mode), seconds, Work(10**9, 10**11))


def test_shares_and_ratios() -> None:
    results = [
        result("fastprune cuda", "eager", 0.004),
        result("fastprune triton", "eager", 0.002),
        result("pytorch", "eager", 0.008),
        result("fastprune cuda", "graph", 0.001),
    ]
    header, *lines = table.table(results, PEAKS)
    columns = [line[60:].split() for line in (header, *lines)]
    assert columns[1] == ["4.000", "250.0", "25000.0", "2.00", "25.0", "25.0", "12.5"]
    assert [line[4] for line in map(str.split, (line[38:] for line in lines[2:3]))] == ["4.00"]
    assert columns[4][3] == "1.00"  # among the graphs, the first
    assert len({len(line) for line in lines}) == 1


def test_verdicts() -> None:
    times = {"fastprune": 0.002, "pytorch": 0.003, "pytorch foreach": 0.001}
    timed = [result(label, "eager", seconds) for label, seconds in times.items()]
    failed = "FAIL  weight_mask                 resnet56     0.50× pytorch (expected ≥ 1×)"
    assert list(table.verdicts(timed, "avx2")) == [failed]
    assert next(table.verdicts(timed[:2], "avx2")).startswith("PASS")


def test_expectations_are_those_of_the_instruction_set() -> None:
    timed = [
        table.Result("covariance fwd+bwd", "resnet50", rows.Row(label, label), seconds, Work(1))
        for label, seconds in {"fastprune": 0.002, "pytorch": 0.0036}.items()
    ]
    verdicts = {isa: list(table.verdicts(timed, isa)) for isa in ("avx512", "avx2", "generic")}
    assert verdicts["avx512"][0].startswith("FAIL")
    assert verdicts["avx2"][0].startswith("PASS")
    assert verdicts["generic"] == []


def test_a_precision_that_is_not_the_fastest_fails() -> None:
    table.verify_precision("fp32", {"fp32": 1.09, "bf16": 1.0})
    with pytest.raises(AssertionError, match=r"auto chose bf16, in which a step takes 8\.00 times as long as in fp32"):
        table.verify_precision("bf16", {"fp32": 1.0, "bf16": 8.0})


def test_the_fake_is_like_the_real_one() -> None:
    for name in ("Event", "Stream", "CUDAGraph", "current_stream", "get_device_properties", "graph", "synchronize"):
        assert hasattr(torch.cuda, name)
    assert "stream" in inspect.signature(torch.cuda.graph).parameters
    if torch.version.cuda:
        assert all(hasattr(torch._C._CudaDeviceProperties, name) for name in vars(FakeDevice().properties))


def test_the_fake_keeps_the_rules() -> None:
    """Its errors are what makes the tests above say something."""
    cuda = FakeCuda()
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    start.record()
    end.record()
    with pytest.raises(AssertionError, match="nobody waited"):
        start.elapsed_time(end)
    capture: Callable[[], object] = lambda: cuda.graph(cuda.CUDAGraph(), cuda.Stream()).__enter__()  # noqa: E731
    with pytest.raises(AssertionError, match="without warm-up"):
        capture()
