"""Costs are those of hand-written formulas, and masks take away what they prune and what they silence."""

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from fastprune import FilterPruner, WeightPruner, compact, models
from fastprune.cost import Cost, cost
from fastprune.nn import MaskedConv2d, mask_convolutions

IMAGE = torch.zeros(1, 3, 32, 32)


def layer(found: Cost, name: str) -> tuple[int, int, int, int]:
    (one,) = [each for each in found.layers if each.name == name]
    return one.macs, one.flops, one.parameters, one.activation_bytes


def cifar_resnet_macs(blocks: int) -> int:
    total, channels = 3 * 9 * 16 * 32 * 32, 16
    for width, size in ((16, 32), (32, 16), (64, 8)):
        for _ in range(blocks):
            total += (channels * width + width * width) * 9 * size * size
            total += channels * width * size * size if channels != width else 0  # the projection
            channels = width
    return total + 64 * 10


@pytest.mark.parametrize("depth", [20, 56])
def test_cifar_resnets_have_the_macs_of_their_formula(depth: int) -> None:
    found = cost(models.create(f"resnet{depth}"), IMAGE)
    assert found.macs == cifar_resnet_macs((depth - 2) // 6)
    # He et al.'s networks pad where these project: 40.55 M and 125.49 M are published.
    projections = 16 * 32 * 16 * 16 + 32 * 64 * 8 * 8
    assert found.macs - projections == pytest.approx({20: 40.55e6, 56: 125.49e6}[depth], rel=1e-4)


@pytest.mark.parametrize(
    "name",
    ["resnet50", "mobilenet_v2", "mobilenet_v3_small", "densenet121", "efficientnet_b0", "convnext_tiny", "vit_b_16"],
)
def test_torchvision_networks_have_their_published_macs_and_parameters(name: str) -> None:
    published = torchvision.models.get_model_weights(name).DEFAULT.meta  # type: ignore[attr-defined]
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    found = cost(model, torch.empty(1, 3, 224, 224, device="meta"))
    assert round(found.macs / 1e9, 3) == published["_ops"]  # giga-MACs, which they call FLOPS
    assert found.parameters == published["num_params"]


@pytest.mark.parametrize(
    ("module", "shape", "macs", "others", "parameters"),
    [
        (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 5, 4), 2 * 20 * 6 * 8 * 9, 2 * 20 * 8, 6 * 8 * 9 + 8),
        (nn.Conv2d(6, 8, 3, stride=2, bias=False), (2, 6, 7, 7), 2 * 9 * 6 * 8 * 9, 0, 6 * 8 * 9),
        (nn.Conv2d(6, 9, (1, 3), groups=3), (1, 6, 5, 5), 15 * 6 * 9 // 3 * 3, 15 * 9, 6 * 9 // 3 * 3 + 9),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (1, 6, 5, 5), 9 * 6 * 9, 0, 6 * 9),
        (nn.ConvTranspose2d(6, 8, 3, bias=False), (1, 6, 5, 5), 25 * 6 * 8 * 9, 0, 6 * 8 * 9),
        (nn.Conv1d(4, 5, 3), (2, 4, 10), 2 * 8 * 4 * 5 * 3, 2 * 8 * 5, 4 * 5 * 3 + 5),
        (nn.Linear(7, 5), (3, 7), 3 * 7 * 5, 3 * 5, 7 * 5 + 5),
        (nn.Linear(7, 5, bias=False), (2, 4, 7), 8 * 7 * 5, 0, 35),
        (nn.BatchNorm2d(4), (2, 4, 3, 3), 0, 2 * 4 * 9, 8),
        (nn.GELU(), (2, 4), 0, 8, 0),
        (nn.MaxPool2d(3, 2), (1, 4, 9, 9), 0, 9 * 4 * 16, 0),
        (nn.AvgPool2d(2), (1, 4, 8, 8), 0, 4 * 4 * 16, 0),
        (nn.AdaptiveAvgPool2d(1), (1, 4, 8, 8), 0, 4 * 64, 0),
        (nn.Flatten(), (1, 4, 8, 8), 0, 0, 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_each_kind_of_layer_by_hand(
    module: nn.Module, shape: tuple[int, ...], macs: int, others: int, parameters: int
) -> None:
    found = cost(module, torch.zeros(shape))
    assert (found.macs, found.flops, found.parameters) == (macs, 2 * macs + others, parameters)
    assert found.input_shapes == (shape,)


def test_attention_counts_both_of_its_products() -> None:
    module = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.zeros(2, 10, 16)
    found = cost(module, (x, x, x))
    products = 2 * (2 * 10 * 10 * 16)  # q·k and its product with v
    assert found.macs == 4 * 2 * 10 * 16 * 16 + products


class TwoResults(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.exp()  # the input and y
        z = functional.relu(y)  # and z: three alive
        del y
        return z.sin() + z  # the sum: four


def test_memory_is_what_ops_write_and_what_lives_at_one_time() -> None:
    found = cost(TwoResults(), torch.zeros(1, 10))
    assert found.activation_bytes == 5 * 40  # the input, exp, relu, sin, the sum
    assert found.peak_activation_bytes == 4 * 40
    in_place = cost(nn.Sequential(nn.ReLU(inplace=True)), torch.zeros(1, 10))
    assert in_place.activation_bytes == in_place.peak_activation_bytes == 40
    half = cost(TwoResults(), torch.zeros(1, 10, dtype=torch.bfloat16))
    assert half.activation_bytes == 5 * 20


def test_costs_grow_with_the_batch_and_parameters_do_not() -> None:
    model = models.create("resnet20")
    one, four = cost(model, IMAGE), cost(model, IMAGE.repeat(4, 1, 1, 1))
    assert (four.macs, four.flops) == (4 * one.macs, 4 * one.flops)
    assert four.activation_bytes == 4 * one.activation_bytes
    assert four.peak_activation_bytes == 4 * one.peak_activation_bytes
    assert four.parameters == one.parameters == sum(p.numel() for p in model.parameters())


def test_the_model_is_left_as_it_was() -> None:
    model = models.create("resnet20")
    model.layer1.eval()  # type: ignore[union-attr]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    cost(model, IMAGE)
    assert [module.training for module in model.modules()] == training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


# ---- masks ----


def masked(model: nn.Module, **keep: list[int]) -> nn.Module:
    """The model with these filters left in those layers, `_` in a name standing for a dot."""
    found = mask_convolutions(model)
    for name, kept in keep.items():
        mask = found[name.replace("_", ".")].mask
        mask.zero_()
        mask[kept] = True
    return model


def test_pruned_filters_and_the_channels_they_silence_are_not_counted() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 6, 3, bias=False),
        nn.Flatten(),
        nn.Linear(6 * 4, 5),
    )
    found = cost(masked(model, **{"0": [0, 3, 4], "4": [1, 2]}), torch.zeros(1, 3, 8, 8))
    assert layer(found, "0") == (64 * 9 * 3 * 3, 2 * 64 * 9 * 3 * 3 + 64 * 3, 3 * 27 + 3, 4 * 64 * 3)
    assert layer(found, "1") == (0, 64 * 3, 2 * 3, 4 * 64 * 3)
    assert layer(found, "3") == (0, 4 * 16 * 3, 0, (4 + 8) * 16 * 3)  # and the int64 indices
    assert layer(found, "4")[::2] == (4 * 9 * 3 * 2, 9 * 3 * 2)
    assert layer(found, "6")[::2] == (8 * 5, 8 * 5 + 5)
    dense = cost(model, torch.zeros(1, 3, 8, 8), masked=False)
    assert layer(dense, "4")[::2] == (4 * 9 * 8 * 6, 9 * 8 * 6)
    assert (found.masked, dense.masked) == (True, False)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.last = nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.last(x + self.two(x))


def test_a_channel_of_a_residual_stream_goes_when_no_branch_keeps_it() -> None:
    found = cost(masked(Residual(), one=[0, 1], two=[1, 2]), torch.zeros(1, 3, 1, 1))
    assert layer(found, "one")[0] == 3 * 2
    assert layer(found, "two")[0] == 2 * 2
    assert layer(found, "last")[0] == 3 * 2  # channels 0, 1 and 2


class Concatenation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.last = nn.Conv2d(8, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.one(x), self.two(x)], 1))


def test_concatenated_channels_keep_their_places() -> None:
    found = cost(masked(Concatenation(), one=[0], two=[1, 2, 3]), torch.zeros(1, 3, 1, 1))
    assert [layer(found, name)[0] for name in ("one", "two", "last")] == [3, 9, 8]


def test_a_pruned_depthwise_filter_takes_its_input_with_it_and_the_other_way_round() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.Conv2d(4, 2, 1, bias=False)
    )
    found = cost(masked(model, **{"0": [0, 1, 2], "1": [1, 2, 3]}), torch.zeros(1, 3, 1, 1))
    assert [layer(found, name)[::2] for name in "012"] == [(6, 6), (2, 2), (4, 4)]


