"""Recipes of functions and methods that move, take, put together and sum up elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from .builder import Draft, Option, Recipe, pick

# How the arguments of one are drawn, given a tensor of some shape.
Arguments = Callable[[Draft, tuple[int, ...]], Mapping[str, str]]


def _dims(draft: Draft, shape: tuple[int, ...], least: int = 1) -> int:
    return draft.rng.randrange(least, len(shape))


def _named(draft: Draft, dim: int, shape: tuple[int, ...]) -> str:
    """A dimension, counted from the front or from the back."""
    return str(dim if draft.rng.random() < 0.6 else dim - len(shape))


def _flatten(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    first = _dims(draft, shape)
    given = {"start_dim": _named(draft, first, shape)}
    return given | (
        {"end_dim": _named(draft, draft.rng.randrange(first, len(shape)), shape)} if draft.rng.random() < 0.6 else {}
    )


def _permute(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    dims = list(range(1, len(shape)))
    draft.rng.shuffle(dims)
    return {"dims": f"(0, {', '.join(map(str, dims))})"}


def _transpose(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {f"dim{i}": _named(draft, _dims(draft, shape), shape) for i in range(2)}


def _movedim(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {name: _named(draft, _dims(draft, shape), shape) for name in ("source", "destination")}


def _narrow(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    dim = draft.rng.choice([1, 1, _dims(draft, shape)])
    start = draft.rng.randrange(shape[dim])
    return {
        "dim": _named(draft, dim, shape),
        "start": str(start),
        "length": str(draft.rng.randint(1, shape[dim] - start)),
    }


def _roll(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    if draft.rng.random() < 0.3 and len(shape) > 2:
        return {"shifts": "(1, -1)", "dims": "(1, 2)" if draft.rng.random() < 0.4 else "(-1, -2)"}
    return {"shifts": draft.rng.choice(["1", "-2"]), "dims": _named(draft, _dims(draft, shape), shape)}


def _reduced(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    if len(shape) == 4 and draft.rng.random() < 0.6:
        return {"dim": draft.rng.choice(["(2, 3)", "[2, 3]", "(-1, -2)", "(3, 2)", "[-1, 2]"])}
    if len(shape) > 2 and draft.rng.random() < 0.2:
        return {"dim": "(1, 2)"}
    return {"dim": _named(draft, _dims(draft, shape), shape)}


_KEEPDIM: dict[str, Option] = {"keepdim": pick("True")}
_SPREAD: dict[str, Option] = {"correction": pick("0"), **_KEEPDIM}
_SUMS: dict[str, Option] = {**_KEEPDIM, "dtype": pick("torch.float64")}
_ONE_TENSOR: dict[str, tuple[Arguments, Mapping[str, Option], tuple[int, ...]]] = {
    "flatten": (_flatten, {}, (3, 4, 4)),
    "permute": (_permute, {}, (3, 4)),
    "transpose": (_transpose, {}, (3, 4)),
    "movedim": (_movedim, {}, (3, 4)),
    "unsqueeze": (lambda d, s: {"dim": d.rng.choice(["1", "-1", "2"])}, {}, (2, 3, 4)),
    "narrow": (_narrow, {}, (2, 3, 4)),
    "roll": (_roll, {}, (2, 3, 4)),
    **dict.fromkeys(("mean", "sum"), (_reduced, _SUMS, (3, 4, 4))),
    **dict.fromkeys(("amax", "amin"), (_reduced, _KEEPDIM, (3, 4, 4))),
    **dict.fromkeys(("var", "std"), (_reduced, _SPREAD, (3, 4, 4))),
}


def _one_tensor(kind: str) -> Recipe:
    space, _, name = kind.partition(".")
    arguments, options, dims = _ONE_TENSOR[name]
    names = {
        "flatten": ("start_dim", "end_dim"),
        "permute": ("dims",),
        "transpose": ("dim0", "dim1"),
        "unsqueeze": ("dim",),
    }
    names |= {"movedim": ("source", "destination"), "narrow": ("dim", "start", "length"), "roll": ("shifts", "dims")}
    order = names.get(name, ("dim",))

    def make(draft: Draft) -> None:
        x = draft.value(*dims)
        given = arguments(draft, draft.shape(x))
        drawn = draft.options(kind, options, 0.7)
        draft.used.update(f"{kind}.{argument}" for argument in given)
        places = () if "correction" in drawn else (*order, *(n for n in options if n == "keepdim"))
        if space == "torch":
            draft.let(draft.call(kind, x, given, drawn, places or order, "input"))
        elif name == "permute" and draft.rng.random() < 0.6:
            draft.let(f"{x}.permute{given['dims']}")
        else:
            draft.let(draft.call(f"{x}.{name}", "", given, drawn, places or order))

    return Recipe(kind, make, (*order, *options), 3.0 if name == "mean" else 1.0)


# ---------------------------------------------------------------------------- sizes that are written out


def _sizes(draft: Draft, x: str) -> str:
    """A new shape of the elements of a tensor, its sizes known or asked for."""
    shape = draft.shape(x)
    count = draft.rng.choice([f"{x}.size(0)", f"{x}.shape[0]", f"{x}.size()[0]", "-1"])
    rest = math.prod(shape[1:])
    split = next((n for n in (2, 3) if shape[1] % n == 0), 1)
    forms = [
        f"{count}, {shape[1]}, {rest // shape[1]}",
        f"{count}, {rest}",
        f"{count}, {split}, {shape[1] // split}, {rest // shape[1]}",
    ]
    if count != "-1":
        forms += [f"{count}, -1", f"{count}, {shape[1]}, -1", f"{count}, {x}.size(1), -1", f"{count}, {split}, -1"]
    if len(shape) == 4:
        forms.append(f"{count}, {shape[1] * shape[2]}, {shape[3]}, 1")
        forms.append(f"{x}.size(0), {x}.size(1), {x}.size(2) * {x}.size(3)")
    return draft.rng.choice(forms)


def _reshape(kind: str) -> Recipe:
    def make(draft: Draft) -> None:
        x = draft.value(3, 4, 4)
        sizes = _sizes(draft, x)
        draft.used.add(f"{kind}.shape")
        if kind == "torch.reshape":
            draft.let(draft.call(kind, x, {"shape": f"({sizes})"}, {}, ("shape",), "input"))
        else:
            draft.let(f"{x}.{kind.partition('.')[2]}({sizes if draft.rng.random() < 0.7 else f'({sizes})'})")

    return Recipe(kind, make, ("shape",))


def _asked(kind: str) -> Recipe:
    """Sizes and numbers of dimensions, as they are asked for."""
    forms = {
        "method.size": ["{x}.reshape({x}.size(0), -1)", "{x}.view({x}.size(0), {x}.size(1), -1)", "{x} / {x}.size(-1)"],
        "method.dim": ["{x}.flatten({x}.dim() - 2)", "{x}.mean({x}.dim() - 1)"],
        "getattr.shape": [
            "{x}.reshape({x}.shape[0], -1)",
            "{x}.reshape({x}.shape[0], {x}.shape[1], -1)",
            "{x} / {x}.shape[-1]",
            "{x} * {x}.shape[1]",
        ],
        "getattr.ndim": ["{x}.flatten({x}.ndim - 2)", "{x}.transpose({x}.ndim - 1, 1)"],
    }[kind]

    def make(draft: Draft) -> None:
        draft.let(draft.rng.choice(forms).format(x=draft.value(3, 4)))

    return Recipe(kind, make)


# ---------------------------------------------------------------------------- several tensors


def _cat(kind: str) -> Recipe:
    def make(draft: Draft) -> None:
        x = draft.value()
        shape, dim = draft.shape(x), 1 if draft.rng.random() < 0.8 else _dims(draft, draft.shape(x))
        if kind == "torch.stack":
            others = [draft.like(x)]
        else:
            fit = [
                n
                for n, v in draft.values.items()
                if v.dim() == len(shape) and all(i == dim or s == shape[i] for i, s in enumerate(v.shape))
            ]
            others = [draft.rng.choice(fit) if draft.rng.random() < 0.7 else draft.like(x)]
            others += [draft.rng.choice(fit)] if draft.rng.random() < 0.2 else []
        parts = [x, *others]
        draft.rng.shuffle(parts)
        listed = f"[{', '.join(parts)}]" if draft.rng.random() < 0.6 else f"({', '.join(parts)})"
        given = {"dim": _named(draft, dim, shape) if kind != "torch.stack" else str(draft.rng.choice([1, 2]))}
        draft.used.update((f"{kind}.tensors", f"{kind}.dim"))
        draft.let(draft.call(kind, listed, given, {}, ("dim",), "tensors"))

    return Recipe(kind, make, ("tensors", "dim"), 4.0 if kind == "torch.cat" else 1.0)


def _parts(kind: str) -> Recipe:
    """Several tensors of one; some are used, or all are put together in another order."""
    name = kind.partition(".")[2]
    split = "split_size_or_sections" if kind.startswith("torch.") else "split_size"

    def make(draft: Draft) -> None:
        x = draft.value()
        shape = draft.shape(x)
        dim = 1 if draft.rng.random() < 0.8 else _dims(draft, shape)
        given = {}
        if name == "chunk":
            given["chunks"] = str(draft.rng.choice([2, 3]))
        elif name == "split":
            first = draft.rng.randint(1, shape[dim])
            sections = [str(first), f"[{first}, {shape[dim] - first}]"] if first < shape[dim] else [str(first)]
            given[split] = draft.rng.choice(sections)
        count = len(eval(f"x.{name}({', '.join([*given.values(), str(dim)])})", {"x": draft.space[x]}))
        given["dim"] = _named(draft, dim, shape)
        draft.used.update(f"{kind}.{argument}" for argument in given)
        order = tuple(given)
        if kind.startswith("torch."):
            text = draft.call(kind, x, given, {}, order, "" if name == "split" else "input")
        else:
            text = draft.call(f"{x}.{name}", "", given, {}, order)
        parts = f"n{next(draft.numbers)}"
        draft.do(f"{parts} = {text}")
        if name != "unbind" and draft.rng.random() < 0.4:
            draft.let(f"torch.cat([{', '.join(f'{parts}[{i}]' for i in reversed(range(count)))}], {dim})")
            return
        for i in draft.rng.sample(range(count), min(count, 2)):
            draft.let(f"{parts}[{i}]")

    names = {"chunk": ("chunks", "dim"), "split": (split, "dim")}
    return Recipe(kind, make, names.get(name, ("dim",)))


def _getitem(draft: Draft) -> None:
    x = draft.value()
    shape = draft.shape(x)
    half = max(shape[1] // 2, 1)
    forms = [f":, :{half}", f":, {half}:", ":, ::2", ":, -1:", ":, [0, -1]", ":, :, None", "..., 1:", "..., :-1"]
    forms += (
        [":, :, ::2, 1:", ":, :, 1:-1, ...", ":, 0", ":, :, 0", "..., 0", f":, :{half}, 1:"] if len(shape) == 4 else []
    )
    draft.let(f"{x}[{draft.rng.choice(forms)}]")


def _squeeze(kind: str) -> Recipe:
    def make(draft: Draft) -> None:
        x = draft.value(4)
        kept = draft.rng.choice(["3", "2", "(2, 3)"])
        y = draft.let(f"{x}.mean({kept}, keepdim=True)")
        draft.used.add(f"{kind}.dim")
        space, dim = kind.partition(".")[0], draft.rng.choice(["3", "-1"]) if kept != "2" else "2"
        if kept == "(2, 3)" and draft.rng.random() < 0.5:
            dim = "(2, 3)"
        draft.let(
            draft.call("torch.squeeze", y, {"dim": dim}, {}, ("dim",), "input")
            if space == "torch"
            else f"{y}.squeeze({dim})"
        )

    return Recipe(kind, make, ("dim",))


def _expand(kind: str) -> Recipe:
    def make(draft: Draft) -> None:
        x = draft.value(4)
        y = draft.let(f"{x}.amax((2, 3), keepdim=True)" if draft.rng.random() < 0.5 else f"{x}.mean(3, keepdim=True)")
        side = draft.shape(y)[2]
        if kind == "method.expand_as":
            draft.let(f"{y}.expand_as({x})")
        else:
            draft.let(f"{y}.expand(-1, -1, {side if side > 1 else 4}, 3)")

    return Recipe(kind, make)


def _cast(name: str) -> Recipe:
    """To another dtype and back."""

    def make(draft: Draft) -> None:
        x = draft.value()
        if name == "type_as":
            draft.let(f"{x}.type_as({draft.value()})")
        else:
            draft.let(f"{x}.{name}().type_as({x})")

    return Recipe(f"method.{name}", make, lossy=name in ("half", "bfloat16"))


def _plain(name: str) -> Recipe:
    return Recipe(f"method.{name}", lambda draft: draft.let(f"{draft.value()}.{name}()") and None)


def moving(known: frozenset[str]) -> list[Recipe]:
    """Recipes of all functions and methods that move elements, as far as fastprune knows them."""
    spaces = ("torch", "method")
    found = [
        *(_one_tensor(f"{space}.{name}") for space in spaces for name in _ONE_TENSOR),
        *(_reshape(kind) for kind in ("torch.reshape", "method.reshape", "method.view")),
        *(_parts(f"{space}.{name}") for space in spaces for name in ("chunk", "split", "unbind")),
        *(_squeeze(f"{space}.squeeze") for space in spaces),
        *(_cat(f"torch.{name}") for name in ("cat", "concat", "stack")),
        *(_expand(kind) for kind in ("method.expand", "method.expand_as")),
        *(_cast(name) for name in ("float", "half", "bfloat16", "double", "type_as")),
        *(_plain(name) for name in ("contiguous", "clone")),
        *(_asked(kind) for kind in ("method.size", "method.dim")),
        Recipe("operator.getitem", _getitem),
    ]
    return [recipe for recipe in found if recipe.kind in known] + [_asked("getattr.shape"), _asked("getattr.ndim")]
