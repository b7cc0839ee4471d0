"""Draws programs: each line is executed as soon as it is drawn, so that shapes are known and what fails is not kept."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .program import NAMESPACE, VARIABLE, Input, Program, Pruning, Step, fill, randomise

MOST_CHANNELS, LONGEST_SIDE, MOST_ELEMENTS = 24, 16, 9000
LARGEST = 30.0  # of a value

Option = Callable[["Draft"], str]  # a text that is not the default


class Unfit(Exception):
    """What was drawn cannot be used; something else is drawn instead."""


@dataclass(frozen=True)
class Recipe:
    """How to write lines with one known layer, function or method, or in one known way.

    Attributes:
        kind: ``nn.Conv2d``, ``functional.pad``, ``torch.cat``, ``operator.add``, ``method.view``, ``form.alias``.
        make: writes the lines.
        options: arguments that can be given, which coverage asks for.
        weight: how often it is drawn when it is nobody's turn.
        refusable: messages with which fastprune may refuse a network that has it.
        lossy: whether it is not continuous.
    """

    kind: str
    make: Callable[[Draft], None]
    options: tuple[str, ...] = ()
    weight: float = 1.0
    refusable: tuple[str, ...] = ()
    lossy: bool = False


def pick(*texts: str) -> Option:
    """One of these."""
    return lambda draft: draft.rng.choice(texts)


class Draft:
    """A program that is being drawn, and the one step that is tried.

    Attributes:
        rng: whence all decisions come.
        values: by name, the tensors that the lines have made.
        latest: how often the last of them is taken.
        private: names of those that no other step reads.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.holder = nn.Module().double().eval()
        self.steps: list[Step] = []
        self.layers: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        side = (self.rng.randint(6, 12), self.rng.randint(6, 12))
        self.inputs = [Input("x", (2, self.rng.randint(2, 4), *side))]
        self.space: dict[str, Any] = {**NAMESPACE, "self": self.holder}
        self.numbers = itertools.count(1)
        self.latest, self.private = 0.6, set[str]()
        self.lines: list[str] = []
        self.used: set[str] = set()
        self._set_inputs()

    # ---------------------------------------------------------------- what recipes call

    def value(self, *dims: int) -> str:
        """A tensor of so many dimensions, or of any: often the last one; made of an image where there is none."""
        if not dims:
            dims = (2, 3, 4) if self.rng.random() < 0.3 else (4,)
        found = [name for name, value in self.values.items() if value.dim() in dims]
        found = found[1:] or found  # rather not the input
        if not found:
            return self.converted(self.value(4), self.rng.choice(dims))
        return found[-1] if self.rng.random() < self.latest else self.rng.choice(found)

    @property
    def values(self) -> dict[str, Tensor]:
        """Those that steps may read."""
        return {name: value for name, value in self.all_values.items() if name not in self.private}

    @property
    def all_values(self) -> dict[str, Tensor]:
        """Those that are private, too."""
        return {n: v for n, v in self.space.items() if VARIABLE.fullmatch(n) and isinstance(v, Tensor) and v.dim() > 1}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.space[name].shape)

    def converted(self, image: str, dims: int) -> str:
        """Features, tokens, sequences and volumes of an image."""
        sides = math.prod(self.shape(image)[1:])
        features = [
            f"{image}.mean((2, 3))",
            f"{image}.amax((-1, -2))",
            f"functional.adaptive_avg_pool2d({image}, 1).flatten(1)",
        ]
        whole = [f"{image}.flatten(1)", f"torch.flatten({image}, 1)", f"{image}.view({image}.size(0), -1)"]
        forms = {
            2: features + (whole if sides < 300 else []),
            3: [
                f"{image}.flatten(2)",
                f"{image}.flatten(2).transpose(1, 2)",
                f"torch.flatten({image}, 2)",
                f"{image}.mean(3)",
            ],
            5: [f"{image}.unsqueeze(2)", f"{image}[:, :, None]", f"torch.stack([{image}, {image}], 2)"],
        }
        return self.let(self.rng.choice(forms[dims]))

    def like(self, name: str) -> str:
        """Another tensor of the same shape; a branch that makes one, where there is none or now and then."""
        shape = self.shape(name)
        others = [
            n
            for n, v in self.values.items()
            if tuple(v.shape) == shape and n != name and v.dtype == self.space[name].dtype
        ]
        if others and self.rng.random() < 0.6:
            return self.rng.choice(others)
        if len(shape) == 4:
            size = self.rng.choice(["1", "3, padding=1", "3, padding='same', bias=False"])
            return self.let(f"{self.layer(f'nn.Conv2d({shape[1]}, {shape[1]}, {size})')}({name})")
        return self.let(f"{self.layer(f'nn.Linear({shape[-1]}, {shape[-1]})')}({name})")

    def other(self, name: str) -> str:
        """Something that can be combined with a tensor: a tensor, one with sides of 1, a buffer, or a number."""
        choice, shape = self.rng.random(), self.shape(name)
        if choice < 0.4:
            return self.like(name)
        if choice < 0.5 and len(shape) == 4:
            same = [n for n, v in self.values.items() if v.dim() == 4 and v.shape[1] == shape[1]]
            return self.let(f"{self.rng.choice(same)}.mean((2, 3), keepdim=True)")
        if choice < 0.7 and len(shape) > 2:
            return self.tensor(
                self.rng.choice(
                    [
                        (shape[1], *[1] * (len(shape) - 2)),
                        (1, shape[1], *[1] * (len(shape) - 2)),
                        (1,),
                        (1,) * len(shape),
                    ]
                )
            )
        return self.rng.choice(["0.5", "2", "-1.5", "1.25"])

    def layer(self, call: str) -> str:
        """Make a layer; returns ``self.l3``."""
        name = f"l{len(self.layers)}"
        try:
            module = eval(call, dict(NAMESPACE)).double().eval()
        except Exception as error:
            raise Unfit(f"{call}: {error}") from error
        randomise(module, f"{self.seed} {name}.")
        self.holder.add_module(name, module)
        self.layers[name] = call
        return f"self.{name}"

    def tensor(self, shape: Sequence[int], kind: str = "") -> str:
        """Make a parameter or a buffer; returns ``self.t3``."""
        name, kind = f"t{len(self.tensors)}", kind or self.rng.choice(["parameter", "buffer"])
        made = torch.empty(*shape, dtype=torch.bool if kind == "flags" else torch.float64)
        fill(made, name, f"{self.seed} {name}")
        self.holder.register_buffer(name, made)
        sizes = ", ".join(map(str, shape))
        calls = {"parameter": f"nn.Parameter(torch.empty({sizes}))", "flags": f"torch.empty({sizes}, dtype=torch.bool)"}
        self.tensors[name] = calls.get(kind, f"torch.empty({sizes})")
        return f"self.{name}"

    def options(self, kind: str, options: Mapping[str, Option], share: float = 0.7) -> dict[str, str]:
        """Draw some arguments, now and then just one; those drawn count as covered."""
        alone = self.rng.choice(list(options)) if len(options) > 2 and self.rng.random() < 0.5 else ""
        shares = {name: float(name == alone) if alone else 0.66 if name == "inplace" else share for name in options}
        drawn = {name: option(self) for name, option in options.items() if self.rng.random() < shares[name]}
        self.used.update(f"{kind}.{name}" for name in drawn)
        return drawn

    def call(
        self,
        head: str,
        first: str,
        required: Mapping[str, str],
        drawn: Mapping[str, str],
        order: Sequence[str] = (),
        first_name: str = "",
    ) -> str:
        """The text of a call: arguments in their places or by their names.

        Args:
            head: what is called.
            first: the input; empty for a method or a class.
            required, drawn: arguments by name.
            order: names of all arguments, in their places, as far as places may be used.
            first_name: what the input is called, where it may be given by name.
        """
        given = {**required, **drawn}
        texts, by_place = [], self.rng.random() < 0.7
        if first and first_name and self.rng.random() < 0.15:
            texts, by_place = [f"{first_name}={first}"], False
        elif first:
            texts = [first]
        for name in order or required:
            if not by_place or name not in given:
                break
            texts.append(given.pop(name))
        return f"{head}({', '.join([*texts, *(f'{name}={text}' for name, text in given.items())])})"

    def let(self, expression: str, name: str = "") -> str:
        """Add a line that makes a tensor, and execute it; returns its name."""
        name = name or f"x{next(self.numbers)}"
        self.do(f"{name} = {expression}")
        if isinstance(value := self.space[name], Tensor):
            self._check(value)
        return name

    def do(self, line: str) -> None:
        """Add a line, and execute it."""
        self.lines.append(line)
        try:
            exec(line, self.space)
        except Exception as error:
            raise Unfit(f"{line}: {error}") from error

    def write(self, line: str, name: str) -> None:
        """Add a line that writes to a tensor."""
        self.do(line)
        self._check(self.space[name])

    def _check(self, value: Tensor) -> None:
        if value.dim() > 1 and (value.numel() > MOST_ELEMENTS or 0 in value.shape or value.shape[0] != 2):
            raise Unfit(f"a tensor of {list(value.shape)}")
        if value.dim() in (4, 5) and (value.shape[1] > MOST_CHANNELS or max(value.shape[2:]) > LONGEST_SIDE):
            raise Unfit(f"an image of {list(value.shape)}")
        if value.is_floating_point() and not float(value.abs().max()) < LARGEST:
            raise Unfit("too large a value")

    # ---------------------------------------------------------------- steps

    @torch.no_grad()
    def attempt(self, recipe: Recipe, tries: int = 6) -> bool:
        """Add a step, if one of some tries gives one that fits."""
        for _ in range(tries):
            layers, tensors, inputs = dict(self.layers), dict(self.tensors), list(self.inputs)
            names, written = set(self.space), self._written()
            self.lines, self.used = [], set()
            try:
                recipe.make(self)
            except Unfit:
                for name in self.layers.keys() - layers.keys():
                    delattr(self.holder, name)
                for name in self.tensors.keys() - tensors.keys():
                    delattr(self.holder, name)
                self.layers, self.tensors = layers, tensors
                for name in self.space.keys() - names:
                    del self.space[name]
                if self.inputs != inputs or self._written() != written:
                    self.inputs = inputs
                    self._replay()
                continue
            divides = recipe.kind.endswith((".div", ".div_")) and f"{recipe.kind}.rounding_mode" not in self.used
            lossy = recipe.lossy and not divides
            self.steps.append(Step(recipe.kind, tuple(self.lines), frozenset(self.used), recipe.refusable, lossy))
            return True
        return False

    def _written(self) -> int:
        return sum(value._version for value in self.all_values.values())

    def _replay(self) -> None:
        """Execute again what there is, where a step that was given up has written to a tensor."""
        self._set_inputs()
        for step in self.steps:
            for line in step.lines:
                exec(line, self.space)

    def _set_inputs(self) -> None:
        draw = torch.Generator().manual_seed(self.seed)
        for each in self.inputs:
            shape = each.shape
            drawn = None if shape is None else torch.randn(shape, generator=draw, dtype=torch.float64)
            self.space[each.name] = eval(each.default) if shape is None else drawn

    def written(self) -> str:
        """The tensor that the last step has written to, if it is one that writes."""
        last = self.steps[-1]
        if not last.refusable and not any(key.endswith(".inplace") for key in last.used):
            return ""
        names = VARIABLE.findall(last.lines[-1].rpartition(" = ")[2])
        return names[0] if names and names[0] in self.all_values else ""

    def unread(self) -> list[str]:
        """Tensors that nothing reads."""
        text = "\n".join(line.partition(" = ")[2] or line for step in self.steps for line in step.lines)
        read = set(re.findall(VARIABLE, text))
        return [name for name in self.all_values if name not in read]

    def program(self, returned: Sequence[str]) -> Program:
        """What was drawn."""
        by = self.rng.choices(["filters", "weights", "zeros"], [0.7, 0.12, 0.18])[0]
        rate, argument = self.rng.choice([0.4, 0.6, 0.8]), self.rng.choice([0, 0, 0.5])
        return Program(
            self.seed,
            tuple(self.inputs),
            self.layers,
            self.tensors,
            tuple(self.steps),
            tuple(returned),
            Pruning(by, rate, argument, self.rng.choice([1, 1, 1, 2, 4])),
        )
