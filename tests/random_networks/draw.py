"""Which networks there are: one for each number."""

from __future__ import annotations

import random
from collections import defaultdict

from fastprune.channel_rules import FOLLOWED
from fastprune.layer_kinds import FUNCTIONS, METHODS, MODULES

from .builder import Draft, Recipe
from .program import Program
from .recipes_forms import FORMS
from .recipes_functional import FUNCTIONAL
from .recipes_functions import computing
from .recipes_layers import LAYERS
from .recipes_shapes import moving

# What fastprune knows, but for MaskedConv2d, which is a Conv2d once it is masked.
KNOWN = frozenset(
    {f"nn.{name}" for name in MODULES} | set(FUNCTIONS) - {"getattr"} | {f"method.{name}" for name in METHODS}
)
# A function that fastprune no longer knows is left out; one that it knows anew is missing.
_ALL = [*LAYERS, *computing(KNOWN), *(r for r in FUNCTIONAL if r.kind in KNOWN), *moving(KNOWN), *FORMS]
RECIPES: dict[str, Recipe] = {r.kind: r for r in _ALL}
_LAST = "form.spread"  # of every tenth network, beside the turns: what it is to show, nothing may read but its own
_ONLY_FIRST = ("form.second_input", "form.optional_input", "form.number_input")
_TURNS = 8  # kinds whose turn it is in one network


def missing() -> list[str]:
    """Known layers, functions and methods without a recipe."""
    return sorted(KNOWN - RECIPES.keys() - {"nn.MaskedConv2d"})


def _times(recipe: Recipe) -> int:
    if recipe.kind == _LAST:
        return 0
    more = len(recipe.options) > 2 or recipe.weight > 1 or recipe.kind in _ONLY_FIRST
    return 1 + more + (recipe.weight >= 4) + (len(recipe.options) > 4)


def _order() -> list[str]:
    """Whose turn it is: those that matter, have many arguments or often do not fit come more than once."""
    ordered = sorted(recipe.kind for recipe in RECIPES.values() for _ in range(_times(recipe)))
    random.Random(0).shuffle(ordered)
    return ordered


_ORDER = _order()
_WEIGHTS = [RECIPES[kind].weight for kind in _ORDER]


def draw(seed: int) -> Program:
    """The network of this number: always the same, as long as the recipes are."""
    draft = Draft(seed)
    rng = draft.rng
    turn = [_ORDER[(seed * _TURNS + i) % len(_ORDER)] for i in range(_TURNS)]
    for kind in turn:
        if kind in _ONLY_FIRST:
            draft.attempt(RECIPES[kind])
    rng.shuffle(turn)
    draft.attempt(RECIPES["form.conv_norm_act" if rng.random() < 0.6 else "nn.Conv2d"])
    for place, kind in enumerate(turn):
        if kind not in _ONLY_FIRST:
            _take_turn(draft, RECIPES[kind])
        if place % 4 == 0:
            _follow(draft)
    if seed % 10 == 9:
        draft.attempt(RECIPES[_LAST])
    return draft.program(_finish(draft))


def _take_turn(draft: Draft, recipe: Recipe) -> None:
    """A step, and often one that reads what it makes or writes to."""
    rng = draft.rng
    if rng.random() < 0.3:
        draft.attempt(RECIPES[rng.choice(_WRITING)])
    if not draft.attempt(recipe, 12):
        return
    written = draft.written()
    if written and rng.random() < 0.6:  # what was written to is read again
        draft.attempt(Recipe("form.output", lambda draft: _read(draft, written)))
    elif rng.random() < 0.4:
        draft.attempt(RECIPES[rng.choice(_WRITING)])
    elif rng.random() < 0.3:
        draft.attempt(RECIPES[rng.choices(_ORDER, _WEIGHTS)[0]])


def _follow(draft: Draft) -> None:
    """Something that channels are followed through, between layers that write and read constants, and nobody else."""
    before = set(draft.all_values)
    draft.attempt(RECIPES[draft.rng.choice(_WRITING)])
    draft.latest = 1.0
    draft.attempt(RECIPES[draft.rng.choice(draft.rng.choice(_FOLLOWED))], 12)
    draft.latest = 0.6
    last = list(draft.values)[-1]
    if draft.attempt(Recipe("form.output", lambda draft: _read(draft, last))):
        draft.private |= set(list(draft.all_values)[:-1]) - before


_WRITING = ("nn.Conv2d", "form.conv_norm_act")


def _groups_followed() -> list[list[str]]:
    """Kinds that the analysis of channels follows, those together that it has one rule for."""
    names = {entry if isinstance(entry, str) else getattr(entry, "__name__", "") for entry in FOLLOWED}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    rules = ("AvgPool", "Norm", "PReLU", "Pool", "_pool", "Conv", "Dropout", "cat", "mean", "add", "sub", "mul", "div")
    for kind in RECIPES:
        space, _, name = kind.partition(".")
        if name in names if space in ("nn", "method") else FUNCTIONS.get(kind) in FOLLOWED:
            shapes = "shape" if name.lower() in ("flatten", "reshape", "view", "size") else "elementwise"
            groups[next((rule for rule in rules if rule in name), shapes)].append(kind)
    # What looks like one of these and is not: each channel depends on others, or on a parameter of its own.
    unlike = ["nn.PReLU", "nn.PReLU", "functional.prelu", "nn.GroupNorm", "nn.InstanceNorm2d", "nn.LocalResponseNorm"]
    return [*(groups[rule] for rule in sorted(groups)), unlike]


_FOLLOWED = _groups_followed()


def _finish(draft: Draft) -> list[str]:
    """Let layers read most of what nothing has read; returns what the network does."""
    left = draft.unread() or [list(draft.values)[-1]]
    returned: list[str] = []
    while left:
        name = left.pop(0)
        if draft.rng.random() < 0.75:
            head = Recipe("form.output", lambda d, name=name: _read(d, name))
            if draft.attempt(head):
                name = list(draft.values)[-1]
        returned.append(name)
        left = left or draft.program(returned).not_needed()[-1:]  # what was read by something that nobody reads
    return returned


def _read(draft: Draft, name: str) -> None:
    shape, width = draft.shape(name), draft.rng.randint(1, 4)
    if len(shape) == 4:
        padding = draft.rng.choice(["", ", padding=1", ", padding=1, padding_mode='replicate'"])
        call = f"nn.Conv2d({shape[1]}, {width}, {draft.rng.choice([1, 3])}{padding})"
    elif len(shape) == 2:
        call = f"nn.Linear({shape[1]}, {width})"
    else:
        call = (
            draft.rng.choice([f"nn.Linear({shape[-1]}, {width})", f"nn.Conv1d({shape[1]}, {width}, 1)"])
            if len(shape) == 3
            else f"nn.Linear({shape[-1]}, {width})"
        )
    draft.let(f"{draft.layer(call)}({name})")
