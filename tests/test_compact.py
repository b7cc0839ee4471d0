"""The small network computes what the masked one does, whatever the architecture; and what is left of it."""

import copy
import io
import pickle
import warnings

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fastprune import FilterPruner, WeightPruner, compact, models
from fastprune.compact import CompactModel, carry_optimizer
from fastprune.optim import PrunedSGD
from fastprune.scatter import Scatter

SLOW = {"vgg16_bn", "densenet121", "timm:darknet53", "resnet50", "efficientnet_b0", "mobilenet_v3_large"}
TORCHVISION = (
    *("resnet18", "resnet50", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "densenet121"),
    *("efficientnet_b0", "convnext_tiny", "regnet_y_400mf", "regnet_x_400mf"),
)
TIMM = ("resnet18d", "ghostnet_100", "efficientnet_lite0", "darknet53", "dla34", "repvgg_a0", "convnext_atto")
NAMES = ["resnet20", "resnet56", *TORCHVISION, *(f"timm:{name}" for name in TIMM)]
# Whose convolutions stay as large as they are, and why; see the reports.
PINNED = {"convnext_tiny"}


@torch.no_grad()
def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In eval mode, with statistics, factors and biases that are not what they begin as."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and tensor.squeeze().dim() <= 1 and tensor.numel() > 0:
                low = -0.3 if name in ("bias", "running_mean") else 0.5
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (0.6 if low < 0 else 1) + low)
    return model.eval()


def pruned(model: nn.Module, rate: float, seed: int = 0) -> FilterPruner:
    """A pruner with random masks; now and then a layer loses all of its filters."""
    pruner, generator = FilterPruner(model, 0.5, feedback="none"), torch.Generator().manual_seed(seed)
    pruner.set_masks({name: torch.rand(len(m), generator=generator) > rate for name, m in pruner.masks().items()})
    return pruner


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name.startswith("timm:"):
        return timm.create_model(name.removeprefix("timm:"), num_classes=10)
    return (
        models.create(name) if name in ("resnet20", "resnet56") else torchvision.models.get_model(name, num_classes=10)
    )


def difference(first: nn.Module, second: nn.Module, *shape: int, dtype: torch.dtype = torch.float64) -> float:
    images = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = first(images)
        return float((second(images) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        pytest.param(name, rate, marks=pytest.mark.slow if name in SLOW or rate == 0.3 else ())
        for name in NAMES
        for rate in (0.3, 0.6)
    ],
)
def test_computes_the_same(name: str, rate: float) -> None:
    model = randomised(create(name)).double()
    pruned(model, rate)
    small = compact(model, torch.zeros(1, 3, 64, 64, dtype=torch.float64))
    assert difference(model, small, 2, 3, 64, 64) < 1e-10
    before, after = small.report.parameters
    assert (after == before) if name in PINNED else (after < before)
    assert difference(model.float(), small.float(), 2, 3, 64, 64, dtype=torch.float32) < 1e-5


