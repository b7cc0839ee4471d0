"""A network as text: its layers, the lines of its forward, and what is pruned of it."""

from __future__ import annotations

import copy
import inspect
import random
import re
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from fastprune import FilterPruner, WeightPruner
from fastprune.scatter import Scatter

from . import layers as own

NAMESPACE: dict[str, Any] = {"torch": torch, "nn": nn, "functional": functional, "Tensor": Tensor}
NAMESPACE |= {name: value for name, value in vars(own).items() if isinstance(value, type)}
NAMESPACE |= {"Scatter": Scatter, "StochasticDepth": torchvision.ops.StochasticDepth}
NAMESPACE |= {"FrozenBatchNorm2d": torchvision.ops.FrozenBatchNorm2d}

_NAME = re.compile(r"\b[xn]\d*\b")
VARIABLE = re.compile(r"\bx\d*\b")
# Masks on layers that compact cannot make smaller are part of the test.
_EVERYWHERE = {"removable_only": False} if "removable_only" in inspect.signature(FilterPruner).parameters else {}


@dataclass(frozen=True)
class Step:
    """Some lines of the forward, drawn together.

    Attributes:
        kind: of the recipe, such as ``nn.Conv2d`` or ``functional.pad``.
        lines: of Python.
        used: what counts as covered: arguments that are not at their default, such as ``nn.Conv2d.groups``.
        refusable: parts of messages with which fastprune may refuse a network that has it.
        lossy: whether it is not continuous, so that float32 may differ.
    """

    kind: str
    lines: tuple[str, ...]
    used: frozenset[str] = frozenset()
    refusable: tuple[str, ...] = ()
    lossy: bool = False


@dataclass(frozen=True)
class Input:
    """An argument of the forward.

    Attributes:
        name: of the argument.
        shape: of the example, the batch in front; None for one that is not given.
        default: its text; empty for one that has to be given.
    """

    name: str
    shape: tuple[int, ...] | None
    default: str = ""


@dataclass(frozen=True)
class Pruning:
    """What is pruned, drawn anew from ``seed`` for whatever layers there are.

    Attributes:
        by: ``filters`` or ``weights`` for the pruner of that kind, ``zeros`` for filters of zeros without one.
        rate: share of filters that a layer loses, where it does not lose all but one, or all.
        argument: share of the layers that get a mask by ``compact(masks=...)``.
        round_to: of compact.
    """

    by: str
    rate: float
    argument: float
    round_to: int