def test_groups_count_what_is_left_in_each() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 6, 1, groups=2, bias=False))
    found = cost(masked(model, **{"0": [0, 2, 3], "1": [0, 3, 4]}), torch.zeros(1, 3, 1, 1))
    assert layer(found, "1")[::2] == (1 * 1 + 2 * 2, 5)
    assert layer(found, "0")[0] == 3 * 3
    found = cost(masked(model, **{"0": [0, 2, 3], "1": [3, 4, 5]}), torch.zeros(1, 3, 1, 1))
    assert layer(found, "0")[0] == 3 * 2  # no one reads channel 0


def test_a_layer_without_filters_leaves_what_feeds_it_unread() -> None:
    found = cost(masked(Residual(), two=[]), torch.zeros(1, 3, 1, 1))
    assert [each.name for each in found.layers if each.macs] == ["one", "last"]


class ChannelsLast(nn.Module):
    """A linear layer over the channels of images, as ConvNeXt has them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 1, bias=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).mean((2, 3))


def test_channels_are_followed_through_permutations_and_reshapes() -> None:
    found = cost(masked(ChannelsLast(), conv=[0, 5]), torch.zeros(2, 3, 4, 4))
    assert layer(found, "fc")[0] == 2 * 16 * 2 * 5


def test_a_constant_that_squeeze_and_excite_scales_varies_with_the_input_again() -> None:
    block = torchvision.ops.SqueezeExcitation(8, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), block, nn.Conv2d(8, 2, 1, bias=False))
    found = cost(masked(model, **{"0": [1, 2, 3]}), torch.zeros(1, 3, 4, 4))
    assert [layer(found, name)[0] for name in ("0", "1.fc1", "1.fc2", "2")] == [16 * 9, 3 * 2, 2 * 8, 16 * 8 * 2]


def test_behind_unknown_ops_every_channel_counts() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.ChannelShuffle(2), nn.GroupNorm(2, 8), nn.Conv2d(8, 2, 1, bias=False)
    )
    found = cost(masked(model, **{"0": [1, 2, 3]}), torch.zeros(1, 3, 4, 4))
    assert [layer(found, name)[0] for name in "03"] == [16 * 9, 16 * 16]


def test_single_weights_count_where_a_filter_has_none_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False))
    WeightPruner(model, rate=0)
    first = model[0]
    assert isinstance(first, MaskedConv2d)
    first.mask[0] = False
    first.mask[1, :2] = False
    found = cost(model, torch.zeros(1, 3, 1, 1))
    assert [layer(found, name)[0] for name in "01"] == [9, 6]


@pytest.mark.parametrize("rate", [0.3, 0.6])
def test_masks_of_a_pruner_are_read(rate: float) -> None:
    torch.manual_seed(0)
    model = models.create("resnet20")
    pruner = FilterPruner(model, rate=rate)
    generator = torch.Generator().manual_seed(1)
    for mask in pruner.masks().values():
        mask.copy_(torch.rand(len(mask), generator=generator) > rate)
    found, dense = cost(model, IMAGE), cost(model, IMAGE, masked=False)
    assert found.macs < dense.macs * (1 - rate) ** 1.3
    assert dense.macs == cifar_resnet_macs(3)
    kept = pruner.masks()["layer1.0.conv1"]
    assert layer(found, "layer1.0.conv2")[0] == int(kept.sum()) * int(pruner.masks()["layer1.0.conv2"].sum()) * 9 * 1024


class Separable(nn.Module):
    """Every kind of convolution, and no branch that would keep what another one prunes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16, bias=False), nn.BatchNorm2d(16))
        self.pointwise = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.last = nn.Conv2d(24, 8, 3, bias=False)
        self.fc = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(functional.max_pool2d(self.pointwise(self.depthwise(self.stem(x))), 2))
        return self.fc(torch.flatten(functional.relu(x), 1))


