"""Writes to memory in a forward: whoever reads it afterwards reads what was written, or the write is refused."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fastprune
from fastprune import FilterPruner, compact
from fastprune.graph import trace


class Written(nn.Module):
    """Two convolutions, and a function of their results."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.left, self.right = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.relu, self.dropout = nn.ReLU(inplace=True), nn.Dropout()
        self.register_buffer("shift", torch.randn(8, 1, 1))
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.function(self, self.first(x), self.second(x))
        return self.left(a), self.right(b)


def statement(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a.add_(b)
    torch.relu_(a)
    functional.leaky_relu_(b, 0.3)
    return a, b


def another_name(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    tap = a
    a += b
    a *= 0.5
    return a, tap


def activation_first(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a + functional.silu(self.relu(a)), functional.relu(b, True) + b


def before_and_after(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    before = a * 2
    a.clamp_(min=0)
    return before, a.sub_(b).neg_() + a


def numbers(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    height = a.shape[2]
    kept = height
    height += 2
    return a * kept, functional.interpolate(b, size=(height, height))


def parts(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    c, d = a.chunk(2, 1)
    c.relu_()
    return torch.cat([c, d], 1), b


def last_view(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    c = a.view(a.shape[0], 8, -1)
    c.relu_()
    return c.view(a.shape[0], 8, 8, 8), b


FOLLOWED = [statement, another_name, activation_first, before_and_after, numbers, parts, last_view]


@pytest.mark.parametrize("function", FOLLOWED, ids=lambda function: function.__name__)
def test_writes_are_followed(function: Callable[..., Tensor], tmp_path: object) -> None:
    model, images = Written(function).double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    pruner = FilterPruner(model, 0.0, every=1000, include=["first", "second"], removable_only=False)
    pruner.set_masks({name: torch.arange(8) % 3 != 0 for name in ("first", "second")})
    before = copy.deepcopy(model.state_dict())
    fastprune.save(model, f"{tmp_path}/network.safetensors", images)
    with torch.no_grad():
        expected = model(images.clone())
        for network in (
            trace(model),
            trace(model, images),
            compact(model, images),
            fastprune.load(f"{tmp_path}/network.safetensors"),
        ):
            for ours, theirs in zip(network(images.clone()), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def part_assigned(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a[:, 0] = b[:, 1]
    return a, b


def data_assigned(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a.data = b
    return a, b


def out_given(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.add(a, b, out=b), b


def part_written(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a[:, :2].relu_()
    return a, b


def seen_by_a_view(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    flat = a.flatten(2)
    self.relu(a)
    return flat.view(-1, 8, 8, 8), b


def maybe_a_view(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    self.relu(c := self.dropout(a))  # in eval mode it is a itself
    return a, c


def buffer_written(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    self.shift.mul_(0.9)
    return a + self.shift, b


def shape_changed(self: Written, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a.transpose_(2, 3)
    return a, b


REFUSED = [
    (part_assigned, r"assigns to a part of a tensor.*test_in_place.py:\d+: a\[:, 0\] = b\[:, 1\]"),
    (data_assigned, "sets the attribute data of a tensor"),
    (out_given, r"add writes to the tensor that out= names.*test_in_place.py"),
    (part_written, "relu_ writes to memory that .* reads afterwards as first"),
    (seen_by_a_view, "relu writes to memory that .* reads afterwards as flatten"),
    (maybe_a_view, "relu writes to memory that .* reads afterwards as first"),
    (buffer_written, "mul_ writes to shift, which belongs to the model"),
    (shape_changed, "transpose_ changes the shape"),
]


@pytest.mark.parametrize(("function", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_writes_that_cannot_be_followed_are_refused(function: Callable[..., Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        trace(Written(function))