@dataclass(frozen=True)
class Program:
    """A network that can be written down, built, and made shorter."""

    seed: int
    inputs: tuple[Input, ...]
    layers: dict[str, str]  # by name, the call that makes it
    tensors: dict[str, str]
    steps: tuple[Step, ...]
    returned: tuple[str, ...]
    pruning: Pruning

    @property
    def used(self) -> frozenset[str]:
        """What of the known layers, functions and arguments it has."""
        used = frozenset().union(*(step.used | {step.kind} for step in self.steps))
        if self.pruning.by == "zeros":
            return used
        return used | {f"nn.Masked{key[3:]}" for key in used if key.partition(".")[2].split(".")[0] == "Conv2d"}

    @property
    def lossy(self) -> bool:
        """Whether float32 may differ."""
        return any(step.lossy for step in self.steps)

    def may_be_refused(self, message: str) -> bool:
        """Whether a message that refuses it is one of those that its steps allow."""
        writes = any(key.endswith(".inplace") for key in self.used) or "inplace=True" in self.source()
        allowed = {part for step in self.steps for part in step.refusable} | (
            {"cannot follow that"} if writes else set()
        )
        return any(part in message for part in allowed)

    def source(self) -> str:
        """The class, as one would write it."""
        arguments = "".join(f", {each.name}{f'={each.default}' if each.default else ''}" for each in self.inputs)
        lines = [line for step in self.steps for line in step.lines]
        return "\n".join(
            [
                "class Network(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        self.{name} = {call}" for name, call in self.layers.items()),
                *(f"        {_registered(name, call)}" for name, call in self.tensors.items()),
                f"    def forward(self{arguments}):",
                *(f"        {line}" for line in lines),
                f"        return {', '.join(self.returned)}",
            ]
        )

    def build(self) -> nn.Module:
        """The network in eval mode and float64, unpruned, its weights drawn from the seed and their names."""
        space = dict(NAMESPACE)
        exec(self.source(), space)
        model = space["Network"]().double().eval()
        for name, module in model.named_children():
            randomise(module, f"{self.seed} {name}.")
        for name, tensor in [*model.named_parameters(recurse=False), *model.named_buffers(recurse=False)]:
            fill(tensor, name, f"{self.seed} {name}")
        self._draw_flags(model)
        return model

    def _draw_flags(self, model: nn.Module) -> None:
        """Let what does not change the result be in train mode, or frozen, now and then."""
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and self._chance("train", name) < 0.2:
                module.train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._chance("grad", name) < 0.7)

    def _chance(self, what: str, name: str) -> float:
        """A number from 0 to 1, the same for a layer whatever others there are."""
        return random.Random(f"{self.seed} {what} {name}").random()

    def examples(self, batch: int = 2, more: int = 0, seed: int = 0) -> tuple[Tensor, ...]:
        """Inputs in float64; ``more`` is added to the sides of images."""
        draw = torch.Generator().manual_seed(self.seed * 7 + seed)
        shapes = [each.shape for each in self.inputs if each.shape is not None]
        sizes = [(batch, shape[1], *(side + more for side in shape[2:])) for shape in shapes]
        return tuple(torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)

    @torch.no_grad()
    def prune(self, model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
        """Prune the model in place; returns what the small network has to equal, and the masks for ``compact``."""
        layers = {name: m for name, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}
        convolutions = [name for name, module in layers.items() if isinstance(module, nn.Conv2d)]
        drawn = {name: self._mask(name, layers[name].weight) for name in layers}
        left = [name for name in convolutions if self._chance("left", name) < 0.1]
        if self.pruning.by == "zeros" or len(left) == len(convolutions):
            for name in convolutions:
                layers[name].weight[~self._rows(name, len(layers[name].weight))] = 0
        elif self.pruning.by == "filters":
            pruner = FilterPruner(model, 0.5, every=100, feedback="none", ignore=left, **_EVERYWHERE)
            pruner.set_masks({name: self._rows(name, len(mask)) for name, mask in pruner.masks().items()})
        else:
            weights = WeightPruner(model, 0.5, every=100, feedback="none", ignore=left)
            weights.set_masks({name: drawn[name].expand(mask.shape) for name, mask in weights.masks().items()})
        text = "\n".join(self._needed())
        called = [name for name in layers if f"self.{name.partition('.')[0]}(" in text and not self._is_read(name)]
        masks = {name: drawn[name] for name in called if self._chance("argument", name) < self.pruning.argument}
        expected = copy.deepcopy(model) if masks else model
        for name, mask in masks.items():
            if mask.shape != layers[name].weight.shape:
                masks[name] = mask = mask.flatten()
            module = expected.get_submodule(name)
            rows = mask.view(-1, *[1] * (module.weight.dim() - 1)) if mask.dim() == 1 else mask
            module.weight.mul_(rows)
            if hasattr(module, "mask"):
                module.mask.fill_(True)
        return expected, masks

    def _needed(self) -> list[str]:
        """The lines that the outputs depend on; some may be missing, where tensors have several names."""
        needed, found = set(self.returned), []
        for line in [line for step in reversed(self.steps) for line in reversed(step.lines)]:
            made, _, expression = line.partition(" = ")
            if made in needed or (not expression and needed & set(_NAME.findall(line))):
                needed |= set(_NAME.findall(expression or line))
                found.append(line)
        return found

    def not_needed(self) -> list[str]:
        """Tensors that the outputs do not depend on, but for those of lines that are to be so."""
        needed = set(self._needed())
        lines = [line for step in self.steps if step.kind != "form.unused" for line in step.lines]
        made = {line.partition(" = ")[0] for line in lines if line in needed}
        return [n for n in (line.partition(" = ")[0] for line in lines) if VARIABLE.fullmatch(n) and n not in made]

    def _is_read(self, name: str) -> bool:
        """Whether the forward reads a layer's weight, besides calling it or not."""
        return f"self.{name}." in self.source().partition("def forward")[2]

    def _rows(self, name: str, count: int) -> Tensor:
        draw = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} mask {name}".encode()))
        kept = torch.rand(count, generator=draw) > self.pruning.rate
        extreme = float(torch.rand((), generator=draw))
        if extreme < 0.15:  # all but one, or all
            kept[:] = False
            kept[0] = extreme > 0.05
        return kept

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        """Of filters, ``[F, 1, ...]``, or of single weights."""
        rows = self._rows(name, len(weight)).view(-1, *[1] * (weight.dim() - 1))
        draw = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} weights {name}".encode()))
        single = self.pruning.by == "weights" or float(torch.rand((), generator=draw)) < 0.3
        return rows & (torch.rand(weight.shape, generator=draw) > 0.3) if single else rows

    def shorter(self, place: int, instead: dict[str, str]) -> Program:
        """Without one step; what it made is read as something else."""

        def renamed(text: str) -> str:
            return VARIABLE.sub(lambda found: instead.get(found[0], found[0]), text)

        steps = [replace(s, lines=tuple(map(renamed, s.lines))) for s in self.steps[place + 1 :]]
        text = "\n".join(line for s in (*self.steps[:place], *steps) for line in s.lines)
        layers = {name: call for name, call in self.layers.items() if re.search(rf"\bself\.{name}\b", text)}
        tensors = {name: call for name, call in self.tensors.items() if re.search(rf"\bself\.{name}\b", text)}
        returned = tuple(dict.fromkeys(map(renamed, self.returned)))
        made = (*self.steps[:place], *steps)
        return replace(self, steps=made, layers=layers, tensors=tensors, returned=returned)


def _registered(name: str, call: str) -> str:
    return f"self.{name} = {call}" if call.startswith("nn.Parameter") else f'self.register_buffer("{name}", {call})'


def randomise(module: nn.Module, seed: str) -> None:
    """Weights, biases and statistics at random, such that values stay as large as they are."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        fill(tensor, name.rpartition(".")[2], seed + name)


@torch.no_grad()
def fill(tensor: Tensor, name: str, seed: str) -> None:
    """Draw one tensor, by its name in its module."""
    draw = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    if not tensor.is_floating_point():
        if tensor.dtype is torch.bool:
            tensor.copy_(torch.rand(tensor.shape, generator=draw) > 0.5)
        return
    drawn = torch.rand(tensor.shape, generator=draw, dtype=torch.float64)
    if name in ("bias", "running_mean"):
        # Now and then a tiny one, by which nothing can be divided.
        drawn = (drawn - 0.3) * torch.where(torch.rand(tensor.shape, generator=draw) < 0.08, 1e-6, 1.0)
    elif name == "running_var" or tensor.dim() < 2:
        drawn = (drawn + 0.5) * torch.where(drawn < 0.1, -1, 1) if name == "weight" else drawn + 0.5
    else:
        drawn = (drawn - 0.4) * 4 / max(tensor[0].numel(), 1) ** 0.5
    tensor.copy_(drawn)
