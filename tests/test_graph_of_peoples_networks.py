"""What a forward may do besides calling layers: followed, or refused; and the model is left as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import fastprune
from fastprune import compact
from fastprune.graph import trace

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Two convolutions and a head, with what people keep on modules; `function` is its forward."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head, self.wide = nn.Linear(8, 4), nn.Linear(512, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.cache: Any = None
        self.calls, self.features = 0, []
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def plain(m: Network, x: Tensor) -> Tensor:
    return m.head(m.b(m.a(x)).mean((2, 3)))


def part_called(m: Network, x: Tensor) -> Tensor:
    return m.b(m.part(m.a(x)))


def asks_for_type(m: Network, x: Tensor) -> Tensor:
    if isinstance(x, Tensor) and not isinstance(x, (list, dict)) and not hasattr(x, "tensors"):
        x = (x - 0.5) / 0.25
    return plain(m, x)


def keeps_features(m: Network, x: Tensor) -> Tensor:
    m.features.append(h := m.a(x))
    m.last = h
    if m.cache is None:
        m.cache = h.new_ones(1)
    return m.b(h) * m.cache


def computed_view(m: Network, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.wide(h.view(-1, 8 * h.size(2) * h.size(3)))


def batch_view(m: Network, x: Tensor) -> Tensor:
    h = m.a(x)
    return m.wide(h.view(h.shape[0], -1)) + m.wide(h.reshape(h.size(0), -1))


def for_nothing(m: Network, x: Tensor) -> Tensor:
    m.part(m.a(x))
    return plain(m, x)


def checkpointed(m: Network, x: Tensor) -> Tensor:
    h = checkpoint(m.a, (x * 1).requires_grad_(), use_reentrant=True)
    return m.head(checkpoint(m.b, h, use_reentrant=False).mean((2, 3)))


def doubled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output * 2


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(doubled)
    return module


def patched(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x + 1  # type: ignore[method-assign, assignment]
    return module


class DropPath(nn.Module):
    """Of the name, but not of the kind."""

    drop_prob = 0.1

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


class Renamed(nn.BatchNorm2d):
    """BatchNorm by another name."""


FOLLOWED = {
    "plain": Network(plain),
    "asks for the type": Network(asks_for_type),
    "keeps features": Network(keeps_features),
    "activation checkpointing": Network(checkpointed),
    "a computed view": Network(computed_view),
    "a view of the batch": Network(batch_view),
    "a hook of the model": hooked(Network(plain)),
    "a hook of a layer": Network(part_called, part=hooked(nn.Conv2d(8, 8, 1))),
    "a hook of Identity": Network(part_called, part=hooked(nn.Identity())),
    "another Identity": Network(part_called, part=patched(nn.Identity())),
    "another BatchNorm": Network(part_called, part=patched(Renamed(8))),
    "another DropPath": Network(part_called, part=DropPath()),
    "a branch for nothing": Network(for_nothing, part=nn.BatchNorm2d(8)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name: str) -> None:
    model = FOLLOWED[name].eval()
    model.a.weight.data[:4] = 0
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    traced, small = trace(model, IMAGES), compact(model, IMAGES)
    for path, module in model.named_modules():
        assert vars(module).keys() == attributes[path].keys()
        assert all(vars(module)[own] is value for own, value in attributes[path].items())
    assert model.features == []
    assert all(torch.equal(value, state[own]) for own, value in model.state_dict().items())
    with torch.no_grad():
        expected = model(IMAGES)
        torch.testing.assert_close(traced(IMAGES), expected)
        torch.testing.assert_close(small(IMAGES), expected)
    model.cache, model.features = None, []
    vars(model).pop("last", None)


def counts(m: Network, x: Tensor) -> Tensor:
    m.steps = m.steps + 1
    return plain(m, x)


def counts_calls(m: Network, x: Tensor) -> Tensor:
    m.calls += 1
    return plain(m, x)


def drops_always(m: Network, x: Tensor) -> Tensor:
    return functional.dropout(plain(m, x), 0.5)


def drops_never(m: Network, x: Tensor) -> Tensor:
    return functional.dropout(plain(m, x), 0.5, training=False)


def without_gradients(m: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x)
    return m.b(h)


def in_half(m: Network, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        h = m.a(x)
    return m.b(h.float())


def for_statistics(m: Network, x: Tensor) -> Tensor:
    m.part(h := m.a(x))
    return m.b(h - m.part.running_mean.view(1, -1, 1, 1))


def in_a_list(m: Network, x: Tensor) -> Tensor:
    torch._foreach_mul_([h := m.a(x)], 2.0)
    return m.b(h)


def from_both_ends(m: Network, x: Tensor) -> Tensor:
    parts = m.a(x).chunk(2, 1)
    parts[1].mul_(2)
    return parts[-1]


def of_an_expansion(m: Network, x: Tensor) -> Tensor:
    p, q = m.a(x[:1]).expand(2, -1, -1, -1).chunk(2, 0)
    p.mul_(2)
    return m.b(q)


REFUSED = {
    "a buffer is set": (Network(counts), "its forward sets steps, and the graph would not"),
    "a number is set": (Network(counts_calls), "its forward sets calls, and the graph would not"),
    "always dropped": (Network(drops_always), r"drops in eval mode, .*: give dropout training=self.training"),
    "never dropped": (Network(drops_never), "or not in train mode: give dropout training=self.training"),
    "no gradients": (
        Network(without_gradients),
        r"the forward switches autocast or gradients.*: h = m.a",
    ),
    "autocast": (Network(in_half), "the forward switches autocast or gradients"),
    "statistics alone": (Network(for_statistics, part=nn.BatchNorm2d(8)), "part is called for its statistics alone"),
    "a list is written": (Network(in_a_list), "_foreach_mul_ writes to the tensors of a list"),
    "from both ends": (Network(from_both_ends), "mul_ writes to memory that"),
    "an expansion": (Network(of_an_expansion), "mul_ writes to memory that"),
    "a hook of another kind": (
        Network(part_called, part=hooked(type("DropPath", (nn.Dropout2d,), {"drop_prob": 0.0})(0.0))),
        "part has a forward hook or a forward of its own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    model, message = REFUSED[name]
    before, state = dict(vars(model)), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"(?s){message}"):
        trace(model, IMAGES)
    assert all(vars(model)[own] is value for own, value in before.items())
    assert all(torch.equal(value, state[own]) for own, value in model.state_dict().items())


def test_hooks_of_all_modules_are_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        with pytest.raises(ValueError, match="a forward hook is registered for all modules"):
            trace(Network(plain))
    finally:
        handle.remove()


class Asking(nn.Module):
    """Asks in a way that no proxy can answer."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if torch.is_tensor(x) else x