@pytest.mark.parametrize("seed", range(3))
def test_what_the_masks_leave_is_what_the_compact_network_costs(seed: int) -> None:
    torch.manual_seed(seed)
    model = Separable().eval()
    for mask in FilterPruner(model, rate=0).masks().values():
        mask.copy_(torch.rand(len(mask)) > 0.4)
    example = torch.zeros(1, 3, 12, 12)
    left, small = cost(model, example), cost(compact(model, example), example)
    assert left.macs == small.macs < cost(model, example, masked=False).macs
    weights = {each.name: each.macs for each in left.layers if each.macs}
    assert weights == {each.name: each.macs for each in small.layers if each.macs}


def test_a_compact_residual_network_costs_at_least_what_the_masks_leave() -> None:
    torch.manual_seed(0)
    model = models.create("resnet20").eval()
    for mask in FilterPruner(model, rate=0).masks().values():
        mask.copy_(torch.rand(len(mask)) > 0.5)
    left, small, dense = cost(model, IMAGE), cost(compact(model, IMAGE), IMAGE), cost(model, IMAGE, masked=False)
    assert left.macs < small.macs < dense.macs  # filters whose channel another branch keeps stay in the small one


# ---- what is said ----


def test_the_table_names_layers_and_conventions() -> None:
    text = str(cost(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.zeros(2, 3, 10, 10)))
    lines = text.splitlines()
    assert lines[0] == "input 2×3×10×10; masks not counted; 1 MAC = 2 FLOPs"
    assert lines[1].split() == ["layer", "kind", "MACs", "FLOPs", "parameters", "activations", "(bytes)"]
    assert lines[3].split() == ["0", "Conv2d", "2,400", "5,600", "16", "3,200"]
    assert lines[5].split() == ["total", "2,400", "6,400", "16", "8,800"]
    assert lines[6] == "activations alive at one time: at most 8,800 bytes, the input with them"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ([3, 32, 32], r"example_input is \[3, 32, 32\], without a tensor: expected is a tensor, or a tuple of"),
        (torch.zeros(3).numpy(), r"example_input is a numpy\.ndarray: expected is a tensor"),
        (
            torch.zeros(1, 4, 8, 8),
            r"Sequential does not run on the example input float32 \[1, 4, 8, 8\] on cpu",
        ),
        (torch.zeros(1, 3, 8, 8).double(), r"does not run on the example input float64 \[1, 3, 8, 8\] on cpu"),
        (
            (IMAGE, IMAGE),
            r"on the example input \(float32 .*, float32 .*\): TypeError: .* takes 2 posit",
        ),
        (IMAGE.to("meta"), "example_input is on meta and the model on cpu: move it there"),
    ],
    ids=["numbers", "array", "shape", "dtype", "number", "device"],
)
def test_inputs_that_do_not_fit_are_told(
    example: object, message: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=message):
        cost(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), example)
    captured = capfd.readouterr()
    assert captured.out + captured.err + caplog.text == ""  # torch prints nothing, either


