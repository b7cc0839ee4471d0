"""The graph of a model computes what the model does, in both modes, with the model's own parameters."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from fastprune import FilterPruner
from fastprune.graph import shape, trace


def create(name: str) -> nn.Module:
    torch.manual_seed(0)
    library, _, own = name.rpartition(":")
    if library:
        return timm.create_model(own, num_classes=10, drop_rate=0.2, drop_path_rate=0.2)
    return torchvision.models.get_model(own, num_classes=10)


NAMES = ("resnet18", "mobilenet_v3_small", "convnext_tiny", "timm:efficientnet_lite0", "timm:convnext_atto")


@pytest.mark.parametrize("name", NAMES)
def test_computes_the_same_in_both_modes(name: str) -> None:
    model, images = create(name), torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(model.state_dict())
    traced = trace(model, images)
    assert traced.training
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert traced.state_dict().keys() == before.keys()
    own = dict(model.named_parameters())
    assert all(parameter is own[key] for key, parameter in traced.named_parameters())
    first, second = copy.deepcopy(model), copy.deepcopy(traced)
    for training in (True, False):  # with the same random numbers
        results = []
        for network in (first, second):
            torch.manual_seed(1)
            results.append(network.train(training)(images))
        assert torch.equal(*results)
    modules = dict(traced.named_modules())
    called = {type(modules[node.target]) for node in traced.graph.nodes if node.op == "call_module"}
    assert all(kind.__module__.startswith(("torch.nn.", "torchvision.ops.")) for kind in called)
    assert nn.Identity not in called


def test_shapes() -> None:
    traced = trace(create("resnet18"), torch.zeros(2, 3, 64, 96))
    shapes = {node.name: shape(node) for node in traced.graph.nodes}
    assert shapes["conv1"] == (2, 64, 32, 48)
    assert shapes["fc"] == (2, 10)
    assert all(shape(node) is None for node in trace(create("resnet18")).graph.nodes)


def test_masked_convolutions_stay_whole() -> None:
    model = create("resnet18")
    FilterPruner(model, 0.3).update()
    images = torch.randn(2, 3, 64, 64)
    model.eval()
    torch.testing.assert_close(trace(model)(images), model(images))


def test_functions_of_dropout_ask_for_the_mode() -> None:
    class Dropping(nn.Module):
        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return functional.dropout(x, 0.5, training=self.training) * scale

    traced = trace(Dropping())
    ones = torch.ones(1000)
    assert torch.equal(traced.eval()(ones), 2 * ones)
    assert set(traced.train()(ones).unique().tolist()) == {0.0, 4.0}
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_function", "output"]


def test_what_decides_by_values_is_told() -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"Deciding cannot be traced"):
        trace(Deciding())


def test_what_differs_in_training_is_told() -> None:
    class Differing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if self.training else x

    model = Differing().eval()
    with pytest.raises(ValueError, match=r"Differing cannot be traced as one graph: its forward asks for `training`"):
        trace(model)
    assert not model.training


class Constants(nn.Module):
    """Normalises its input by buffers, and adds a tensor of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.5, 0.4, 0.3]))
        self.grid = torch.linspace(0, 1, 4)  # a tensor that is no buffer
        self.conv = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean.view(1, 3, 1, 1)) / self.mean.sqrt().view(3, 1, 1)
        return self.conv(x) * self.grid + torch.linspace(-1, 1, 4).view(4, 1)


def test_tensors_that_the_forward_makes_are_kept_in_the_graph_alone() -> None:
    torch.manual_seed(0)
    model, images = Constants(), torch.randn(2, 3, 4, 4)
    before = set(vars(model))
    traced = trace(model, images)
    assert torch.equal(traced(images), model(images))
    assert set(vars(model)) == before
    assert set(dict(traced.named_buffers())) == {"mean", "grid", "_tensor_constant0"}
    model.mean.add_(0.1)  # read when the graph runs, as the model does
    assert torch.equal(traced(images), model(images))


def test_tensors_that_are_others_each_time_are_told() -> None:
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(3, 1, 1)

    with pytest.raises(ValueError, match=r"makes a tensor that is another one each time.*test_graph.py:\d+: return x"):
        trace(Noisy())


def test_modes_are_left_as_they_are() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    traced = trace(model, torch.zeros(2, 3, 4, 4))
    assert [module.training for module in model] == [True, False, True]
    assert [traced.get_submodule(name).training for name in "012"] == [True, False, True]


def test_what_hooks_set_is_left_as_it_is() -> None:
    layer = nn.Conv2d(3, 4, 1)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    weight = layer.weight
    trace(nn.Sequential(layer), torch.zeros(2, 3, 4, 4))
    assert layer.weight is weight  # not one without values


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, "DataParallel wraps the network: pass its .module"),
        (torch.optim.swa_utils.AveragedModel, "AveragedModel wraps the network: pass its .module"),
        (torch.compile, "torch.compile wraps the network: pass its ._orig_mod"),
        (lambda model: torch.jit.trace(model, torch.zeros(1, 3, 4, 4)), "is compiled by torch.jit"),
        (
            lambda model: nn.Sequential(nn.LazyConv2d(2, 1)),
            r"0 has no weights yet \(a lazy layer\): call the model once",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*deprecated:DeprecationWarning")
def test_wrappers_say_what_to_pass(wrap: Callable[[nn.Module], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trace(wrap(nn.Sequential(nn.Conv2d(3, 2, 1))))


def test_names_that_graphs_have_for_themselves_are_told() -> None:
    model = nn.Module()
    model.graph = nn.Conv2d(3, 2, 1)
    model.forward = lambda x: model.graph(x)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="Module has parts named graph, which torch"):
        trace(model)