def test_other_sizes_of_batches_and_images() -> None:
    model = randomised(create("resnet20")).double()
    pruned(model, 0.6)
    small = compact(model, torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    for shape in ((1, 3, 32, 32), (5, 3, 47, 33), (2, 3, 9, 8)):
        assert difference(model, small, *shape) < 1e-10


class Everything(nn.Module):
    """What channels meet: padding of several kinds, a stream, a product, halves side by side, and features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.SiLU())
        self.branch = nn.Sequential(
            nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 6, 3, padding="same")
        )
        self.depthwise = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6), nn.Hardswish())
        self.squeeze, self.excite = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.left, self.right = nn.Conv2d(6, 4, 3, stride=2), nn.Conv2d(6, 3, 3, stride=2)
        self.norm, self.mixed = nn.BatchNorm2d(7), nn.Conv2d(7, 4, 3, padding=1, padding_mode="reflect")
        self.pool = nn.AvgPool2d(3, 2, padding=1)
        self.features, self.fc = nn.Linear(4 * 2 * 2, 9), nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branch(x)
        x = self.depthwise(x)
        x = x * torch.sigmoid(self.excite(functional.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.norm(torch.cat([self.left(x), functional.relu(self.right(x))], 1))
        x = self.pool(functional.leaky_relu(self.mixed(x), 0.2))
        return self.fc(functional.relu(self.features(x.view(x.size(0), -1))))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from([0.2, 0.5, 0.9]))
def test_whatever_channels_meet(seed: int, rate: float) -> None:
    torch.manual_seed(seed)
    model = randomised(Everything(), seed).double()
    pruned(model, rate, seed)
    masks = {"features": torch.rand(9) > rate}
    small = compact(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64), masks=masks)
    with torch.no_grad():
        model.features.weight[~masks["features"]] = 0
    assert difference(model, small, 3, 3, 8, 8) < 1e-10


def layered(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return randomised(nn.Sequential(*layers)).double()  # type: ignore[return-value]


def with_masks(model: nn.Sequential, **masks: list[int]) -> nn.Sequential:
    pruner = FilterPruner(model, 0.0, every=10**6, removable_only=False)
    pruner.set_masks({name.strip("_"): torch.tensor(mask).bool() for name, mask in masks.items()})
    return model


def test_without_padding_constants_go_into_biases() -> None:
    model = layered(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, bias=False))
    small = compact(with_masks(model, _0=[1, 0, 0, 1]), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert small.get_submodule("0").weight.shape == (2, 3, 3, 3)
    assert small.get_submodule("2").weight.shape == (2, 2, 3, 3)
    assert small.get_submodule("2").bias is not None
    assert difference(model, small, 2, 3, 8, 8) < 1e-12


def test_with_padding_one_constant_channel_carries_the_others() -> None:
    model = layered(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 3, padding=1))
    small = compact(with_masks(model, _0=[1, 0, 0, 1, 0, 0]), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert small.get_submodule("0").weight.shape[0] == 3
    assert small.report.layers[0].why == "1: carries constants to 2"
    assert difference(model, small, 2, 3, 8, 8) < 1e-12


def test_a_stream_keeps_what_any_branch_writes() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = (
                nn.Conv2d(3, 4, 1, bias=False),
                nn.Conv2d(3, 4, 1, bias=False),
                nn.Conv2d(4, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) + self.b(x))

    model = randomised(Residual()).double()
    FilterPruner(model, 0.0, every=10**6).set_masks(
        {"a": torch.tensor([1, 0, 0, 0]).bool(), "b": torch.tensor([1, 1, 0, 0]).bool()}
    )
    small = compact(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    assert small.get_submodule("a").weight.shape[0] == small.get_submodule("b").weight.shape[0] == 2
    assert small.report.layers[0].why == "1: not constant for head"
    assert difference(model, small, 2, 3, 4, 4) < 1e-12


def test_round_to_and_the_last_channel() -> None:
    model = layered(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1))
    with_masks(model, _0=[1] * 5 + [0] * 11, _2=[0] * 6)
    images = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    assert [layer.kept for layer in compact(model, images).report.layers] == [1, 1, 2]  # the first feeds nothing
    small = compact(model, images, round_to=8)
    assert [layer.kept for layer in small.report.layers] == [8, 6, 2]
    assert small.report.layers[0].why == "3: round_to"
    assert difference(model, small, 2, 3, 4, 4) < 1e-12
    with pytest.raises(ValueError, match="round_to must be an integer of at least 1, got 0"):
        compact(model, images, round_to=0)


def test_what_is_read_whole_stays_and_the_report_says_so() -> None:
    model = layered(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1))
    small = compact(with_masks(model, _0=[1, 0, 1, 1]), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert [layer.kept for layer in small.report.layers] == [4, 2]
    assert [layer.why for layer in small.report.layers] == ["1: read whole by 1", ""]
    assert difference(model, small, 2, 3, 8, 8) < 1e-12
    text = str(small.report)
    assert "read whole by 1" in text
    assert f"parameters: {sum(p.numel() for p in model.parameters()):,} ->" in text


@pytest.mark.parametrize("padding", [0, 1])
def test_groups_stay_alike_and_empty_ones_go(padding: int) -> None:
    model = layered(
        *(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=padding, groups=4, bias=False)),
        *(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)),
    )
    nn.init.ones_(model[0].bias)  # constants that are not 0
    with_masks(model, _0=[0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0], _2=[1, 1, 0, 1, 1, 0, 0, 0])
    small = compact(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    middle = small.get_submodule("2")
    # With padding one input more carries the constants of the others.
    assert (middle.groups, tuple(middle.weight.shape)) == (3, (6, 2 + padding, 3, 3))
    assert any("groups of 2 are alike" in layer.why for layer in small.report.layers)
    assert difference(model, small, 2, 3, 8, 8) < 1e-12


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_momentum_stays_with_its_weight(groups: int) -> None:
    model = layered(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=groups, bias=False))
    with_masks(model, _0=[0, 1, 1, 1, 1, 0, 1, 1], _2=[1, 0, 1, 1, 1, 1, 1, 0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for layer in (model[0], model[2]):
        optimizer.state[layer.weight]["momentum_buffer"] = (layer.weight * layer.mask.view(-1, 1, 1, 1)).detach()
    small = compact(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    carried = carry_optimizer(optimizer, model, small)
    assert small.get_submodule("2").weight.shape[1] < 8 / groups or groups == 4
    for parameter in small.parameters():
        torch.testing.assert_close(carried.state[parameter]["momentum_buffer"], parameter.detach())


class Streams(nn.Module):
    """Two residual blocks."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first, self.second = (
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)) for _ in range(2)
        )
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = functional.relu(x + self.first(x))
        return self.head(functional.relu(self.second(x) + x))


