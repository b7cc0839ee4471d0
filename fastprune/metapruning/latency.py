"""Latencies of networks, from a table of their layers measured on this device."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from .. import data
from ..precision import DTYPES
from ..runlog import write_json
from .description import Description, Layer
from .encoding import CHOICES, Encoding
from .evolution import as_encodings
from .network import PlainNetwork
from .networks import describe
from .settings import SearchConfig
from .space import Population
from .training import choose_device, memory_format

Measure = Callable[[nn.Module, tuple[int, ...]], float]
"""Milliseconds of a forward pass of a module on an input of a shape."""

_FITTED, _CHECKED = 16, 20  # networks measured whole: to fit the correction, to see how good the predictions are
_ROUNDS = 7  # over everything to be measured; what slows a machine down lasts longer than a measurement
TOLERANCE = 0.05


@dataclass(frozen=True)
class Setting:
    """What latencies are of, besides the network."""

    batch: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format

    def describe(self) -> dict[str, Any]:
        """Everything that times depend on, for the table's file."""
        if self.device.type == "cuda":
            name, threads = torch.cuda.get_device_name(self.device), 0
        else:
            name = f"{platform.processor() or platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
            threads = torch.get_num_threads()
        return {
            "batch": self.batch,
            "device": name,
            "threads": threads,
            "dtype": str(self.dtype).removeprefix("torch."),
            "memory_format": str(self.memory_format).removeprefix("torch."),
            "torch": torch.__version__,
        }


class TableError(ValueError):
    """A file is not a table of latencies."""


class _Unit(nn.Module):
    """A convolution with its batch norm and what follows it, as in the network."""

    def __init__(self, layer: Layer, encoding: Sequence[int], activation: type[nn.Module]) -> None:
        super().__init__()
        conv, block = layer.conv, layer.block
        inputs, outputs = conv.inputs.channels(encoding), conv.outputs.channels(encoding)
        groups = inputs if conv.depthwise else 1
        self.conv = nn.Conv2d(inputs, outputs, conv.kernel, conv.stride, conv.kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        last = conv is block.convs[-1]
        self.adds = last and block.shortcut != "none"
        self.activation = activation(inplace=True) if conv.activated or (last and block.activated) else None
        self.pool = nn.MaxPool2d(3, 2, 1) if last and block.pooled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x))
        y = y + y if self.adds else y
        y = y if self.activation is None else self.activation(y)
        return y if self.pool is None else self.pool(y)


