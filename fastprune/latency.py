"""How long networks take, measured side by side: the calls of all of them take turns, so that what else the machine
does meets all alike.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .formats import onnx_bytes, onnx_session
from .inputs import one_batch, told

__all__ = ["ENGINES", "Engine", "Latency", "Timing", "latency"]

Engine = Literal["eager", "compiled", "onnxruntime"]
ENGINES: tuple[Engine, ...] = ("eager", "compiled", "onnxruntime")
_WARM_UP, _LEAST, _MOST = 3, 5, 2000  # calls


@dataclass(frozen=True)
class Timing:
    """One network in one engine at one batch size.

    Attributes:
        milliseconds: median of a call.
        spread: the distance of the quartiles as a share of the median.
        calls: timed.
        ratio: how many times faster than the first network, of the medians.
    """

    name: str
    engine: str
    batch: int
    milliseconds: float
    spread: float
    calls: int
    ratio: float


@dataclass(frozen=True)
class Latency:
    """Timings, and where they were taken; prints as a table."""

    timings: tuple[Timing, ...]
    device: str
    threads: int

    def ratio(self, name: str, engine: str, batch: int) -> float:
        """How many times faster than the first network the one of that name is.

        Raises:
            KeyError: for what was not measured.
        """
        for timing in self.timings:
            if (timing.name, timing.engine, timing.batch) == (name, engine, batch):
                return timing.ratio
        raise KeyError(f"{name} in {engine} at batch {batch} was not measured")

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)

    def rows(self) -> list[tuple[str, ...]]:
        """Return the table's cells, the heading first."""
        heading = ("engine", "batch", "network", "median ms", "spread", "calls", "images/s", "speed-up")
        return [heading, *(_cells(timing) for timing in self.timings)]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows)]
        left = (0, 2)
        lines = [
            "  ".join(cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows
        ]
        head = f"{self.device}, {self.threads} thread{'s' * (self.threads > 1)}; calls of all networks took turns"
        return "\n".join([head, *(line.rstrip() for line in lines)])


def _cells(timing: Timing) -> tuple[str, ...]:
    per_second = 1000 * timing.batch / timing.milliseconds
    numbers = (f"{timing.milliseconds:.3f}", f"±{50 * timing.spread:.0f} %", f"{timing.calls}", f"{per_second:,.0f}")
    return (timing.engine, str(timing.batch), timing.name, *numbers, f"{timing.ratio:.2f}×")


def latency(
    models: Mapping[str, nn.Module],
    example_input: Tensor,
    batches: Sequence[int] = (1, 128),
    engines: Sequence[Engine] = ENGINES,
    seconds: float = 1.0,
) -> Latency:
    """Measure networks side by side, in eval mode and without gradients.

    For each engine and batch size every network is called a few times to warm up, then all of them by turns, in an
    order that rotates, until each has had about ``seconds``.

    Args:
        models: by the names they are to have; speed-ups are against the first. Their parameters lie on the device of
            ``example_input``. Modes and weights are left as they were.
        example_input: `[B, …]`; of it only the shape of one image, the dtype and the device count. Inputs are random.
        batches: sizes, each at least 1.
        engines: ``eager``, ``compiled`` (torch.compile, for the very shape) and ``onnxruntime`` (on the CPU, masked
            weights as zeros).
        seconds: for each timing.

    Raises:
        ValueError: for no model, batch sizes below 1, unknown engines, ``onnxruntime`` elsewhere than on the CPU, and
            an example input that is not one tensor, not where a model is, or that a model does not run on.
        MissingPackageError: where an engine is not installed.
    """
    _check(models, example_input, batches, engines)
    training = {module: module.training for model in models.values() for module in model.modules()}
    try:
        for name, model in models.items():
            _check_runs(name, model.eval(), example_input)
        timings = []
        for engine in engines:
            prepare = {name: _prepared(model, engine, example_input) for name, model in models.items()}
            for batch in batches:
                shape = (batch, *example_input.shape[1:])
                generator = torch.Generator().manual_seed(0)
                images = torch.randn(shape, generator=generator).to(example_input.device, example_input.dtype)
                calls = {name: ready(images) for name, ready in prepare.items()}
                timings += _take_turns(calls, engine, batch, seconds, example_input.device)
    finally:
        for module, was in training.items():
            module.training = was
    device = example_input.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return Latency(tuple(timings), name, torch.get_num_threads())


def _check(models: Mapping[str, nn.Module], example: Tensor, batches: Sequence[int], engines: Sequence[str]) -> None:
    if not models:
        raise ValueError("no models to measure")
    for model in models.values():
        one_batch(model, example)
    if not batches or min(batches) < 1:
        raise ValueError(f"batch sizes must be at least 1, got {list(batches)}")
    for engine in engines:
        if engine not in ENGINES:
            raise ValueError(f"engines are {', '.join(ENGINES)}; got {engine!r}")
    if "onnxruntime" in engines and example.device.type != "cpu":
        raise ValueError(f"onnxruntime is measured on the CPU, and the example input is on {example.device}")


@torch.no_grad()
def _check_runs(name: str, model: nn.Module, example: Tensor) -> None:
    """Fail before the work, and say of what."""
    one = torch.zeros(1, *example.shape[1:], dtype=example.dtype, device=example.device)
    try:
        model(one)
    except Exception as error:  # the model's own code runs: anything may come
        raise ValueError(
            f"the model {name!r} does not run on inputs like the example, {told(one)}: {type(error).__name__}: {error}"
        ) from error


def _prepared(model: nn.Module, engine: Engine, example_input: Tensor) -> Callable[[Tensor], Callable[[], Any]]:
    """Return what makes a call of some images, the costly part done."""
    if engine == "onnxruntime":
        session = onnx_session(onnx_bytes(model, example_input))

        def of_session(images: Tensor) -> Callable[[], Any]:
            feed = {"images": images.numpy()}
            return lambda: session.run(None, feed)

        return of_session
    if engine == "compiled":
        torch.compiler.reset()  # shapes seen before would make this one dynamic
    called: Any = torch.compile(model, dynamic=False) if engine == "compiled" else model

    def of_module(images: Tensor) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return called(images)

        return call

    return of_module


def _take_turns(
    calls: Mapping[str, Callable[[], Any]], engine: str, batch: int, seconds: float, device: torch.device
) -> list[Timing]:
    waits = torch.cuda.synchronize if device.type == "cuda" and engine != "onnxruntime" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}

    def timed(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        waits()
        return time.perf_counter() - started

    for call in calls.values():
        for _ in range(_WARM_UP):
            timed(call)
    slowest = max(min(timed(call) for _ in range(2)) for call in calls.values())
    rounds = min(max(math.ceil(seconds / slowest), _LEAST), _MOST)
    names = list(calls)
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(calls[name]))
    medians = {name: statistics.median(measured) for name, measured in times.items()}
    timings = []
    for name, measured in times.items():
        low, _, high = statistics.quantiles(measured, n=4)
        median, ratio = medians[name], medians[names[0]] / medians[name]
        timings.append(Timing(name, engine, batch, 1000 * median, (high - low) / median, len(measured), ratio))
    return timings