def streams(first: Tensor, second: Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = randomised(Streams()).double()
    pruner = FilterPruner(model, 0.0, every=10**6, feedback="none")
    pruner.set_masks({"first.0": first, "second.0": second})
    return model


def test_a_branch_that_writes_few_channels_is_scattered_into_its_stream() -> None:
    """Wherever the stream's other channels stay, whichever operand of the sum the branch is."""
    first, second = torch.arange(64) % 4 == 1, torch.arange(64) % 2 == 0
    model = streams(first, second)
    example = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    small = compact(model, example)
    assert [layer.kept for layer in small.report.layers] == [64, 16, 32, 2]
    assert [layer.inputs for layer in small.report.layers] == [(3, 3), (64, 64), (64, 64), (64, 64)]
    assert difference(model, small, 2, 3, 8, 8) < 1e-12
    scatter = small.get_submodule("scatter_0")
    assert (scatter.channels, scatter.kept) == (64, 16)
    torch.testing.assert_close(scatter.index, first.nonzero().flatten())
    rounded = compact(model, example, round_to=24)
    assert [layer.kept for layer in rounded.report.layers] == [64, 24, 48, 2]
    assert difference(model, rounded, 2, 3, 8, 8) < 1e-12


def test_a_branch_of_which_almost_everything_stays_is_written_whole() -> None:
    """To leave one channel out does not pay."""
    mask = torch.arange(64) > 0
    small = compact(streams(mask, mask), torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert [layer.kept for layer in small.report.layers] == [64, 64, 64, 2]


def test_a_constant_branch_goes_with_everything_that_only_it_reads() -> None:
    model = streams(torch.zeros(64).bool(), torch.ones(64).bool())
    small = compact(model, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    assert [(layer.name, layer.kept) for layer in small.report.layers][1] == ("first.0", 0)
    assert not any(name.startswith("first") for name, _ in small.named_modules())
    assert difference(model, small, 2, 3, 8, 8) < 1e-12
    network = models.create("resnet20").double()
    pruner = FilterPruner(randomised(network), 0.0, every=10**6)
    pruner.set_masks({"layer2.1.conv2": torch.zeros(32).bool()})
    shallow = compact(network, torch.zeros(1, 3, 32, 32, dtype=torch.float64))
    assert "layer2.1.conv1" not in dict(shallow.named_modules())
    assert difference(network, shallow, 2, 3, 32, 32) < 1e-10


@pytest.mark.parametrize("constant", ["whole", "pooled"])
def test_what_is_added_to_every_place_is_no_branch(constant: str) -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.whole, self.pooled, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.whole(x) + self.pooled(x.mean((2, 3), keepdim=True)))

    torch.manual_seed(0)
    model = randomised(Broadcast()).double()
    FilterPruner(model, 0.0, every=10**6).set_masks({constant: torch.zeros(8).bool()})
    small = compact(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert difference(model, small, 2, 3, 8, 8) < 1e-12


def test_what_is_scattered_trains_on() -> None:
    """The gradients of what is left are those of the masked network."""
    model = streams(torch.arange(64) % 4 == 1, torch.arange(64) % 2 == 0)
    small = compact(model, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for network in (model, small):
        network(images).square().sum().backward()
    rows = small.origins["first.0.weight"][0]
    torch.testing.assert_close(small.get_submodule("first.0").weight.grad, model.first[0].weight.grad[rows])
    torch.testing.assert_close(small.get_submodule("stem").weight.grad, model.stem.weight.grad)


def test_single_weights_remove_the_filters_they_leave_empty() -> None:
    model = layered(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    pruner = WeightPruner(model, 0.0, every=10**6)
    mask = torch.ones(4, 3, 1, 1, dtype=torch.bool)
    mask[1], mask[2, 0] = False, False
    pruner.set_masks({"0": mask})
    small = compact(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    assert small.get_submodule("0").weight.shape[0] == 3
    assert difference(model, small, 2, 3, 4, 4) < 1e-12


def test_the_model_is_not_changed_and_the_small_one_is_ordinary() -> None:
    model = randomised(create("resnet20")).to(memory_format=torch.channels_last)
    pruner = pruned(model, 0.6)
    before = copy.deepcopy(model.state_dict())
    model.train()
    small = compact(model, torch.zeros(1, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert small.training
    made = [module for module in list(small.modules())[1:] if not isinstance(module, Scatter)]
    assert all(type(module).__module__.startswith("torch.nn") for module in made)
    weight = small.get_submodule("layer1.0.conv1").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert weight.requires_grad
    known = {name for name in before if not name.endswith("mask")} | {f"{name}.bias" for name in pruner.layers}
    assert {name for name in small.state_dict() if not name.startswith("scatter_")} <= known
    assert difference(model.eval(), copy.deepcopy(small).eval(), 2, 3, 32, 32, dtype=torch.float32) < 1e-5


def test_masks_of_other_models() -> None:
    with pytest.raises(ValueError, match="masks: nowhere is no layer of this model"):
        compact(layered(nn.Conv2d(3, 2, 1)).float(), torch.zeros(1, 3, 4, 4), masks={"nowhere": torch.ones(2).bool()})


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "pruned": lambda params: PrunedSGD(params, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_with_the_optimizer(kind: str) -> None:
    """Where pruned channels are 0 throughout, a step of the small network is the masked one's."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
        *(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3)),
    ).double()
    FilterPruner(model, 0.0, every=10**6, feedback="none").set_masks(
        {"0": torch.tensor([1, 0, 1, 1, 0, 1, 1, 0]).bool(), "3": torch.tensor([0, 1, 1, 1, 0, 1]).bool()}
    )
    model.eval()
    optimizer = OPTIMIZERS[kind](model.parameters())

    def step(network: nn.Module, with_: torch.optim.Optimizer, seed: int) -> None:
        images = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        with_.zero_grad()
        network(images).square().mean().backward()
        with_.step()

    for seed in range(3):
        step(model, optimizer, seed)
    small = compact(model, torch.zeros(1, 3, 4, 4, dtype=torch.float64))
    carried = carry_optimizer(optimizer, model, small)
    assert type(carried) is type(optimizer)
    assert carried.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(small, carried, seed)
    assert difference(model, small, 2, 3, 4, 4) < 1e-10
    kept = model[3].weight[model[3].mask][:, model[0].mask]
    torch.testing.assert_close(small.get_submodule("3").weight, kept)


def test_optimizers_of_other_models() -> None:
    model = layered(nn.Conv2d(3, 2, 1)).float()
    small = compact(model, torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match="the optimizer has a parameter that the model does not have"):
        carry_optimizer(torch.optim.SGD(layered(nn.Conv2d(3, 2, 1)).parameters()), model, small)


def test_a_batchnorm_takes_the_constants_over_where_a_bias_would_be_of_no_use() -> None:
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, bias=False), nn.BatchNorm2d(2)]
    model = with_masks(layered(*layers), _0=[1, 0, 0, 1])
    small = compact(model, torch.zeros(1, 3, 8, 8, dtype=torch.float64))
    assert small.get_submodule("2").bias is None
    assert not torch.equal(small.get_submodule("3").running_mean, model[3].running_mean)
    assert difference(model, small, 2, 3, 8, 8) < 1e-12


def test_the_approximate_mode_is_exact_but_near_the_border() -> None:
    def conv(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    model = with_masks(layered(*conv(3, 6), *conv(6, 4)), _0=[1, 0, 0, 1, 0, 0])
    nn.init.ones_(model[1].bias)
    example = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    assert [layer.kept for layer in compact(model, example).report.layers] == [3, 4]
    small = compact(model, example, exact=False)
    assert [layer.kept for layer in small.report.layers] == [2, 4]
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(x)[..., 1:-1, 1:-1], model(x)[..., 1:-1, 1:-1])
        assert not torch.allclose(small(x), model(x))


def test_statistics_are_taken_anew_for_the_approximate_mode() -> None:
    model = layered(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1), nn.BatchNorm2d(2))
    with_masks(model, _0=[1, 0, 0, 1])
    example = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    batches = [torch.randn(4, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    small = compact(model, example, exact=False, recalibrate=batches)
    assert not small.training
    with torch.no_grad():
        inner = small.get_submodule("0")(torch.cat(batches))
    torch.testing.assert_close(small.get_submodule("1").running_mean, inner.mean((0, 2, 3)))
    with pytest.raises(ValueError, match="it is for exact=False"):
        compact(model, example, recalibrate=batches)


# ------------------------------------------------------------------------------------- what people's networks do


def small_and_masked(model: nn.Module, *inputs: Tensor, **options: object) -> float:
    """The largest difference from a masked model, as a share of its largest output."""
    small = compact(model, inputs, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        expected = model(*inputs)
        return float((small(*inputs) - expected).abs().max() / expected.abs().max())


IMAGES = torch.randn(2, 3, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "between",
    [
        nn.AvgPool2d(2, divisor_override=1),
        nn.AvgPool2d((2, 3), divisor_override=5),
        nn.AvgPool2d(3, 2, padding=1, divisor_override=4),
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, padding=1, count_include_pad=False),
        nn.MaxPool2d(3, 2, padding=1, dilation=2),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.LeakyReLU(0.7),
        nn.CELU(0.3),
        nn.Hardtanh(0.1, 0.2),
        nn.Softplus(2.0, 0.5),
        nn.BatchNorm2d(6, eps=0.5, affine=False),
        nn.SyncBatchNorm(6),
        nn.InstanceNorm2d(6, affine=True),
        nn.GroupNorm(2, 6),
        nn.PReLU(6),
        nn.ConvTranspose2d(6, 6, 3, groups=2),
        torchvision.ops.FrozenBatchNorm2d(6, eps=0.1),
    ],
    ids=str,
)
def test_what_stands_between_convolutions(between: nn.Module) -> None:
    model = layered(nn.Conv2d(3, 6, 3, padding=1), between, nn.Conv2d(6, 4, 3, padding=1))
    assert small_and_masked(with_masks(model, _0=[1, 0, 1, 0, 0, 1]), IMAGES) < 1e-12


@pytest.mark.parametrize(
    "norm",
    [nn.SyncBatchNorm(6), torchvision.ops.FrozenBatchNorm2d(6), type("Renamed", (nn.BatchNorm2d,), {})(6)],
    ids=str,
)
def test_every_batchnorm_gets_smaller(norm: nn.Module) -> None:
    model = with_masks(layered(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 4, 3)), _0=[1, 0, 1, 0, 0, 1])
    assert [row.inputs for row in compact(model, IMAGES).report.layers] == [(3, 3), (6, 3)]
    assert small_and_masked(model, IMAGES) < 1e-12


class Tokens(nn.Module):
    """A linear layer on tokens, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.tokens = nn.Conv2d(3, 6, 3, 3), nn.Linear(6, 5)
        self.twice, self.head = nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.patch(x).flatten(2).transpose(1, 2)).mean(1)
        return self.head(self.twice(self.twice(x).relu()).relu())


def test_masks_of_layers_that_stay_whole_are_applied_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    model = randomised(Tokens()).double()
    masks = {"tokens": torch.tensor([1, 0, 1, 1, 0]).bool(), "twice": torch.tensor([0, 1, 1, 1, 0]).bool()}
    small, masked = compact(model, IMAGES, masks=masks), copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            masked.get_submodule(name).weight[~mask] = 0
    assert difference(masked, small, 2, 3, 9, 9) < 1e-12
    rows = {row.name: (row.filters, row.pruned, row.kept, row.inputs) for row in small.report.layers}
    assert rows["tokens"] == (5, 2, 5, (6, 6))
    assert rows["twice"] == (5, 2, 5, (5, 5))
    assert {row.name: row.why for row in small.report.layers}["twice"] == "2: twice serves more than once"


def test_the_largest_constant_carries_the_others() -> None:
    """In float32: a small one would need weights of millions."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            self.left, self.right = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return torch.cat(
                [self.left(functional.gelu(self.first(x))), self.right(functional.gelu(self.second(x)))], 1
            )

    torch.manual_seed(0)
    model = Dense().eval()
    with torch.no_grad():
        model.stem.bias.zero_()
        model.first.bias.copy_(torch.tensor([1.0, 0.5, *[0.1] * 6]))
        model.second.bias.copy_(torch.tensor([-6.0, 0.5, *[0.1] * 6]))
    FilterPruner(model, 0.0, every=1000, removable_only=False).set_masks(
        {"stem": torch.tensor([0, 0, *[1] * 6]).bool()}
    )
    small = compact(model, IMAGES.float())
    assert difference(model, small, 2, 3, 9, 9, dtype=torch.float32) < 1e-6
    assert float(small.right.weight.detach().abs().max()) < 1


class Two(nn.Module):
    """An optional input, and a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor, y: Tensor | None = None, doubled: bool = False) -> Tensor:
        h = self.a(x).relu()
        h = h if y is None else h + self.b(y)
        return self.c(h * 2 if doubled else h)


def test_inputs_are_those_of_the_example() -> None:
    torch.manual_seed(0)
    model = randomised(Two()).double()
    FilterPruner(model, 0.0, every=1000, include=["a"]).set_masks({"a": torch.tensor([1, 0, 1, 0, 0, 1]).bool()})
    assert small_and_masked(model, IMAGES) < 1e-12
    assert small_and_masked(model, IMAGES, IMAGES.flip(0)) < 1e-12
    assert not hasattr(compact(model, IMAGES), "b")
    small = compact(model, (IMAGES, None, True))
    torch.testing.assert_close(small(IMAGES), model(IMAGES, None, True))
    with pytest.raises(ValueError, match=r"Two takes 1 to 3 inputs \(x, y, doubled\), and example_input has 4"):
        compact(model, (IMAGES,) * 4)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_stays_so(frozen: str) -> None:
    model = layered(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(100, 3)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith(frozen))
    model[1].train()
    model[3].requires_grad_(True)
    small = compact(with_masks(model, _0=[1, 0, 1, 0, 0, 1]), IMAGES)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == flags
    assert [small.get_submodule(name).training for name in "0135"] == [False, True, False, False]


def test_layers_with_hooks_stay_whole_with_their_hooks() -> None:
    model = layered(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    with_masks(model, _0=[1, 0, 1, 0, 0, 1])
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    assert small_and_masked(model, IMAGES) < 1e-12
    assert compact(model, IMAGES).report.layers[0].why == "3: 1 has a hook or a forward of its own"


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "hook"])
def test_parametrised_layers_stay_as_they_are(kind: str) -> None:
    model = layered(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    if kind == "hook":
        torch.nn.utils.prune.l1_unstructured(model[2], "weight", 0.3)
    else:
        getattr(nn.utils.parametrizations, kind)(model[2])
    before = dict(vars(model[2]))
    pruner = FilterPruner(model, 0.5, ignore=["2"], every=1000, removable_only=False)
    pruner.set_masks({"0": torch.tensor([1, 0, 1, 0, 0, 1]).bool()})
    assert small_and_masked(model.eval(), IMAGES) < 1e-12
    assert vars(model[2]).keys() == before.keys()


def test_tied_layers_and_layers_that_the_forward_reads_stay_whole() -> None:
    class Reading(nn.Module):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3), nn.Conv2d(6, 6, 3)
            if tied:
                self.c.weight = self.b.weight
            self.tied = tied

        def forward(self, x: Tensor) -> Tensor:
            x = self.c(self.b(self.a(x)))
            return x if self.tied else x * self.a.weight.mean()

    for tied in (False, True):
        torch.manual_seed(0)
        model = randomised(Reading(tied)).double()
        mask = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
        FilterPruner(model, 0.0, every=1000, include=["a", "b"]).set_masks({"a": mask, "b": mask})
        assert small_and_masked(model, IMAGES) < 1e-12
    with pytest.raises(ValueError, match="masks: the forward also reads the weights of a by itself"):
        compact(Reading(False).double(), IMAGES, masks={"a": mask})


def test_small_networks_are_copied_whole() -> None:
    model = layered(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    small = compact(with_masks(model, _0=[1, 0, 1, 0, 0, 1]), IMAGES)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.load(file, weights_only=False)):
        assert isinstance(twin, CompactModel)
        assert twin.report == small.report
        assert torch.equal(twin.origins["0.weight"][0], torch.tensor([0, 2, 5]))
        assert torch.equal(twin(IMAGES), small(IMAGES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about TorchScript's age
        assert torch.equal(torch.jit.script(small)(IMAGES), small(IMAGES))


def test_what_cannot_be_kept_is_told() -> None:
    model = layered(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3))
    with_masks(model, _0=[1] * 6)
    with pytest.warns(UserWarning, match="the masks keep every filter, so that nothing is removed"):
        compact(model, IMAGES)
    for masks, message in (
        ({"1": torch.ones(6).bool()}, "masks: 1 is a ReLU, and masks are for its Conv2d and Linear layers"),
        (
            {"0": torch.ones(5).bool()},
            r"the mask of 0 must be bool of shape \[6\] or \[6, 3, 3, 3\], got torch.bool",
        ),
        ({"0": torch.ones(6)}, "got torch.float32 of"),
    ):
        with pytest.raises(ValueError, match=message):
            compact(model, IMAGES, masks=masks)
    for example, message in (
        (None, "example_input is None, without a tensor"),
        (IMAGES.numpy(), "example_input is a numpy.ndarray"),
        (IMAGES[:, :2], r"Sequential does not run on the example input float64 \[2, 2, 9, 9\] on cpu: "),
        (IMAGES.float(), r"does not run on the example input float32 \[2, 3, 9, 9\] on cpu: Input type"),
        (IMAGES.to("meta"), "example_input is on meta and the model on cpu: move it there"),
    ):
        with pytest.raises(ValueError, match=message):
            compact(model, example)
    with torch.no_grad():
        model[2].weight[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="2 has weights that are NaN or infinite"):
        compact(model, IMAGES)
