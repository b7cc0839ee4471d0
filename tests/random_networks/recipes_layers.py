"""Recipes of modules: one for each kind in fastprune.layer_kinds.MODULES, with every argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from .builder import Draft, Option, Recipe, pick

_INPLACE = {"inplace": pick("True")}
ACTIVATIONS: dict[str, Mapping[str, Option]] = {
    **dict.fromkeys(("ReLU", "ReLU6", "SiLU", "Mish", "SELU", "Hardswish", "Hardsigmoid"), _INPLACE),
    **{name: {} for name in ("Sigmoid", "Tanh", "Softsign", "LogSigmoid")},
    "GELU": {"approximate": pick("'tanh'")},
    "LeakyReLU": {"negative_slope": pick("0.3", "-0.2", "1.5"), **_INPLACE},
    "ELU": {"alpha": pick("0.5", "2.0"), **_INPLACE},
    "CELU": {"alpha": pick("0.5", "2.0"), **_INPLACE},
    "Hardtanh": {"min_val": pick("-0.5", "0.1"), "max_val": pick("0.6", "2.0"), **_INPLACE},
    "Softplus": {"beta": pick("2.0", "0.5"), "threshold": pick("30")},
}

Arguments = Callable[[Draft, tuple[int, ...]], Mapping[str, str]]


def _layer(
    name: str,
    dims: tuple[int, ...],
    required: Arguments,
    options: Mapping[str, Option],
    weight: float = 1.0,
) -> Recipe:
    """A class of torch.nn or torchvision, called on a tensor of ``dims``."""
    kind = f"nn.{name}"
    head = kind if hasattr(nn, name) else name

    def make(draft: Draft) -> None:
        x = draft.value(*dims)
        given = required(draft, draft.shape(x))
        drawn = draft.options(kind, options)
        draft.used.update(f"{kind}.{argument}" for argument in given)
        made = draft.layer(draft.call(head, "", given, drawn))
        result = draft.let(f"{made}({x})")
        if draft.rng.random() < 0.06:  # a layer that is called twice
            again = draft.like(x) if draft.rng.random() < 0.5 else result
            draft.let(f"{made}({again})")

    return Recipe(kind, make, tuple(options), weight)


def _none(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {}


def _divisor(draft: Draft, *numbers: int) -> str:
    """One that all the numbers have, above 1 if there is one."""
    common = [n for n in range(2, max(numbers) + 1) if all(number % n == 0 for number in numbers)]
    return str(draft.rng.choice(common or [1]))


def _sizes(count: int, *numbers: int) -> Option:
    """One number, or a tuple of so many."""

    def draw(draft: Draft) -> str:
        if count < 2 or draft.rng.random() < 0.6:
            return str(draft.rng.choice(numbers))
        return f"({', '.join(str(draft.rng.choice(numbers)) for _ in range(count))})"

    return draw


# ---------------------------------------------------------------------------- convolutions


def convolution(name: str) -> Recipe:
    """Of 1 to 3 dimensions, transposed ones too; grouped, depthwise, strided, dilated, padded in every mode."""
    count, transposed = int(name[-2]), "Transpose" in name
    kind = f"nn.{name}"
    padding = [_sizes(count, 1, 2)] if transposed else [_sizes(count, 1, 2), pick("'same'"), pick("'valid'")]
    options: dict[str, Option] = {
        "stride": _sizes(count, 2, 1) if count > 1 else pick("2"),
        "padding": lambda draft: draft.rng.choice(padding)(draft),
        "dilation": pick("2"),
        "groups": lambda draft: "",
        "bias": pick("False"),
    }
    options |= (
        {"output_padding": pick("1")}
        if transposed
        else {"padding_mode": pick("'reflect'", "'replicate'", "'circular'")}
    )

    def make(draft: Draft) -> None:
        x = draft.value(count + 2)
        channels, width = draft.shape(x)[1], draft.rng.randint(1, 8)
        drawn = draft.options(kind, options, 0.5)
        if "groups" in drawn:
            groups = int(_divisor(draft, channels))
            width = channels if draft.rng.random() < 0.4 else groups * draft.rng.randint(1, 3)
            drawn["groups"] = str(groups if draft.rng.random() < 0.6 else channels)
            width = width if width % int(drawn["groups"]) == 0 else int(drawn["groups"])
            if drawn["groups"] == "1":
                drawn.pop("groups")
                draft.used.discard(f"{kind}.groups")
        if "padding_mode" in drawn and drawn.get("padding", "'valid'") == "'valid'":
            drawn["padding"] = "1"
        if "stride" in drawn and drawn.get("padding") == "'same'":
            drawn["padding"] = "1"
        if "output_padding" in drawn:
            drawn["stride"] = "2"
            draft.used.add(f"{kind}.stride")
        given = {"in_channels": str(channels), "out_channels": str(width), "kernel_size": _sizes(count, 3, 1, 2)(draft)}
        draft.used.update(f"{kind}.{argument}" for argument in given)
        made = draft.layer(draft.call(kind, "", given, drawn))
        result = draft.let(f"{made}({x})")
        if draft.rng.random() < 0.06:
            draft.let(f"{made}({draft.like(x) if draft.rng.random() < 0.5 else result})")

    return Recipe(kind, make, tuple(options), 12.0 if name == "Conv2d" else 1.0)


# ---------------------------------------------------------------------------- norms

_STATISTICS: dict[str, Option] = {
    "eps": pick("0.1", "0.01"),
    "momentum": pick("None", "0.3"),
    "affine": pick("False"),
    "track_running_stats": pick("False"),
}
_INSTANCE: dict[str, Option] = {**_STATISTICS, "affine": pick("True"), "track_running_stats": pick("True")}


def _features(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {"num_features": str(shape[1])}


def _groups(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    groups = draft.rng.choice(["1", str(shape[1]), _divisor(draft, shape[1])])
    return {"num_groups": groups, "num_channels": str(shape[1])}


def _normalized(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    last = draft.rng.randint(1, min(3, len(shape) - 1))
    sizes = shape[-last:]
    return {"normalized_shape": str(sizes[0]) if last == 1 and draft.rng.random() < 0.5 else str(tuple(sizes))}


_NORMS = [
    _layer("BatchNorm1d", (2, 3), _features, _STATISTICS),
    _layer("BatchNorm2d", (4,), _features, _STATISTICS, 5.0),
    _layer("SyncBatchNorm", (2, 3, 4), _features, _STATISTICS),
    _layer("InstanceNorm1d", (3,), _features, _INSTANCE),
    _layer("InstanceNorm2d", (4,), _features, _INSTANCE),
    _layer("FrozenBatchNorm2d", (4,), _features, {"eps": pick("0.1")}),
    _layer("GroupNorm", (2, 3, 4), _groups, {"eps": pick("0.1"), "affine": pick("False")}),
    _layer(
        "LayerNorm",
        (2, 3, 4),
        _normalized,
        {"eps": pick("0.1"), "elementwise_affine": pick("False"), "bias": pick("False")},
    ),
    _layer("RMSNorm", (2, 3, 4), _normalized, {"eps": pick("0.1", "0.01"), "elementwise_affine": pick("False")}),
    _layer(
        "LocalResponseNorm",
        (3, 4),
        lambda d, s: {"size": d.rng.choice(["2", "3"])},
        {"alpha": pick("0.1"), "beta": pick("0.5"), "k": pick("2.0")},
    ),
]

# ---------------------------------------------------------------------------- pools, pads, sizes


def _kernel(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {"kernel_size": _sizes(len(shape) - 2, 2, 3)(draft)}


def pool_options(count: int, average: bool) -> dict[str, Option]:
    """What a pool of so many dimensions takes besides its kernel."""
    options: dict[str, Option] = {"stride": _sizes(count, 1, 2), "padding": _sizes(count, 1), "ceil_mode": pick("True")}
    if not average:
        return {**options, "dilation": pick("2")}
    options["count_include_pad"] = pick("False")
    return options | ({"divisor_override": pick("1", "3", "5")} if count == 2 else {})


def _output(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    if len(shape) == 3:
        return {"output_size": draft.rng.choice(["1", "3", "4"])}
    return {"output_size": draft.rng.choice(["1", "3", "(1, 1)", "(2, 3)", "(None, 2)", "(4, None)"])}


def pads(draft: Draft, sides: int, least: int = 0) -> str:
    """So many numbers, or for a layer one."""
    numbers = [draft.rng.choice([0, 1, 2, least]) for _ in range(sides)]
    return f"({', '.join(map(str, numbers))})"


def _pads(least: int = 0) -> Arguments:
    def draw(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
        return {"padding": draft.rng.choice(["1", pads(draft, 4, least)])}

    return draw


def _upsample(draft: Draft) -> None:
    kind, dims = "nn.Upsample", draft.rng.choice([3, 4, 4])
    x = draft.value(dims)
    arguments = resized(draft, kind, len(draft.shape(x)))
    draft.let(f"{draft.layer(draft.call(kind, '', {}, arguments))}({x})")


def resized(draft: Draft, kind: str, dims: int) -> dict[str, str]:
    """Arguments of an interpolation."""
    modes = {3: ["linear"], 4: ["bilinear", "bicubic"]}[dims]
    mode = draft.rng.choice(["nearest", "nearest-exact", *modes, *modes])
    arguments = draft.options(kind, {"mode": pick(f"'{mode}'")}, 0.7)
    if mode in modes and arguments:
        arguments |= draft.options(kind, {"align_corners": pick("True", "False")})
    if draft.rng.random() < 0.5:
        return arguments | draft.options(kind, {"size": _sizes(dims - 2, 5, 7)}, 1.0)
    return arguments | draft.options(kind, {"scale_factor": pick("2", "1.5", "0.7", "2.0")}, 1.0)


def fit_for_shuffle(draft: Draft, x: str, back: bool) -> str:
    """An image of 4 channels, or of even sides, as pixels of a larger one or a smaller one."""
    channels, height, width = draft.shape(x)[1:]
    if back:
        return x if height % 2 == width % 2 == 0 else draft.let(f"{x}[:, :, : {height // 2 * 2}, : {width // 2 * 2}]")
    if max(height, width) > 8:
        x = draft.let(f"{x}[:, :, :8, :8]")
    return x if channels % 4 == 0 else draft.let(f"{draft.layer(f'nn.Conv2d({channels}, 4, 1)')}({x})")


def _shuffle(name: str, argument: str) -> Recipe:
    def make(draft: Draft) -> None:
        x = fit_for_shuffle(draft, draft.value(4), "Un" in name)
        draft.used.add(f"nn.{name}.{argument}")
        draft.let(f"{draft.layer(f'nn.{name}(2)')}({x})")

    return Recipe(f"nn.{name}", make, (argument,), 2.0)


_DROPOUT = {"p": pick("0.2", "0.7"), **_INPLACE}
_POOLS = [
    _layer("MaxPool1d", (3,), _kernel, pool_options(1, False)),
    _layer("MaxPool2d", (4,), _kernel, pool_options(2, False), 4.0),
    _layer("AvgPool1d", (3,), _kernel, pool_options(1, True)),
    _layer("AvgPool2d", (4,), _kernel, pool_options(2, True), 5.0),
    *(_layer(f"Adaptive{kind}Pool{d}d", (d + 2,), _output, {}) for kind in ("Avg", "Max") for d in (1, 2)),
    _layer("ZeroPad2d", (4,), _pads(-1), {}),
    _layer("ReflectionPad2d", (4,), _pads(), {}),
    _layer("ReplicationPad2d", (4,), _pads(), {}),
    _layer("ConstantPad2d", (4,), lambda d, s: {**_pads(-1)(d, s), "value": d.rng.choice(["0.5", "-1.0", "0"])}, {}),
    Recipe("nn.Upsample", _upsample, ("size", "scale_factor", "mode", "align_corners")),
    _shuffle("PixelShuffle", "upscale_factor"),
    _shuffle("PixelUnshuffle", "downscale_factor"),
    _layer("ChannelShuffle", (4,), lambda d, s: {"groups": _divisor(d, s[1])}, {}),
    _layer("Flatten", (3, 4), _none, {"start_dim": pick("2", "-2", "-1"), "end_dim": pick("2", "-2")}, 2.0),
    _layer("Dropout", (2, 3, 4), _none, _DROPOUT),
    _layer("Dropout1d", (3,), _none, _DROPOUT),
    _layer("Dropout2d", (4,), _none, _DROPOUT),
    _layer("AlphaDropout", (2, 3, 4), _none, _DROPOUT),
    _layer("StochasticDepth", (2, 4), lambda d, s: {"p": "0.3", "mode": d.rng.choice(["'row'", "'batch'"])}, {}),
]


def _linear(draft: Draft, shape: tuple[int, ...]) -> Mapping[str, str]:
    return {"in_features": str(shape[-1]), "out_features": str(draft.rng.randint(1, 9))}


def _scatter(draft: Draft) -> None:
    stream = draft.value(4)
    channels = draft.shape(stream)[1]
    kept = draft.rng.randint(1, channels)
    branch = draft.let(f"{draft.layer(f'nn.Conv2d({channels}, {kept}, 1)')}({stream})")
    draft.used.update(("nn.Scatter.channels", "nn.Scatter.kept"))
    draft.let(f"{draft.layer(f'Scatter({channels}, {kept})')}({stream}, {branch})")


LAYERS: list[Recipe] = [
    *(convolution(name) for name in ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d")),
    _layer("Linear", (2, 3, 2, 4), _linear, {"bias": pick("False")}, 3.0),
    *_NORMS,
    *(_layer(name, (2, 3, 4), _none, options, 5.0 if name == "ReLU" else 1.0) for name, options in ACTIVATIONS.items()),
    _layer("PReLU", (2, 3, 4), lambda d, s: {"num_parameters": d.rng.choice(["1", str(s[1])])}, {}),
    _layer("Identity", (2, 3, 4), _none, {}),
    _layer("Softmax", (2, 3, 4), lambda d, s: {"dim": str(d.rng.choice([1, -1, len(s) - 1]))}, {}),
    _layer("LogSoftmax", (2, 3, 4), lambda d, s: {"dim": str(d.rng.choice([1, -1, len(s) - 1]))}, {}),
    _layer("GLU", (2, 3, 4), _none, {"dim": pick("1")}),
    *_POOLS,
    Recipe("nn.Scatter", _scatter, ("channels", "kept")),
]
