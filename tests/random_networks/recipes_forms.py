"""Recipes of ways of writing: what the tracer rewrites, what writes to its input, and what networks are made of."""

from __future__ import annotations

from collections.abc import Callable

from .builder import Draft, Recipe, Unfit
from .program import Input
from .recipes_functions import WRITES

_ACTS = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.SiLU()",
    "nn.Hardswish(inplace=True)",
    "nn.LeakyReLU(0.1)",
    "nn.GELU()",
)


def _conv(draft: Draft, channels: int, width: int) -> str:
    size = draft.rng.choice(["1", "3", "3, padding=1", "3, padding=1, bias=False"])
    return f"nn.Conv2d({channels}, {width}, {size})"


def _applied(dims: tuple[int, ...], *calls: str) -> Callable[[Draft], None]:
    """A module, made with the number of channels ``{c}`` and others."""

    def make(draft: Draft) -> None:
        x = draft.value(*dims)
        act = draft.rng.choice(_ACTS)
        call = draft.rng.choice(calls).format(
            c=draft.shape(x)[1], last=draft.shape(x)[-1], w=draft.rng.randint(2, 6), act=act
        )
        draft.let(f"{draft.layer(call)}({x})")

    return make


def _lines(dims: tuple[int, ...], *texts: str) -> Callable[[Draft], None]:
    """Lines in which ``{x}`` is a tensor, ``{y}`` another of its shape, ``{c}`` the number of channels.

    Each that begins with ``=`` makes a tensor, which later lines call ``{a}``, ``{b}``; others are statements.
    """

    def make(draft: Draft) -> None:
        lines = draft.rng.choice(texts).split("\n")
        x = draft.value(*dims)
        shape = draft.shape(x)
        known = {"x": x, "c": shape[1], "last": shape[-1], "half": max(shape[1] // 2, 1)}
        if "{y}" in "".join(lines):
            known["y"] = draft.like(x)
        if "{buffer}" in "".join(lines):
            known["buffer"] = draft.tensor((1, shape[1], *[1] * (len(shape) - 2)), "buffer")
        if "{parameter}" in "".join(lines):
            known["parameter"] = draft.tensor((shape[1], *[1] * (len(shape) - 2)), "parameter")
        for name, line in zip("abcdefg", lines):
            if line.startswith("="):
                known[name + "_"] = draft.let(line[1:].strip().format(**known))
            else:
                draft.write(line.format(**known), x)

    return make


def _conv_norm_act(draft: Draft) -> None:
    """The three that most networks are made of, in one Sequential or apart."""
    x = draft.value(4)
    channels, width = draft.shape(x)[1], draft.rng.randint(3, 8)
    eps = draft.rng.choice(["", "", ", eps=0.05"])
    calls = [_conv(draft, channels, width), f"nn.BatchNorm2d({width}{eps})", draft.rng.choice(_ACTS)]
    if draft.rng.random() < 0.5:
        draft.let(f"{draft.layer(f'nn.Sequential({chr(44).join(calls)})')}({x})")
        return
    for call in calls:
        x = draft.let(f"{draft.layer(call)}({x})")


def _separable(draft: Draft) -> None:
    """Depthwise between pointwise."""
    x = draft.value(4)
    channels, width = draft.shape(x)[1], draft.rng.randint(2, 8)
    calls = [f"nn.Conv2d({channels}, {width}, 1)", f"nn.BatchNorm2d({width})", draft.rng.choice(_ACTS)]
    padding = draft.rng.choice(["padding=1, ", "", "padding=1, bias=False, ", "padding=1, padding_mode='circular', "])
    calls += [f"nn.Conv2d({width}, {width}, 3, {padding}groups={width})", f"nn.Conv2d({width}, {channels}, 1)"]
    y = draft.let(f"{draft.layer('nn.Sequential(' + ', '.join(calls) + ')')}({x})")
    if draft.shape(y) == draft.shape(x) and draft.rng.random() < 0.7:
        draft.let(f"{x} + {y}")


def _lifted_linear(draft: Draft) -> None:
    x = draft.value(2, 3)
    made = draft.layer(f"nn.Linear({draft.shape(x)[-1]}, {draft.rng.randint(1, 8)})")
    draft.let(f"functional.linear({x}, {made}.weight, {made}.bias)")


def _lifted_norm(draft: Draft) -> None:
    x = draft.value(2, 3)
    made = draft.layer(f"nn.LayerNorm({draft.shape(x)[-1]}, eps={draft.rng.choice(['1e-5', '0.1'])})")
    draft.let(f"functional.layer_norm({x}, {made}.normalized_shape, {made}.weight, {made}.bias, {made}.eps)")


def _dropout(draft: Draft) -> None:
    """Functions of dropout whose modules are known."""
    dims, name = draft.rng.choice(
        [((2, 3, 4), "dropout"), ((3,), "dropout1d"), ((4,), "dropout2d"), ((2, 3, 4), "alpha_dropout")]
    )
    x = draft.value(*dims)
    inplace = ", inplace=True" if draft.rng.random() < 0.3 else ""
    draft.let(f"functional.{name}({x}, 0.3, self.training{inplace})")


def _input(draft: Draft, shape: tuple[int, ...] | None, default: str) -> str:
    name = f"x{next(draft.numbers)}"
    draft.inputs.append(Input(name, shape, default))
    draft._set_inputs()
    draft._replay()
    return name


def _second_input(draft: Draft) -> None:
    """Of the first one's shape, that has to be given."""
    if len(draft.inputs) > 1 or draft.steps:
        raise Unfit("only at the beginning")
    y = _input(draft, draft.inputs[0].shape, "")
    draft.let(f"{_conv_of(draft, 'x')} {draft.rng.choice('+*')} {_conv_of(draft, y)}")


def _conv_of(draft: Draft, x: str) -> str:
    made = draft.layer(f"nn.Conv2d({draft.inputs[0].shape[1]}, 5, 3, padding=1)")  # type: ignore[index]
    return draft.let(f"{made}({x})")


def _optional_input(draft: Draft) -> None:
    """One with a default, given or not."""
    if len(draft.inputs) > 1 or draft.steps:
        raise Unfit("only at the beginning")
    y = _input(draft, draft.inputs[0].shape if draft.rng.random() < 0.6 else None, "None")
    h = _conv_of(draft, "x")
    branch = draft.layer(f"nn.Conv2d({draft.inputs[0].shape[1]}, 5, 1)")  # type: ignore[index]
    draft.let(f"{h} if {y} is None else {h} + {branch}({y})")


def _number_input(draft: Draft) -> None:
    if len(draft.inputs) > 1 or draft.steps:
        raise Unfit("only at the beginning")
    scale = _input(draft, None, "2.0")
    draft.let(f"{_conv_of(draft, 'x')} * {scale}")


def _tied(draft: Draft) -> None:
    """Two layers with one weight."""
    x = draft.value(4)
    channels = draft.shape(x)[1]
    first = draft.layer(f"nn.Conv2d({channels}, {channels}, 1)")
    draft.let(f"{first}({draft.let(f'{first}({x})')})")


def _unused(draft: Draft) -> None:
    """A layer that is not called, and a line that nobody reads."""
    x = draft.value(4)
    draft.layer(f"nn.Conv2d({draft.shape(x)[1]}, 3, 1)")
    draft.do(f"n{next(draft.numbers)} = {x}.mean()")
    draft.let(f"{x} * 0.5")


def _part_of_view(draft: Draft) -> None:
    x = draft.value(4)
    half = max(draft.shape(x)[1] // 2, 1)
    forms = [
        f"{x}[:, :{half}].mul_(0.5)",
        f"{x}.flatten(1).relu_()",
        f"{x}.view({x}.size(0), -1).add_(1)",
        f"torch.relu_({x}[:, :, 1:])",
        f"{x}.transpose(2, 3).clamp_(0, 1)",
    ]
    draft.write(draft.rng.choice(forms), x)


def _assigned(draft: Draft) -> None:
    x = draft.value(4)
    draft.write(draft.rng.choice([f"{x}[:, 0] = 0", f"{x}[:, :, 0] = 1.5", f"{x}[:, :1] *= 2"]), x)


def _out(draft: Draft) -> None:
    x = draft.value(4)
    draft.write(f"torch.add({x}, {draft.like(x)}, out={x})", x)


def _result_of_write(draft: Draft) -> None:
    """What an in-place form returns and the tensor itself, both read."""
    x = draft.value()
    form = draft.rng.choice(
        [
            "{x}.relu_()",
            "{x}.mul_(0.5)",
            "functional.relu({x}, inplace=True)",
            "functional.leaky_relu({x}, 0.2, True)",
            "{x}.clamp_(min=0)",
        ]
    )
    y = draft.let(form.format(x=x))
    draft.let(f"{x} + {y}")


def _input_written(draft: Draft) -> None:
    draft.write("x.mul_(0.5)" if draft.rng.random() < 0.5 else "x.relu_()", "x")


def _tokens(draft: Draft) -> None:
    """There and back, with something in between."""
    x = draft.value(4)
    channels, height, width = draft.shape(x)[1:]
    y = draft.let(f"{x}.flatten(2).transpose(1, 2)")
    y = draft.let(f"{y} + {draft.layer(f'Attention({channels})')}({draft.layer(f'nn.LayerNorm({channels})')}({y}))")
    y = draft.let(
        f"{y} + {draft.layer(f'nn.Sequential(nn.Linear({channels}, 6), nn.GELU(), nn.Linear(6, {channels}))')}({y})"
    )
    draft.let(f"{y}.transpose(1, 2).reshape({x}.size(0), {channels}, {height}, {width})")


def _shuffle(draft: Draft) -> None:
    x = draft.value(4)
    channels = draft.shape(x)[1]
    if channels % 2:
        raise Unfit("an odd number of channels")
    y = draft.let(f"{x}.view({x}.size(0), 2, {channels // 2}, {x}.size(2), {x}.size(3))")
    draft.let(f"{y}.transpose(1, 2).contiguous().view({x}.size(0), -1, {x}.size(2), {x}.size(3))")


def _dense(draft: Draft) -> None:
    """A layer of DenseNet: norm, activation, convolution, and all of it beside the input."""
    x = draft.value(4)
    channels = draft.shape(x)[1]
    y = draft.let(f"{draft.layer(f'nn.BatchNorm2d({channels})')}({x})")
    y = draft.let(f"functional.relu({y}, inplace=True)")
    y = draft.let(f"{draft.layer(f'nn.Conv2d({channels}, 3, 3, padding=1)')}({y})")
    draft.let(f"torch.cat({draft.rng.choice(['[{x}, {y}]', '[{y}, {x}]', '({x}, {y})']).format(x=x, y=y)}, 1)")


def _preactivation(draft: Draft) -> None:
    """A residual block that begins with an activation in place."""
    x = draft.value(4)
    channels = draft.shape(x)[1]
    act = draft.layer("nn.ReLU(inplace=True)")
    y = draft.let(f"{act}({x})")
    y = draft.let(f"{draft.layer(f'nn.Conv2d({channels}, 5, 3, padding=1)')}({y})")
    y = draft.let(f"{draft.layer(f'nn.Conv2d(5, {channels}, 1)')}({act}({y}))")
    draft.let(f"{y} + {x}") if draft.rng.random() < 0.5 else draft.write(f"{x} += {y}", x)


def _alias(draft: Draft) -> None:
    x = draft.value(4)
    tap = draft.let(x)
    draft.write(f"{x} += {draft.like(x)}", x)
    width = draft.rng.randint(1, 4)
    draft.let(f"{draft.layer(f'nn.Conv2d({draft.shape(x)[1]}, {width}, 1)')}({tap})")


def _spread(draft: Draft) -> None:
    """Constants of very different sizes, the least of which float32 does not know well, read by a padded layer."""
    width = draft.rng.randint(4, 8)
    x = draft.value(4)
    x = draft.let(f"{draft.layer(f'nn.Conv2d({draft.shape(x)[1]}, {width}, 1)')}({x})")
    y = draft.let(f"functional.gelu({draft.let(f'{x} * 6 - 4')})")
    draft.let(f"{draft.layer(f'nn.Conv2d({width}, 3, 3, padding=1)')}({y})")


def _head(draft: Draft) -> None:
    x = draft.value(4)
    pools = {"functional.adaptive_avg_pool2d({x}, (1, 1))": 1, "{x}.mean((2, 3), keepdim=True)": 1}
    pools |= {"functional.adaptive_max_pool2d({x}, 2)": 4, "functional.adaptive_avg_pool2d({x}, (1, 3))": 3}
    pool, size = draft.rng.choice(list(pools.items()))
    features = draft.shape(x)[1] * size
    x = draft.let(pool.format(x=x))
    flat = ["torch.flatten({x}, 1)", "{x}.view({x}.size(0), -1)", "{x}.flatten(1)"]
    x = draft.let(draft.rng.choice([*flat, "{x}.squeeze(-1).squeeze(-1)"] if size == 1 else flat).format(x=x))
    x = draft.let(f"{draft.layer(f'nn.Linear({features}, 6)')}({x})")
    draft.let(f"functional.relu({x})")


FORMS: list[Recipe] = [
    Recipe("form.conv_norm_act", _conv_norm_act, weight=12.0),
    Recipe("form.separable", _separable, weight=2.0),
    Recipe("form.block", _applied((4,), "Block({c}, {w}, {act})"), weight=2.0, refusable=()),
    Recipe(
        "form.squeeze_excitation",
        _applied((4,), "SqueezeExcitation({c}, {w}, nn.Sigmoid())", "SqueezeExcitation({c}, {w}, nn.Hardsigmoid())"),
        weight=2.0,
    ),
    Recipe("form.drop_path", _applied((2, 3, 4), "DropPath(0.2)", "DropPath(0.0)")),
    Recipe(
        "form.batch_norm_act",
        _applied(
            (4,),
            "BatchNormAct2d({c}, {act})",
            "BatchNormAct2d({c}, nn.Identity(), nn.Dropout(0.1))",
            "BatchNormAct2d({c}, {act}, eps=0.1)",
        ),
    ),
    Recipe(
        "form.renamed_batch_norm", _applied((4,), "RenamedBatchNorm2d({c})", "RenamedBatchNorm2d({c}, affine=False)")
    ),
    Recipe("form.layer_norm_2d", _applied((4,), "LayerNorm2d({c})")),
    Recipe("form.attention", _applied((3,), "Attention({last})")),
    Recipe("form.tokens", _tokens),
    Recipe("form.lifted_linear", _lifted_linear),
    Recipe("form.lifted_layer_norm", _lifted_norm),
    Recipe("form.dropout", _dropout),
    Recipe("form.assert", _lines((4,), "torch._assert({x}.shape[1] == {c}, 'channels')\n= {x} * 0.5")),
    Recipe(
        "form.buffer",
        _lines((4, 3), "= ({x} - {buffer}) / {parameter}", "= {x} * {parameter} + {buffer}", "= {buffer} - {x}"),
    ),
    Recipe(
        "form.constant",
        _lines(
            (4,),
            "= {x} + torch.linspace(-1, 1, {c}).view(1, {c}, 1, 1)",
            "= {x} * torch.full((1,), 0.5)",
            "= {x} - torch.arange({last}) / {last}",
            "= {x} + torch.ones({c}, 1, 1)",
            "= torch.tensor(0.75) * {x}",
        ),
    ),
    Recipe("form.second_input", _second_input),
    Recipe("form.optional_input", _optional_input),
    Recipe("form.number_input", _number_input),
    Recipe("form.twice", _tied, weight=2.0),
    Recipe("form.unused", _unused, refusable=("nobody reads the result of",)),
    Recipe("form.part_of_view", _part_of_view, refusable=WRITES),
    Recipe("form.assigned", _assigned, refusable=("assigns to a part of a tensor", *WRITES)),
    Recipe("form.out", _out, refusable=("out=", *WRITES)),
    Recipe("form.result_of_write", _result_of_write, refusable=WRITES),
    Recipe("form.input_written", _input_written, refusable=WRITES),
    Recipe("form.shuffle", _shuffle),
    Recipe("form.dense", _dense, weight=2.0),
    Recipe("form.preactivation", _preactivation, weight=2.0, refusable=WRITES),
    Recipe("form.alias", _alias, refusable=WRITES),
    Recipe("form.spread", _spread),
    Recipe("form.head", _head, weight=2.0),
    Recipe(
        "form.average_pool_one",
        _lines(
            (4,),
            "= functional.avg_pool2d({x}, {x}.shape[2:])",
            "= functional.avg_pool2d({x}, {x}.size()[2:])",
            "= functional.interpolate({x}, size={x}.shape[-2:])",
        ),
    ),
]
