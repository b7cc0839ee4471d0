"""Networks are timed side by side, and the faster one comes out as the faster one."""

import json

import pytest
import torch
from torch import Tensor, nn

import fastprune
from fastprune import formats, models
from fastprune.latency import latency


def convolutions(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Conv2d(channels, channels, 3), nn.Flatten())


def test_the_smaller_network_is_the_faster_one() -> None:
    networks = {"large": convolutions(96), "small": convolutions(8)}
    found = latency(networks, torch.zeros(1, 3, 24, 24), batches=(1, 16), engines=("eager", "onnxruntime"), seconds=0.1)
    keys = [(timing.engine, timing.batch, timing.name) for timing in found.timings]
    assert keys == [(e, b, n) for e in ("eager", "onnxruntime") for b in (1, 16) for n in ("large", "small")]
    for timing in found.timings:
        assert timing.milliseconds > 0
        assert timing.calls >= 5
        assert timing.spread >= 0
    assert found.ratio("large", "eager", 16) == 1
    assert found.ratio("small", "eager", 16) > 3
    assert found.ratio("small", "onnxruntime", 16) > 3
    with pytest.raises(KeyError, match="small in compiled at batch 16 was not measured"):
        found.ratio("small", "compiled", 16)


def test_all_are_called_by_turns_in_eval_mode_and_left_as_they_were() -> None:
    calls: list[str] = []

    class Noted(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            assert not self.training
            assert not torch.is_grad_enabled()
            calls.append(self.name)
            return x

    networks = {"a": Noted("a"), "b": Noted("b"), "c": Noted("c")}
    networks["b"].eval()
    latency(networks, torch.zeros(1, 2), batches=(1,), engines=("eager",), seconds=0)
    assert [module.training for module in networks.values()] == [True, False, True]
    timed = calls[-15:]
    assert timed == [*"abc", *"bca", *"cab", *"abc", *"bca"]


def test_the_table_and_the_data_say_the_same() -> None:
    found = latency(
        {"one": nn.ReLU(), "two": nn.ReLU()}, torch.zeros(1, 8), batches=(2,), engines=("eager",), seconds=0
    )
    lines = str(found).splitlines()
    assert lines[0].startswith("CPU, ")
    assert lines[1].split() == ["engine", "batch", "network", "median", "ms", "spread", "calls", "images/s", "speed-up"]
    assert lines[2].split()[:3] == ["eager", "2", "one"]
    assert lines[2].endswith("1.00×")
    timings = json.loads(json.dumps(found.to_json()))["timings"]
    assert [timing["name"] for timing in timings] == ["one", "two"]
    assert timings[1]["ratio"] == timings[0]["milliseconds"] / timings[1]["milliseconds"]


@pytest.mark.slow
def test_masked_and_compact_networks_are_compared_in_every_engine() -> None:
    torch.manual_seed(0)
    model = models.create("resnet20")
    fastprune.FilterPruner(model, rate=0.6, min_kept=1).update()
    small = fastprune.compact(model, torch.zeros(1, 3, 32, 32))
    found = latency({"masked": model, "compact": small}, torch.zeros(1, 3, 32, 32), batches=(16,), seconds=0.5)
    assert [timing.engine for timing in found.timings[::2]] == ["eager", "compiled", "onnxruntime"]
    assert found.ratio("compact", "onnxruntime", 16) > 1.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": {}}, "no models to measure"),
        ({"batches": (0,)}, r"batch sizes must be at least 1, got \[0\]"),
        ({"engines": ("tflite",)}, "engines are eager, compiled, onnxruntime; got 'tflite'"),
        ({"example_input": torch.zeros(1, 3, device="meta")}, "onnxruntime is measured on the CPU"),
        (
            {"example_input": (torch.zeros(1, 3),)},
            r"take one tensor \[B, ...\]; the example input is float32 \[1, 3",
        ),
        ({"example_input": [[1.0]]}, r"the example input is \[\[1.0\]\]"),
        ({"models": {"a": nn.Linear(2, 2)}}, "the model 'a' does not run on inputs like the example, float32 .*: Runt"),
        ({"models": {"a": nn.Linear(3, 2, device="meta")}}, "example_input is on cpu and the model on meta: move it"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    settings = {"models": {"one": nn.ReLU()}, "example_input": torch.zeros(1, 3), **arguments}
    with pytest.raises(ValueError, match=message):
        latency(**settings)  # type: ignore[arg-type]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(formats.MissingPackageError, match=r"ONNX needs onnx and onnxscript: pip install 'fastprune"):
        latency({"one": nn.ReLU()}, torch.zeros(1, 3), engines=("onnxruntime",))