class LatencyTable:
    """Predicts a network's latency from those of its layers, each measured once in its shape.

    A prediction is ``scale · Σ layers + offset``; both are fitted to whole networks, since a layer alone has its input
    and weights in the cache. Layers that are missing are measured when a prediction needs them, and kept in the file.

    Args:
        path: the file; made where it is not there.
        description: of the network.
        resolution: side of the images in pixels.
        num_classes: logits.
        setting: what to measure on.
        measure: measures a module, :func:`measure_ms` by default.

    Attributes:
        checked: how far the predictions of 20 random networks were from what was measured of them, as shares:
            ``mean`` and ``worst``.

    Raises:
        TableError: if the file is not such a table.
    """

    def __init__(
        self,
        path: Path,
        description: Description,
        resolution: int,
        num_classes: int,
        setting: Setting,
        measure: Measure | None = None,
    ) -> None:
        self.path, self.description, self.setting = path, description, setting
        self.num_classes = num_classes
        self.layers = list(description.layers(resolution))
        self.resolution = resolution
        self.measure = measure or (lambda module, shape: measure_ms(module, shape, setting))
        self.entries: dict[str, float] = {}
        self.scale, self.offset = 1.0, 0.0
        self.checked: dict[str, float] = {}
        if path.exists():
            self._load()

    def __call__(self, population: Population) -> NDArray[np.float64]:
        """Milliseconds of every encoding, ``[P]``."""
        return self.scale * self.sums(as_encodings(population)) + self.offset

    def sums(self, encodings: Sequence[Encoding]) -> NDArray[np.float64]:
        """The sums over the layers; those that are missing are measured."""
        self._measure_missing(encodings)
        return np.array([sum(self.entries[key] for key, _ in self._units(encoding)) for encoding in encodings])

    def _units(self, encoding: Encoding) -> Iterable[tuple[str, Layer | None]]:
        for layer in self.layers:
            yield _key(layer, encoding), layer
        features = self.description.features.channels(encoding)
        yield f"classifier {features} {self.layers[-1].output_side} {self.num_classes}", None

    def _measure_missing(self, encodings: Sequence[Encoding]) -> None:
        missing = {
            key: (layer, encoding)
            for encoding in encodings
            for key, layer in self._units(encoding)
            if key not in self.entries
        }
        if not missing:
            return
        shortest = self._shortest([partial(self._unit, *pair) for pair in missing.values()], "layer")
        self.entries.update(zip(missing, shortest, strict=True))
        self.save()

    def _shortest(self, makers: Sequence[Callable[[], tuple[nn.Module, tuple[int, ...]]]], unit: str) -> list[float]:
        """Milliseconds of modules on their inputs: of several rounds over all of them, the shortest of each."""
        silent = not sys.stderr.isatty()
        bar = tqdm(total=_ROUNDS * len(makers), desc="latency table", unit=unit, leave=False, disable=silent)
        found = [math.inf] * len(makers)
        for _ in range(_ROUNDS):
            for number, make in enumerate(makers):
                found[number] = min(found[number], self.measure(*make()))
                bar.update()
        bar.close()
        return found

    def _unit(self, layer: Layer | None, encoding: Encoding) -> tuple[nn.Module, tuple[int, ...]]:
        """A layer, or the classifier, and the shape of its input."""
        if layer is None:
            features, side = self.description.features.channels(encoding), self.layers[-1].output_side
            head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(features, self.num_classes))
            return head, (self.setting.batch, features, side, side)
        activation = {"relu": nn.ReLU, "relu6": nn.ReLU6}[self.description.activation]
        shape = (self.setting.batch, layer.conv.inputs.channels(encoding), layer.input_side, layer.input_side)
        return _Unit(layer, encoding, activation), shape

    def measure_networks(self, encodings: Sequence[Encoding]) -> NDArray[np.float64]:
        """Milliseconds of the whole network of each encoding."""
        shape = (self.setting.batch, 3, self.resolution, self.resolution)

        def network(encoding: Encoding) -> tuple[nn.Module, tuple[int, ...]]:
            return PlainNetwork(self.description, encoding, self.num_classes), shape

        return np.array(self._shortest([partial(network, encoding) for encoding in encodings], "network"))

    def fit_and_check(self, seed: int = 0) -> dict[str, float]:
        """Fit the correction to random networks measured whole, and see how good it is for 20 others; keep both."""
        rng = np.random.default_rng(seed)
        genes = len(self.description.genes)
        encodings = as_encodings(rng.integers(CHOICES, size=(_FITTED + _CHECKED, genes)))
        sums, measured = self.sums(encodings), self.measure_networks(encodings)
        # Least squares of the relative error.
        rows = np.column_stack([sums, np.ones(len(sums))])[:_FITTED] / measured[:_FITTED, None]
        (scale, offset), *_ = np.linalg.lstsq(rows, np.ones(_FITTED), rcond=None)
        self.scale, self.offset = float(scale), float(offset)
        off = np.abs(self(np.array(encodings[_FITTED:])) / measured[_FITTED:] - 1)
        self.checked = {"mean": float(off.mean()), "worst": float(off.max())}
        self.save()
        return self.checked

    def said(self) -> str:
        """A line for people: what was measured, and how good predictions are."""
        if not self.checked:
            return f"latency table {self.path}: {len(self.entries):,} layers, not checked yet"
        worst, mean = 100 * self.checked["worst"], 100 * self.checked["mean"]
        verdict = "" if self.checked["worst"] <= TOLERANCE else f", MORE THAN {100 * TOLERANCE:.0f} %: is it busy?"
        return (
            f"latency table {self.path}: {len(self.entries):,} layers; predictions of {_CHECKED} random networks are "
            f"within {worst:.1f} % of what was measured (mean {mean:.1f} %){verdict}"
        )

    def save(self) -> None:
        """Write the table, atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {
            "setting": self.setting.describe(),
            "scale": self.scale,
            "offset": self.offset,
            "checked": self.checked,
            "layers_ms": self.entries,
        }
        write_json(self.path, values, "a table of latencies")

    def _load(self) -> None:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            self.entries = {str(key): float(value) for key, value in values["layers_ms"].items()}
            self.scale, self.offset = float(values["scale"]), float(values["offset"])
            self.checked = dict(values["checked"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TableError(f"{self.path} is not a table of latencies: {error}; delete it") from error


def _key(layer: Layer, encoding: Encoding) -> str:
    conv, block = layer.conv, layer.block
    last = conv is block.convs[-1]
    added = "+" if last and block.shortcut != "none" else ""
    activated = "a" if conv.activated or (last and block.activated) else ""
    pooled = "p" if last and block.pooled else ""
    kind = "dw" if conv.depthwise else "conv"
    channels = f"{conv.inputs.channels(encoding)}>{conv.outputs.channels(encoding)}"
    return f"{kind}{conv.kernel}/{conv.stride} {channels} {layer.input_side} {added}{activated}{pooled}"


@torch.inference_mode()
def measure_ms(
    module: nn.Module, shape: tuple[int, ...], setting: Setting, runs: int = 6, least_ms: float = 10
) -> float:
    """Milliseconds of a forward pass in eval mode: the shortest of several, the one that was disturbed least.

    Args:
        module: moved to the device and dtype.
        shape: of its input.
        setting: what to measure on.
        runs: at least so many passes.
        least_ms: and for at least so long.
    """
    module = module.eval().to(setting.device, setting.dtype, memory_format=setting.memory_format)  # type: ignore[call-overload]
    x = torch.randn(shape, device=setting.device).to(setting.dtype, memory_format=setting.memory_format)

    def once() -> float:
        _wait(setting.device)
        started = time.perf_counter()
        module(x)
        _wait(setting.device)
        return 1e3 * (time.perf_counter() - started)

    for _ in range(3):
        once()
    times = [once() for _ in range(runs)]
    while sum(times) < least_ms:
        times.append(once())
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def open_table(config: SearchConfig, resolution: int, num_classes: int) -> LatencyTable:
    """The table for a search's network on its device, fitted and checked; kept beside the data sets."""
    setting = Setting(
        config.latency_batch,
        choose_device(config.device),
        DTYPES[config.precision],
        memory_format(config),
    )
    identity = json.dumps([setting.describe(), config.network, resolution, num_classes])
    name = f"{config.network}-{resolution}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"
    root = data.default_root() if config.data_root is None else config.data_root
    table = LatencyTable(root / "latency" / name, describe(config.network), resolution, num_classes, setting)
    if not table.checked:
        table.fit_and_check()
    print(table.said())
    return table
