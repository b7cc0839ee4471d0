"""A network described as JSON is the same network when it is built again, and nothing else can be built."""

import copy
import json
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional

import fastprune
from fastprune import architecture, models
from fastprune.architecture import ArchitectureError
from fastprune.graph import trace
from fastprune.layer_kinds import FUNCTIONS, MODULES, kind_of
from fastprune.scatter import Scatter


def again(model: nn.Module) -> fx.GraphModule:
    network = trace(model)
    description = json.loads(json.dumps(architecture.describe(network), allow_nan=False))
    return architecture.build(description, architecture.tensors_of(network))


def assert_same(model: nn.Module, images: Tensor) -> fx.GraphModule:
    model.eval()
    built = again(model)
    with torch.no_grad():
        assert torch.equal(built(images), model(images))
    assert not built.training
    return built


LAYERS = [
    (nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=1, groups=2, bias=False), 4),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), 4),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), 4),
    (nn.BatchNorm2d(4, eps=0.1, momentum=None), 4),
    (nn.BatchNorm2d(4, affine=False), 4),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 4),
    (nn.GroupNorm(2, 4), 4),
    (nn.LayerNorm((4, 8, 8), bias=False), 4),
    (nn.LocalResponseNorm(3, 1e-3), 4),
    (nn.ReLU6(inplace=True), 4),
    (nn.GELU("tanh"), 4),
    (nn.LeakyReLU(0.3), 4),
    (nn.ELU(0.5), 4),
    (nn.Hardtanh(-0.5, 0.25), 4),
    (nn.PReLU(4), 4),
    (nn.Softmax(1), 4),
    (nn.MaxPool2d(3, 2, 1, ceil_mode=True), 4),
    (nn.AvgPool2d(3, 2, 1, count_include_pad=False), 4),
    (nn.AdaptiveAvgPool2d((None, 3)), 4),
    (nn.AdaptiveMaxPool2d(2), 4),
    (nn.Dropout(0.25), 4),
    (nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False), 4),
    (nn.ConstantPad2d((1, 2, 0, -1), 0.5), 4),
    (nn.PixelShuffle(2), 4),
    (nn.ChannelShuffle(2), 4),
    (torchvision.ops.StochasticDepth(0.1, "row"), 4),
    (nn.Sequential(nn.Flatten(), nn.Linear(256, 3, bias=False)), 4),
]


@pytest.mark.parametrize(("layer", "channels"), LAYERS, ids=lambda value: type(value).__name__)
def test_layers_come_back_with_their_arguments(layer: nn.Module, channels: int) -> None:
    images = torch.randn(2, channels, 8, 8)
    built = assert_same(nn.Sequential(layer), images)
    for name, module in layer.named_modules():
        kind = kind_of(module)
        if kind is not None:
            other = built.get_submodule(f"0.{name}".rstrip("."))
            assert type(other) is type(module)
            assert MODULES[kind].read(other) == MODULES[kind].read(module)


