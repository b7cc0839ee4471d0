"""Recipes of functions and methods that compute: activations, arithmetic, products."""

from __future__ import annotations

from collections.abc import Mapping

from .builder import Draft, Option, Recipe, pick
from .recipes_layers import ACTIVATIONS

WRITES = ("cannot follow that",)  # in-place operations and views

_NOT_IN_PLACE = ("alpha", "rounding_mode", "dtype", "approximate")  # where a function takes others, or none
_ALPHA = ("elu", "celu", "elu_", "celu_", "local_response_norm")
_BY_NAME = {"batch_norm": ("eps",), "instance_norm": ("weight", "bias", "eps")}


def call_of(
    kind: str, x: str, draft: Draft, required: Mapping[str, str], options: Mapping[str, Option], share: float = 0.68
) -> str:
    """A call of a function or method."""
    space, _, name = kind.partition(".")
    drawn = draft.options(kind, options, share)
    draft.used.update(f"{kind}.{argument}" for argument in required)
    order = tuple(
        argument
        for argument in (*required, *options)
        if argument not in _BY_NAME.get(name, _NOT_IN_PLACE[name in _ALPHA :])
    )
    if space == "method":
        return draft.call(f"{x}.{name}", "", required, drawn, order)
    return draft.call(kind, x, required, drawn, order, "input")


def _new_or_statement(kind: str, x: str, text: str, draft: Draft) -> None:
    """What returns a tensor, or writes to its input: mostly as a statement then."""
    if not kind.endswith("_"):
        draft.let(text)
    elif draft.rng.random() < 0.6:
        draft.write(text, x)
    else:
        draft.let(text)


def _positive(draft: Draft, x: str) -> str:
    return draft.let(f"{x}.abs() + 0.5")


# ---------------------------------------------------------------------------- one tensor

_UNARY = "neg abs exp log sqrt rsqrt square relu sigmoid tanh erf clamp pow softmax"
DTYPE = {"dtype": pick("torch.float64")}


def unary(kind: str) -> Recipe:
    """A function of each element, in place if its name ends with ``_``."""
    name = kind.partition(".")[2].rstrip("_")
    options: dict[str, Option] = {}
    if name == "clamp":
        options = {"min": pick("-0.5", "0.1", "0"), "max": pick("0.7", "1.5")}
    elif name == "softmax" and kind != "functional.softmax":
        options = DTYPE

    def make(draft: Draft) -> None:
        x = draft.value()
        if name in ("log", "sqrt", "rsqrt"):
            x = _positive(draft, x)
        if name == "exp":
            x = draft.let(f"{x}.tanh()")
        required = {}
        if name == "pow":
            required = {"exponent": draft.rng.choice(["2", "3", "0.5"])}
            x = _positive(draft, x) if required["exponent"] == "0.5" else x
        if name == "softmax":
            required = {"dim": draft.rng.choice(["1", "-1"])}
        text = call_of(kind, x, draft, required, options)
        _new_or_statement(kind, x, text, draft)

    required = {"pow": ("exponent",), "softmax": ("dim",)}.get(name, ())
    return Recipe(kind, make, (*required, *options), refusable=WRITES if kind.endswith("_") else ())


def _activation(kind: str, options: Mapping[str, Option]) -> Recipe:
    def make(draft: Draft) -> None:
        x = draft.value()
        _new_or_statement(kind, x, call_of(kind, x, draft, {}, options), draft)

    return Recipe(kind, make, tuple(options), refusable=WRITES if kind.endswith("_") else ())


def activations(known: frozenset[str]) -> list[Recipe]:
    """Those of torch.nn.functional, with the arguments of the modules."""
    found = []
    for module, options in ACTIVATIONS.items():
        name = {"LeakyReLU": "leaky_relu"}.get(module, module.lower())
        found.append((f"functional.{name}", options))
        found.append((f"functional.{name}_", {key: value for key, value in options.items() if key != "inplace"}))
    return [_activation(kind, options) for kind, options in found if kind in known]


# ---------------------------------------------------------------------------- two

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**", "matmul": "@"}
_ROUNDING = {"rounding_mode": pick("'floor'", "'trunc'")}


def binary(kind: str) -> Recipe:
    """Arithmetic of a tensor and another, or a number, by function or method, in place if it ends with ``_``."""
    name = kind.partition(".")[2].rstrip("_")
    options: dict[str, Option] = {}
    if name in ("add", "sub"):
        options = {"alpha": pick("0.5", "-2", "3")}
    elif name == "div":
        options = _ROUNDING

    def make(draft: Draft) -> None:
        x = draft.value()
        other = draft.like(x) if name in ("maximum", "minimum") else draft.other(x)
        if "div" in name and _is_tensor(other):
            other = draft.let(f"{other}.abs() + 0.5")
        text = call_of(kind, x, draft, {"other": other}, options)
        _new_or_statement(kind, x, text, draft)

    lossy = "floor" in name or name == "div"
    return Recipe(
        kind,
        make,
        ("other", *options),
        3.0 if name in ("add", "mul") else 1.0,
        WRITES if kind.endswith("_") else (),
        lossy,
    )