class AskingOfSizes(nn.Module):
    """The same of a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if isinstance(x.shape[2], int) else x


@pytest.mark.parametrize(
    ("asking", "message"),
    [(Asking, r"the forward asks torch.is_tensor, which torch.fx cannot"), (AskingOfSizes, "for the type of a size")],
)
def test_types_that_no_proxy_can_tell_are_refused(asking: type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(nn.Sequential(asking()))
    assert "isinstance" not in globals()


class Summing(nn.Module):
    """Takes as many inputs as come."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, *images: Tensor) -> Tensor:
        return self.conv(images[0] + images[-1])


def test_as_many_inputs_as_the_example_has() -> None:
    model = Summing()
    torch.testing.assert_close(trace(model, (IMAGES, 2 * IMAGES))(IMAGES, 2 * IMAGES), model(IMAGES, 2 * IMAGES))
    torch.testing.assert_close(trace(model)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("change", [hooked, patched])
def test_layers_that_are_not_what_they_are_called_are_not_saved(change: Any, tmp_path: Any) -> None:
    model = Network(part_called, part=change(nn.Conv2d(8, 8, 1)))
    with pytest.raises(ValueError, match="part has a hook, or a forward of its own, which cannot be saved"):
        fastprune.save(model, tmp_path / "network.safetensors", IMAGES)


def test_cost_leaves_no_tensors_without_values() -> None:
    model = Network(keeps_features)
    fastprune.cost(model, IMAGES)
    assert model.cache is None
    assert model.features == []
    assert not hasattr(model, "last")


def test_frozen_parameters_are_frozen_when_loaded(tmp_path: Any) -> None:
    model = Network(plain)
    model.a.requires_grad_(False)
    fastprune.save(model, tmp_path / "network.safetensors", IMAGES)
    loaded = fastprune.load(tmp_path / "network.safetensors")
    flags = {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}
    assert flags == {"a.weight": False, "a.bias": False} | dict.fromkeys(
        ("b.weight", "b.bias", "head.weight", "head.bias"), True
    )