class Functions(nn.Module):
    """Functions, methods, and arguments of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("shift", torch.randn(4, 1, 1))
        self.inner = nn.Module()
        self.inner.gate = nn.Parameter(torch.randn(1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.chunk(x * self.scale + self.shift, 2, dim=1)
        y = torch.cat([functional.relu(a), b.sigmoid() / 2], 1)[:, :, 1:-1:2, ...]
        y = functional.pad(y, (1, 0, 0, 1), "reflect") - self.inner.gate
        y = functional.interpolate(y, scale_factor=2.0, mode="nearest")
        return torch.flatten(y.mean((2, 3), keepdim=True), 1).view(x.shape[0], -1).float()


def test_functions_methods_and_parameters_of_the_forward_itself_come_back() -> None:
    built = assert_same(Functions(), torch.randn(2, 4, 8, 8))
    assert isinstance(built.scale, nn.Parameter)
    assert dict(built.named_buffers()).keys() == {"shift"}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "densenet121", "regnet_y_400mf", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision_come_back(name: str) -> None:
    torch.manual_seed(0)
    assert_same(torchvision.models.get_model(name, weights=None, num_classes=10), torch.randn(1, 3, 64, 64))


def test_masked_networks_come_back_with_masks_and_feedback() -> None:
    torch.manual_seed(0)
    model = models.create("resnet20")
    pruner = fastprune.FilterPruner(model, rate=0.5, ignore=["fc", "conv1"])
    pruner.update()
    built = assert_same(model, torch.randn(2, 3, 32, 32))
    for name, layer in pruner.layers.items():
        other = built.get_submodule(name)
        assert type(other) is fastprune.MaskedConv2d
        assert torch.equal(other.mask, layer.mask)
        assert layer.feedback is not None
        assert torch.equal(other.feedback, layer.feedback)
    assert type(built.get_submodule("conv1")) is nn.Conv2d


def test_masks_of_single_weights_come_back() -> None:
    model = models.create("resnet20")
    fastprune.WeightPruner(model, rate=0.5).update()
    assert_same(model, torch.randn(2, 3, 32, 32))


def test_compact_networks_come_back() -> None:
    model = models.create("resnet20")
    fastprune.FilterPruner(model, rate=0.5, min_kept=1).update()
    images = torch.randn(2, 3, 32, 32)
    built = assert_same(fastprune.compact(model, images), images)
    assert sum(p.numel() for p in built.parameters()) < 0.7 * 272_474


def scattered() -> fx.GraphModule:
    """A small network with a branch of fewer channels than its stream."""
    torch.manual_seed(0)
    model = models.create("resnet20").eval()
    pruner = fastprune.FilterPruner(model, rate=0.0)
    pruner.set_masks({"layer3.1.conv2": torch.arange(64) % 4 == 3, "layer3.2.conv2": torch.zeros(64).bool()})
    return fastprune.compact(model, torch.zeros(1, 3, 32, 32))


def test_branches_of_fewer_channels_come_back() -> None:
    built = assert_same(scattered(), torch.randn(2, 3, 32, 32))
    made = [(module.channels, module.kept) for module in built.modules() if isinstance(module, Scatter)]
    assert made == [(64, 16), (64, 0)]


@pytest.mark.parametrize("wrong", [64, -1, 7])
def test_a_branch_is_added_to_channels_that_there_are_and_to_each_once(wrong: int) -> None:
    small = scattered()
    tensors = architecture.tensors_of(small)
    index = tensors["scatter_0.index"].clone()
    assert index[1] == 7
    index[0] = wrong
    with pytest.raises(ArchitectureError, match=r"scatter_0.index has the shape \[16\] and is torch.int64, which does"):
        architecture.build(architecture.describe(small), {**tensors, "scatter_0.index": index})


class Strange(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.round(x)


class Moves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to("cpu")


def test_what_cannot_be_described_is_named() -> None:
    with pytest.raises(ArchitectureError, match=r"it calls torch\.round, which no saved network may"):
        architecture.describe(trace(Rounded()))
    with pytest.raises(ArchitectureError, match="it calls the tensor's method to,"):
        architecture.describe(trace(Moves()))
    graph = fx.Graph()
    graph.output(graph.call_module("conv", (graph.placeholder("x"),)))
    root = nn.Module()
    root.conv = Strange(3, 3, 1)
    with pytest.raises(ArchitectureError, match=r"conv is a .*Strange, which no saved network may have"):
        architecture.describe(fx.GraphModule(root, graph))
    root.conv = nn.MaxPool2d(2, return_indices=True)
    with pytest.raises(ArchitectureError, match="conv is a MaxPool2d with return_indices=True"):
        architecture.describe(fx.GraphModule(root, graph))


# ---- hostile descriptions ----


def description() -> tuple[dict[str, Any], dict[str, Tensor]]:
    network = trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Functions()))
    return json.loads(json.dumps(architecture.describe(network))), architecture.tensors_of(network)


def test_the_description_to_be_tampered_with_is_sound() -> None:
    sound, tensors = description()
    assert architecture.build(sound, tensors)(torch.zeros(2, 3, 10, 10)).shape == (2, 4)


EVIL = "__import__('os').system('false')"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("nodes", 1, 1), EVIL),
        (("nodes", 0, 1), f"x={EVIL}"),
        (("nodes", 0, 1), "self"),
        (("nodes", 0, 1), "lambda"),
        (("nodes", 0, 2), [1]),
        (("nodes", 1, 0), "exec"),
        (("nodes", 2, 1), "graph"),
        (("nodes", 1, 2), [EVIL]),
        (("nodes", 1, 2), [{"node": 5}]),
        (("nodes", 1, 2), [{"node": -1}]),
        (("nodes", 1, 2), [{"node": True}]),
        (("nodes", 1, 2), [{"dtype": "os"}]),
        (("nodes", 1, 2), [{"key": "image"}]),  # of a module
        (("nodes", 1), ["call_function", "operator.getitem", [{"node": 0}, {"key": EVIL}], {}]),
        (("nodes", 1), ["call_function", "operator.getitem", [{"node": 0}, {"key": "a" * 101}], {}]),
        (("nodes", 1), ["call_function", "operator.getitem", [{"node": 0}, "image"], {}]),
        (("nodes", 1, 2), [{"dict": {EVIL: 1}}]),
        (("nodes", 1, 2), [{"dict": []}]),
        (("nodes", 1, 2), [float("inf")]),
        (("nodes", 1, 2), [10**400]),
        (("nodes", 1, 2), [1]),
        (("nodes", 1, 3), {EVIL: 1}),
        (("nodes", 1, 3), {"if": 1}),
        (("nodes",), []),
        (("nodes",), [["placeholder", "x", [], {}]]),
        (("nodes",), {}),
        (("modules", "0", 0), "Tensor"),
        (("modules", "0", 0), ["Conv2d"]),
        (("modules", "0", 1), {}),
        (("modules", "0", 1, "in_channels"), -3),
        (("modules", "0", 1, "in_channels"), 2**40),
        (("modules", "0", 1, "in_channels"), 2**30),
        (("modules", "0", 1, "in_channels"), True),
        (("modules", "0", 1, "kernel_size"), {"tuple": [10**6] * 2}),
        (("modules", "0", 1, "groups"), 7),
        (("modules", "0", 1, "padding_mode"), EVIL),
        (("modules", "0", 1, "device"), "cpu"),
        (("modules", "forward"), ["ReLU", {"inplace": False}]),
        (("modules", "__class__"), ["ReLU", {"inplace": False}]),
        (("modules", "a.b." * 30 + "c"), ["ReLU", {"inplace": False}]),
        (("modules", 'a"]'), ["ReLU", {"inplace": False}]),
        (("modules",), []),
        (("attributes", "2.scale"), "module"),
        (("attributes", "2.none"), "parameter"),
        ((), None),
        ((), [1]),
    ],
)
def test_descriptions_of_none_are_refused(path: tuple[Any, ...], value: Any) -> None:
    tampered, tensors = description()
    place: Any = {"": tampered}
    for key in ("", *path)[:-1]:
        place = place[key]
    place[("", *path)[-1]] = value
    top = place[""] if not path else tampered
    with pytest.raises(ArchitectureError):
        architecture.build(top, tensors)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_lists_in_lists_end_somewhere() -> None:
    tampered, tensors = description()
    tampered["nodes"][1][2] = [nested(30)]
    with pytest.raises(ArchitectureError, match="cannot be an argument"):
        architecture.build(tampered, tensors)


def test_only_the_listed_attributes_can_be_read() -> None:
    tampered, tensors = description()
    (node,) = [node for node in tampered["nodes"] if node[1] == "getattr"]
    for args in ([node[2][0], "none"], [node[2][0]], [1, "shape"], [*node[2], 1]):
        changed = copy.deepcopy(tampered)
        changed["nodes"][tampered["nodes"].index(node)][2] = args
        with pytest.raises(ArchitectureError, match="getattr is for ndim and shape of tensors"):
            architecture.build(changed, tensors)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("0.weight", None, "tensors missing: 0.weight"),
        ("other", torch.zeros(1), "tensors that belong to no part: other"),
        ("0.weight", torch.zeros(4, 3, 3, 2), r"0.weight has the shape \[4, 3, 3, 2\]"),
        ("0.bias", torch.zeros(4, dtype=torch.int64), "0.bias has .* torch.int64, which does not fit"),
        ("2.shift", None, r"2\.shift is no tensor of the file"),
    ],
)
def test_tensors_have_to_fit(name: str, tensor: Tensor | None, message: str) -> None:
    sound, tensors = description()
    tensors = {key: value for key, value in tensors.items() if key != name} | ({} if tensor is None else {name: tensor})
    with pytest.raises(ArchitectureError, match=message):
        architecture.build(sound, tensors)


def test_nothing_on_the_lists_reaches_outside() -> None:
    for name, function in FUNCTIONS.items():
        assert name.partition(".")[0] in {"operator", "torch", "functional", "getattr"}, name
        assert callable(function)
    assert not {"exec", "eval", "compile", "load", "save", "import", "open"} & {n.rpartition(".")[2] for n in FUNCTIONS}