def _is_tensor(text: str) -> bool:
    """Whether it is a tensor, not a number."""
    return text[0] in "xs"


def _operator(name: str) -> Recipe:
    kind, sign = f"operator.{name}", _SIGNS.get(name, "")

    def make(draft: Draft) -> None:
        x = draft.value()
        if name == "neg":
            draft.let(f"-{x}")
            return
        if name == "pow":
            draft.let(
                f"({x}.abs() + 0.5) ** {draft.rng.choice(['0.5', '2', '-1'])}"
                if draft.rng.random() < 0.5
                else f"{x} ** 2"
            )
            return
        if name == "matmul":
            draft.let(_product(draft, x))
            return
        other = draft.other(x)
        if name in ("truediv", "floordiv", "mod") and _is_tensor(other):
            other = f"({other}.abs() + 0.5)"
        if draft.rng.random() < 0.25 and name in ("add", "mul", "sub"):
            draft.let(f"{other} {sign} {x}")
        elif draft.rng.random() < 0.2 and name == "truediv":
            draft.let(f"1.5 / ({x}.abs() + 0.5)")
        else:
            draft.let(f"{x} {sign} {other}")

    return Recipe(kind, make, (), 5.0 if name in ("add", "mul") else 1.0, lossy=name in ("floordiv", "mod"))


def _product(draft: Draft, x: str) -> str:
    if draft.rng.random() < 0.5:
        return f"{x} @ {draft.tensor((draft.shape(x)[-1], draft.rng.randint(1, 8)))}"
    return (
        f"{x} @ {x}.transpose(-1, -2)" if len(draft.shape(x)) > 2 else f"{x} @ {draft.tensor((draft.shape(x)[-1], 3))}"
    )


def _augmented(name: str) -> Recipe:
    """``a += b``, where another name may have the tensor, too."""
    sign = _SIGNS[name[1:]]

    def make(draft: Draft) -> None:
        x = draft.value()
        if draft.rng.random() < 0.5:
            draft.let(x)  # a second name
        other = draft.other(x)
        if name == "itruediv" and _is_tensor(other):
            other = draft.let(f"{other}.abs() + 0.5")
        draft.write(f"{x} {sign}= {other}", x)

    return Recipe(f"operator.{name}", make, (), 2.0 if name == "iadd" else 1.0, WRITES)


def _where(draft: Draft) -> None:
    x = draft.value()
    shape = draft.shape(x)
    flags = draft.tensor(draft.rng.choice([(shape[1], *[1] * (len(shape) - 2)), shape[1:], (1,)]), "flags")
    draft.used.update(("torch.where.condition", "torch.where.other"))
    draft.let(
        f"torch.where({flags}, {x}, {draft.other(x)})"
        if draft.rng.random() < 0.8
        else f"torch.where({flags}, 0.5, {x})"
    )


def _matmul(kind: str) -> Recipe:
    def make(draft: Draft) -> None:
        if kind == "torch.bmm":
            x = draft.value(3)
            y = draft.like(x)
            draft.let(f"torch.bmm({x}, {y}.transpose(1, 2))")
        else:
            x = draft.value(2, 3, 4)
            other = draft.tensor((draft.shape(x)[-1], draft.rng.randint(1, 8)))
            draft.let(f"{x}.matmul({other})" if kind == "method.matmul" else f"torch.matmul({x}, {other})")

    return Recipe(kind, make, weight=2.0)


def computing(known: frozenset[str]) -> list[Recipe]:
    """Recipes of all functions and methods that compute, as far as fastprune knows them."""
    names = [f"{space}.{name}{end}" for space in ("torch", "method") for name in _UNARY.split() for end in ("", "_")]
    pairs = "add sub mul div true_divide floor_divide maximum minimum"
    twos = [f"{space}.{name}{end}" for space in ("torch", "method") for name in pairs.split() for end in ("", "_")]
    found = [
        *(unary(kind) for kind in names),
        *(binary(kind) for kind in twos),
        *activations(known),
        *(_operator(name) for name in ("neg", *_SIGNS)),
        *(_augmented(name) for name in ("iadd", "isub", "imul", "itruediv")),
        Recipe("torch.where", _where, ("condition", "other")),
        *(_matmul(kind) for kind in ("torch.bmm", "torch.matmul", "method.matmul")),
    ]
    return [recipe for recipe in found if recipe.kind in known]
