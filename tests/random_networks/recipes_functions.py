"""Recipes of functions and methods that compute: activations, arithmetic, pools, norms, convolutions, attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .builder import Draft, Option, Recipe, pick
from .recipes_layers import ACTIVATIONS, fit_for_shuffle, pads, pool_options, resized

WRITES = ("cannot follow that",)  # in-place operations and views

_NOT_IN_PLACE = ("alpha", "rounding_mode", "dtype", "approximate")  # where a function takes others, or none
_ALPHA = ("elu", "celu", "elu_", "celu_", "local_response_norm")
_BY_NAME = {"batch_norm": ("eps",), "instance_norm": ("weight", "bias", "eps")}


def _of(
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
_DTYPE = {"dtype": pick("torch.float64")}


def unary(kind: str) -> Recipe:
    """A function of each element, in place if its name ends with ``_``."""
    name = kind.partition(".")[2].rstrip("_")
    options: dict[str, Option] = {}
    if name == "clamp":
        options = {"min": pick("-0.5", "0.1", "0"), "max": pick("0.7", "1.5")}
    elif name == "softmax" and kind != "functional.softmax":
        options = _DTYPE

    def make(draft: Draft) -> None:
        x = draft.value()
        if name in ("log", "sqrt", "rsqrt"):
            x = _positive(draft, x)
        required = {}
        if name == "pow":
            required = {"exponent": draft.rng.choice(["2", "3", "0.5"])}
            x = _positive(draft, x) if required["exponent"] == "0.5" else x
        if name == "softmax":
            required = {"dim": draft.rng.choice(["1", "-1"])}
        text = _of(kind, x, draft, required, options)
        _new_or_statement(kind, x, text, draft)

    required = {"pow": ("exponent",), "softmax": ("dim",)}.get(name, ())
    return Recipe(kind, make, (*required, *options), refusable=WRITES if kind.endswith("_") else ())


def _activation(kind: str, options: Mapping[str, Option]) -> Recipe:
    def make(draft: Draft) -> None:
        x = draft.value()
        _new_or_statement(kind, x, _of(kind, x, draft, {}, options), draft)

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
        text = _of(kind, x, draft, {"other": other}, options)
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

    return Recipe(kind, make)


# ---------------------------------------------------------------------------- of torch.nn.functional


def _conv(name: str) -> Recipe:
    count, transposed = int(name[-2]), "transpose" in name
    kind = f"functional.{name}"
    options: dict[str, Option] = {
        "bias": lambda draft: "",
        "stride": pick("2"),
        "padding": pick("1") if transposed else pick("1", "'same'"),
        **({"output_padding": pick("1")} if transposed else {}),
        "groups": lambda draft: "2",
        "dilation": pick("2"),
    }

    def make(draft: Draft) -> None:
        x = draft.value(count + 2)
        channels = draft.shape(x)[1]
        drawn = draft.options(kind, options, 0.45)
        if "output_padding" in drawn:
            drawn["stride"] = "2"
            draft.used.add(f"{kind}.stride")
        if channels % 2 and "groups" in drawn:
            drawn["groups"] = str(channels)
        groups = int(drawn.get("groups", 1))
        width = draft.rng.randint(1, 3) * groups
        sizes = [draft.rng.choice([1, 2, 3]) for _ in range(count)]
        if draft.rng.random() < 0.4 and not transposed:  # of a layer that is not called itself
            layer = draft.layer(f"nn.Conv{count}d({channels}, {width}, {tuple(sizes)}, groups={groups})")
            weight, bias = f"{layer}.weight", f"{layer}.bias"
        else:
            lead = (channels, width // groups) if transposed else (width, channels // groups)
            weight, bias = draft.tensor((*lead, *sizes), "parameter"), draft.tensor((width,), "parameter")
        if "bias" in drawn:
            drawn["bias"] = bias
        draft.used.add(f"{kind}.weight")
        draft.let(draft.call(kind, x, {"weight": weight}, drawn, ("weight", *options), "input"))

    return Recipe(kind, make, ("weight", *options), 2.0)


def _simple(
    kind: str,
    dims: tuple[int, ...],
    required: Callable[[Draft, tuple[int, ...]], Mapping[str, str]],
    options: Callable[[tuple[int, ...]], Mapping[str, Option]],
    names: tuple[str, ...],
    weight: float = 1.0,
) -> Recipe:
    def make(draft: Draft) -> None:
        x = draft.value(*dims)
        shape = draft.shape(x)
        draft.let(_of(kind, x, draft, required(draft, shape), options(shape)))

    return Recipe(kind, make, names, weight)


def _own(size: int) -> Option:
    return lambda draft: draft.tensor((size,), "parameter")


def _layer_norm(draft: Draft) -> None:
    kind, x = "functional.layer_norm", draft.value(2, 3, 4)
    sizes = draft.shape(x)[-draft.rng.randint(1, len(draft.shape(x)) - 1) :]
    options: dict[str, Option] = {name: lambda d: d.tensor(sizes, "parameter") for name in ("weight", "bias")}
    draft.let(_of(kind, x, draft, {"normalized_shape": str(tuple(sizes))}, {**options, "eps": pick("0.1")}))


def _attention(draft: Draft) -> None:
    kind, q = "functional.scaled_dot_product_attention", draft.value(3, 4)
    k, v = draft.like(q), draft.like(q)
    options: dict[str, Option] = {"scale": pick("0.3")}
    if draft.rng.random() < 0.5:
        options["is_causal"] = pick("True")
    else:
        length = draft.shape(q)[-2]
        options["attn_mask"] = lambda d: d.tensor((length, length), "buffer")
    drawn = draft.options(kind, options)
    draft.used.update((f"{kind}.key", f"{kind}.value"))
    draft.let(draft.call(kind, q, {"key": k, "value": v}, drawn, ("key", "value"), "query"))


def _pad(draft: Draft) -> None:
    kind, x = "functional.pad", draft.value(4)
    drawn = draft.options(kind, {"mode": pick("'reflect'", "'replicate'", "'circular'")}, 0.5)
    if not drawn:
        drawn = draft.options(kind, {"value": pick("0.5", "-1.0")}, 0.7)
    sides = draft.rng.choice([4, 4, 2] if drawn else [4, 2, 6, 6])
    draft.used.add(f"{kind}.pad")
    draft.let(draft.call(kind, x, {"pad": pads(draft, sides, -1)}, drawn, ("pad", "mode", "value"), "input"))


def _interpolate(draft: Draft) -> None:
    kind, x = "functional.interpolate", draft.value(3, 4, 4)
    drawn = resized(draft, kind, len(draft.shape(x)))
    if drawn.get("mode") in ("'bilinear'", "'bicubic'"):
        drawn |= draft.options(kind, {"antialias": pick("True")}, 0.6)
    if "scale_factor" in drawn:
        drawn |= draft.options(kind, {"recompute_scale_factor": pick("True")}, 0.5)
    draft.let(draft.call(kind, x, {}, drawn, (), "input"))


def _groups_of(shape: tuple[int, ...], draft: Draft) -> str:
    common = [n for n in range(1, shape[1] + 1) if shape[1] % n == 0]
    return str(draft.rng.choice(common))


def _output(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {"output_size": draft.rng.choice(["1", "3"] if len(shape) == 3 else ["1", "(2, 3)", "(None, 2)", "3"])}


def _kernel(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {"kernel_size": draft.rng.choice(["2", "3", "(3, 2)", "(1, 2)"])}


def _dim(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {"dim": draft.rng.choice(["1", "-1"])}


def _nothing(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {}


def _statistics(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {"running_mean": draft.tensor((shape[1],), "buffer"), "running_var": draft.tensor((shape[1],), "buffer")}


_AFFINE = ("weight", "bias", "eps")


def _affine(shape: tuple[int, ...]) -> dict[str, Option]:
    return {"weight": _own(shape[1]), "bias": _own(shape[1]), "eps": pick("0.1")}


def _linear(draft: Draft) -> None:
    kind, x = "functional.linear", draft.value(2, 3, 4)
    last, width = draft.shape(x)[-1], draft.rng.randint(1, 8)
    weight, bias = draft.tensor((width, last), "parameter"), _own(width)
    draft.let(_of(kind, x, draft, {"weight": weight}, {"bias": bias}))


def _shuffle(kind: str, argument: str) -> Recipe:
    def make(draft: Draft) -> None:
        x = fit_for_shuffle(draft, draft.value(4), "un" in kind)
        draft.let(_of(kind, x, draft, {argument: "2"}, {}))

    return Recipe(kind, make, (argument,), 2.0)


FUNCTIONAL: list[Recipe] = [
    _shuffle("functional.pixel_shuffle", "upscale_factor"),
    _shuffle("functional.pixel_unshuffle", "downscale_factor"),
    _simple(
        "functional.prelu",
        (2, 3, 4),
        lambda d, s: {"weight": d.tensor((d.rng.choice([1, s[1]]),), "parameter")},
        lambda s: {},
        ("weight",),
    ),
    _simple("functional.glu", (2, 3, 4), _nothing, lambda s: {"dim": pick("1")}, ("dim",)),
    *(
        _simple(f"functional.{n}", (2, 3, 4), _dim, lambda s: _DTYPE, ("dim", "dtype"))
        for n in ("softmax", "log_softmax")
    ),
    _simple(
        "functional.avg_pool2d",
        (4,),
        _kernel,
        lambda s: pool_options(2, True),
        ("kernel_size", *pool_options(2, True)),
        2.0,
    ),
    _simple(
        "functional.max_pool2d",
        (4,),
        _kernel,
        lambda s: _in_order(pool_options(2, False)),
        ("kernel_size", *pool_options(2, False)),
    ),
    _simple("functional.adaptive_avg_pool1d", (3,), _output, lambda s: {}, ("output_size",)),
    _simple("functional.adaptive_avg_pool2d", (4,), _output, lambda s: {}, ("output_size",)),
    _simple("functional.adaptive_max_pool2d", (4,), _output, lambda s: {}, ("output_size",)),
    *(_conv(name) for name in ("conv1d", "conv2d", "conv_transpose2d")),
    Recipe("functional.linear", _linear, ("weight", "bias")),
    _simple("functional.batch_norm", (2, 3, 4), _statistics, _affine, ("running_mean", "running_var", *_AFFINE)),
    Recipe("functional.layer_norm", _layer_norm, ("normalized_shape", *_AFFINE)),
    _simple(
        "functional.group_norm",
        (2, 3, 4),
        lambda d, s: {"num_groups": _groups_of(s, d)},
        _affine,
        ("num_groups", *_AFFINE),
    ),
    _simple("functional.instance_norm", (3, 4), _nothing, _affine, _AFFINE),
    _simple(
        "functional.local_response_norm",
        (3, 4),
        lambda d, s: {"size": d.rng.choice(["2", "3"])},
        lambda s: {"alpha": pick("0.1"), "beta": pick("0.5"), "k": pick("2.0")},
        ("size", "alpha", "beta", "k"),
    ),
    _simple(
        "functional.normalize",
        (2, 3, 4),
        _nothing,
        lambda s: {"p": pick("1.0", "3.0"), "dim": pick("-1"), "eps": pick("0.1")},
        ("p", "dim", "eps"),
    ),
    Recipe("functional.pad", _pad, ("pad", "mode", "value")),
    Recipe(
        "functional.interpolate",
        _interpolate,
        ("size", "scale_factor", "mode", "align_corners", "antialias", "recompute_scale_factor"),
        4.0,
    ),
    _simple("functional.pixel_shuffle", (4,), lambda d, s: {"upscale_factor": "2"}, lambda s: {}, ("upscale_factor",)),
    _simple("functional.channel_shuffle", (4,), lambda d, s: {"groups": _groups_of(s, d)}, lambda s: {}, ("groups",)),
    Recipe("functional.scaled_dot_product_attention", _attention, ("key", "value", "scale", "is_causal", "attn_mask")),
]


def _in_order(options: dict[str, Option]) -> dict[str, Option]:
    """Of max_pool2d, whose dilation comes before ceil_mode."""
    return {name: options[name] for name in ("stride", "padding", "dilation", "ceil_mode")}


def computing(known: frozenset[str]) -> list[Recipe]:
    """Recipes of all functions and methods that compute, as far as fastprune knows them."""
    names = [f"{space}.{name}{end}" for space in ("torch", "method") for name in _UNARY.split() for end in ("", "_")]
    pairs = "add sub mul div true_divide floor_divide maximum minimum"
    twos = [f"{space}.{name}{end}" for space in ("torch", "method") for name in pairs.split() for end in ("", "_")]
    found = [
        *(unary(kind) for kind in names),
        *(binary(kind) for kind in twos),
        *activations(known),
        *FUNCTIONAL,
        *(_operator(name) for name in ("neg", *_SIGNS)),
        *(_augmented(name) for name in ("iadd", "isub", "imul", "itruediv")),
        Recipe("torch.where", _where, ("condition", "other")),
        *(_matmul(kind) for kind in ("torch.bmm", "torch.matmul", "method.matmul")),
    ]
    return [recipe for recipe in found if recipe.kind in known]
