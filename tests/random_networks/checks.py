"""What has to be true of a network, its graph, its small form and its saved form."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastprune
from fastprune.graph import trace
from fastprune.scatter import Scatter

from .program import Program

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_SMALL = 1e-2  # beside values of about 1, which a norm of constants may have made noise of
_NOISE = 5.0  # how much further from the model than its own error in float32


@dataclass(frozen=True)
class Finding:
    """Something that is not as it has to be: at which stage, of what kind, and the details."""

    stage: str
    kind: str
    details: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.stage} {self.kind}: {self.details}"


@dataclass
class Result:
    """Of a network: what was found, and what happened on the way."""

    findings: list[Finding] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class _Refused(Exception):
    """A stage that gave an error, found or allowed."""


class _Checks:
    def __init__(self, program: Program, folder: Path) -> None:
        self.program, self.path, self.result = program, folder / "network.safetensors", Result()
        self.before: dict[str, Any] = {}
        self.rng = random.Random(program.seed)  # what takes long is not done with every network

    def found(self, stage: str, kind: str, details: str) -> None:
        self.result.findings.append(Finding(stage, kind, details))

    def attempt(self, stage: str, function: Callable[[], Any]) -> Any:
        """What a function gives; an error is a finding, unless it is one of those that the network's steps allow."""
        try:
            return function()
        except Exception as error:  # anything may come
            text = f"{type(error).__name__}: {error}"
            if isinstance(error, ValueError) and self.program.may_be_refused(text):
                self.result.refusals.append(f"{stage}: {text}")
            else:
                self.found(
                    stage, "refuses" if isinstance(error, ValueError) else f"raises {type(error).__name__}", text
                )
            raise _Refused from error

    def compare(self, stage: str, network: nn.Module, inputs: tuple[Tensor, ...], expected: list[Tensor]) -> None:
        came = self.attempt(f"{stage}, called", lambda: outputs(network, inputs))
        for place, (own, other) in enumerate(zip(came, expected)):
            if own.shape != other.shape or own.dtype != other.dtype:
                self.found(stage, "differs", f"output {place}: {_told(own)} where the model gives {_told(other)}")
            elif not (difference := relative(own, other)) <= TOLERANCE[torch.float64]:
                self.found(stage, "differs", f"output {place}: by {difference:.3g} of the largest value")
        if len(came) != len(expected):
            self.found(stage, "differs", f"{len(came)} outputs, not {len(expected)}")

    # ---------------------------------------------------------------- stages

    def run(self) -> Result:
        """All of it, stage by stage."""
        model = self.program.build()
        expected_model, masks = self.program.prune(model)
        inputs = self.program.examples()
        self.before, expected = _state(model), outputs(model, inputs)
        self._stage(self._traced, model, inputs, expected)
        self._stage(self._saved, model, inputs, expected, "save")
        self._stage(self._compacted, model, expected_model, masks, inputs)
        after = _state(model)
        changed = [name for name in self.before | after if self.before.get(name) != after.get(name)]
        if changed:
            self.found("model", "changed", ", ".join(changed[:3]))
        return self.result

    def _stage(self, function: Callable[..., None], *args: Any) -> None:
        with suppress(_Refused):
            function(*args)

    def _traced(self, model: nn.Module, inputs: tuple[Tensor, ...], expected: list[Tensor]) -> None:
        example = inputs if len(self.program.inputs) > 1 or self.rng.random() < 0.3 else None
        self.compare("trace", self.attempt("trace", lambda: trace(model, example)), inputs, expected)

    def _saved(self, model: nn.Module, inputs: tuple[Tensor, ...], expected: list[Tensor], stage: str) -> None:
        example = inputs if len(inputs) > 1 or self.rng.random() < 0.3 else None
        self.attempt(stage, lambda: fastprune.save(model, self.path, example))
        loaded = self.attempt(f"{stage} and load", lambda: fastprune.load(self.path))
        self.compare(f"{stage} and load", loaded, inputs, expected)

    def _compacted(
        self, model: nn.Module, masked: nn.Module, masks: dict[str, Tensor], inputs: tuple[Tensor, ...]
    ) -> None:
        expected = outputs(masked, inputs)
        round_to = self.program.pruning.round_to
        small = self.attempt("compact", lambda: fastprune.compact(model, inputs, round_to, masks))
        self.compare("compact", small, inputs, expected)
        for batch, more in ((3, 0), (1, 2)):
            others = self.program.examples(batch, more, 1)
            try:
                wanted = outputs(masked, others)
            except Exception:  # the model itself does not take them
                continue
            self.compare(f"compact, {'other images' if more else 'another batch'}", small, others, wanted)
            self.result.counts["other sizes"] += 1
        self._reported(masked, small)
        self._flags(model, small)
        self._single_precision(model, masked, masks, inputs)
        if self.rng.random() < 0.4:
            self._stage(self._saved, small, inputs, expected, "save of compact")
        before, after = small.report.parameters
        self.result.counts["smaller"] += after < before
        self.result.counts["scatter"] += any(isinstance(module, Scatter) for module in small.modules())

    def _reported(self, masked: nn.Module, small: Any) -> None:
        layers, made = dict(masked.named_modules()), dict(small.named_modules())
        for row in small.report.layers:
            weight = _effective(layers[row.name])
            pruned = int((weight.flatten(1) == 0).all(1).sum())
            after = tuple(made[row.name].weight.shape[:2]) if row.name in made else (0, 0)
            told = (row.filters, row.pruned, row.kept, *row.inputs)
            true = (len(weight), pruned, after[0], weight.shape[1], after[1])
            if told != true:
                self.found(
                    "report", "is wrong", f"{row.name}: {told} where it is {true} (filters, pruned, kept, inputs)"
                )
        count = sum(parameter.numel() for parameter in small.parameters())
        if small.report.parameters[1] != count:
            self.found("report", "is wrong", f"{small.report.parameters[1]} parameters, there are {count}")

    def _flags(self, model: nn.Module, small: nn.Module) -> None:
        theirs = dict(model.named_parameters())
        for name, parameter in small.named_parameters():
            if name in theirs and theirs[name].requires_grad != parameter.requires_grad:
                self.found("flags", "differ", f"requires_grad of {name} is {parameter.requires_grad}")
        for name, module in small.named_modules():
            own = self.before.get(f"training of {name}", module.training)
            if own != module.training and type(module) is not nn.Module and not any(True for _ in module.children()):
                self.found("flags", "differ", f"training of {name} is {module.training}")

    def _single_precision(
        self, model: nn.Module, masked: nn.Module, masks: dict[str, Tensor], inputs: tuple[Tensor, ...]
    ) -> None:
        if self.program.lossy or self.rng.random() < 0.4:
            return
        exact = outputs(masked, inputs)
        single = tuple(x.float() for x in inputs)
        try:
            own = outputs(copy.deepcopy(masked).float(), single)
        except RuntimeError:  # it has constants in float64
            return
        rough = copy.deepcopy(model).float()
        small = self.attempt(
            "compact, float32", lambda: fastprune.compact(rough, single, self.program.pruning.round_to, masks)
        )
        came = self.attempt("compact, float32, called", lambda: outputs(small, single))
        for place, (one, other, true) in enumerate(zip(came, own, exact)):
            largest = max(float(true.abs().max()), _SMALL)
            noise = float((other - true).abs().max()) / largest
            difference = float((one - other).abs().max()) / largest
            if not difference <= TOLERANCE[torch.float32] + _NOISE * noise:
                self.found(
                    "compact, float32", "differs", f"output {place}: by {difference:.3g}, the model by {noise:.3g}"
                )
        self.result.counts["float32"] += 1


@torch.no_grad()
def outputs(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """What it gives; inputs may be written to, so that it gets copies."""
    given = network(*(x.clone() for x in inputs))
    return [y.clone() for y in (given if isinstance(given, (tuple, list)) else (given,))]


def relative(own: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value; of noise around 0, as a share of a small one."""
    return float((own - other).abs().max() / other.abs().max().clamp(min=_SMALL))


def _told(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _effective(layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight").detach()
    mask = dict(layer.named_buffers()).get("mask")
    if mask is None:
        return weight
    return weight * mask.view(-1, *[1] * (weight.dim() - 1)) if mask.dim() == 1 else weight * mask


def _state(model: nn.Module) -> dict[str, Any]:
    """What must not change: tensors, flags and attributes."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"attributes of {name}"] = sorted(vars(module))
        found[f"training of {name}"] = module.training
        found[f"hooks of {name}"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[name] = (tensor.requires_grad, tensor.detach().double().sum().item(), tensor.shape)
    return found


def check(program: Program) -> Result:
    """Build the network, and compare."""
    with (
        warnings.catch_warnings(),
        tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder,
    ):
        warnings.simplefilter("ignore")
        return _Checks(program, Path(folder)).run()