# ---- nested inputs and outputs ----


class InDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unread = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)

    def forward(self, batch: dict[str, object], scales: tuple[Tensor, ...]) -> dict[str, object]:
        images = batch["images"]
        return {"features": [self.conv(images) * scales[0]], "more": (self.unread(images),)}


def test_inputs_and_outputs_may_be_nested() -> None:
    model, inputs = InDicts(), ({"images": torch.zeros(1, 3, 2, 5)}, (torch.zeros(1), [torch.zeros(2)]))
    assert cost(model, inputs).macs == 10 * 3 * 12
    found = cost(model, inputs)
    assert found.input_shapes == ((1, 3, 2, 5), (1,), (2,))
    assert str(found).startswith("input 1×3×2×5, 1, 2; ")


def test_masks_count_where_the_output_is_nested() -> None:
    model, inputs = InDicts(), ({"images": torch.zeros(1, 3, 2, 5)}, (torch.zeros(1),))
    pruner = FilterPruner(model, rate=0, removable_only=False)
    pruner.set_masks({"conv": torch.tensor([1, 0, 0, 0]).bool(), "unread": torch.ones(8).bool()})
    assert cost(model, inputs).macs == 10 * 3 * 9


class Result:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


class InAnObject(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Result:
        return Result(self.conv(x))


def test_masks_are_not_counted_where_nothing_is_known_of_the_output() -> None:
    model = InAnObject()
    assert cost(model, IMAGE).macs == 12 * 32 * 32
    mask_convolutions(model)
    with pytest.raises(ValueError, match="the model returns a Result, and what the masks leave is counted for tensors"):
        cost(model, IMAGE)
    assert cost(model, IMAGE, masked=False).macs == 12 * 32 * 32
