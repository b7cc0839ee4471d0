"""Recipes of functions of torch.nn.functional that are more than elementwise: layers, pools, norms, attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .builder import Draft, Option, Recipe, pick
from .recipes_functions import DTYPE, call_of
from .recipes_layers import fit_for_shuffle, pads, pool_options, resized


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
        draft.let(call_of(kind, x, draft, required(draft, shape), options(shape)))

    return Recipe(kind, make, names, weight)


def _own(size: int) -> Option:
    return lambda draft: draft.tensor((size,), "parameter")


def _layer_norm(draft: Draft) -> None:
    kind, x = "functional.layer_norm", draft.value(2, 3, 4)
    sizes = draft.shape(x)[-draft.rng.randint(1, len(draft.shape(x)) - 1) :]
    options: dict[str, Option] = {name: lambda d: d.tensor(sizes, "parameter") for name in ("weight", "bias")}
    draft.let(call_of(kind, x, draft, {"normalized_shape": str(tuple(sizes))}, {**options, "eps": pick("0.1")}))


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
    draft.let(call_of(kind, x, draft, {"weight": weight}, {"bias": bias}))


def _shuffle(kind: str, argument: str) -> Recipe:
    def make(draft: Draft) -> None:
        x = fit_for_shuffle(draft, draft.value(4), "unshuffle" in kind)
        draft.let(call_of(kind, x, draft, {argument: "2"}, {}))

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
        _simple(f"functional.{n}", (2, 3, 4), _dim, lambda s: DTYPE, ("dim", "dtype"))
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
    _simple("functional.channel_shuffle", (4,), lambda d, s: {"groups": _groups_of(s, d)}, lambda s: {}, ("groups",)),
    Recipe("functional.scaled_dot_product_attention", _attention, ("key", "value", "scale", "is_causal", "attn_mask")),
]


def _in_order(options: dict[str, Option]) -> dict[str, Option]:
    """Of max_pool2d, whose dilation comes before ceil_mode."""
    return {name: options[name] for name in ("stride", "padding", "dilation", "ceil_mode")}
