"""Which filters are pruned at all: none that has to stay, of models as they are and in the wrappers of PyTorch."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from fastprune import FilterPruner, MaskedConv2d, WeightPruner, compact, models, pruning_plan
from fastprune.output_layers import output_layers

IMAGES = torch.zeros(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def warned_of_nothing() -> Iterator[None]:
    """Each test as in a process of its own."""
    pruning_plan._warn_once.cache_clear()
    yield
    pruning_plan._warn_once.cache_clear()


def segmentation() -> nn.Sequential:
    """Its last convolution has a filter for each class."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*body, nn.Sequential(nn.Conv2d(8, 4, 1), nn.Upsample(scale_factor=2)))


class Mixed(nn.Module):
    """Filters that can be removed, filters that cannot, and a layer with some of each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.whole, self.free = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.norm = nn.GroupNorm(2, 4)
        self.some, self.twice, self.unused = nn.Conv2d(3, 10, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(3, 2, 1)
        self.inside, self.head = nn.Conv2d(10, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        whole = self.whole(x)
        x = torch.cat([whole, self.free(x)], 1) + self.some(x)
        x = self.twice(self.twice(functional.relu(self.inside(x))))
        return self.head(x), self.norm(whole).mean()


def whys(pruner: FilterPruner) -> dict[str, str]:
    return {layer.name: layer.why for layer in pruner.report().layers}


# ---- with an example ----


def test_only_what_can_be_removed_is_pruned() -> None:
    pruner = FilterPruner(Mixed(), 0.5, every=1, feedback="none", example_input=IMAGES)
    assert list(pruner.layers) == ["free", "some"]
    some = pruner.masks()["some"]
    assert some[:4].all(), "they are added to what GroupNorm reads"
    assert torch.equal(some[4:], pruner.masks()["free"])
    said = whys(pruner)
    assert said["whole"] == "left alone: its filters cannot be removed (read whole by norm)"
    assert said["inside"] == "left alone: its filters cannot be removed (twice serves more than once)"
    assert said["twice"] == "left alone: its filters cannot be removed (twice serves more than once)"
    assert said["head"] == "left alone: its filters cannot be removed (writes the output)"
    assert said["unused"] == "left alone: its filters cannot be removed (not called)"
    assert said["some"].endswith("; 4 cannot be removed: read whole by norm")
    assert said["some"].startswith(f"{int(some[4:].sum())} above the global threshold")


def test_the_rate_is_of_what_can_be_removed() -> None:
    pruner = FilterPruner(Mixed(), 0.5, every=1, feedback="none", example_input=IMAGES, min_kept=0)
    kept = int(torch.cat([pruner.masks()["free"], pruner.masks()["some"][4:]]).sum())
    assert kept == 4  # of 12, which are pairs of equal scores: the threshold is the 7th, and goes with the 8th


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_what_is_pruned_goes(scope: str) -> None:
    model = Mixed().eval()
    pruner = FilterPruner(model, 0.5, every=1, feedback="none", example_input=IMAGES, scope=scope)  # type: ignore[arg-type]
    small = compact(model, IMAGES)
    assert not [layer.why for layer in small.report.layers if layer.why and layer.name in pruner.layers]
    assert {layer.name: layer.kept for layer in small.report.layers} | pruner.kept() == {
        layer.name: layer.kept for layer in small.report.layers
    }


def test_what_is_tied_to_the_input_stays() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.added, self.depthwise = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1, groups=3)
            self.inside, self.fc = nn.Conv2d(6, 4, 1), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inside(torch.cat([x + self.added(x), self.depthwise(x)], 1))
            return self.fc(x.mean((2, 3)))

    pruner = FilterPruner(Tied(), 0.5, example_input=IMAGES)
    assert list(pruner.layers) == ["inside"]
    assert {whys(pruner)[name] for name in ("added", "depthwise")} == {
        "left alone: its filters cannot be removed (tied to the input)"
    }


def test_a_layer_that_is_named_is_pruned_all_the_same() -> None:
    model = Mixed()
    pruner = FilterPruner(model, 0.5, every=1, include=["free", model.whole, model.some], example_input=IMAGES)
    assert list(pruner.layers) == ["whole", "free", "some"]
    assert not pruner.masks()["some"][:4].all()
    assert whys(pruner)["whole"].endswith(
        "; asked for in include, though not all of it can be removed: read whole by norm"
    )
    assert "asked for" not in whys(pruner)["free"]


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_v2"])
def test_all_of_a_classifier_can_go(name: str) -> None:
    model = models.create(name)
    everything = FilterPruner(model, 0.5, example_input=torch.zeros(1, 3, 32, 32)).masks()
    assert list(everything) == [key for key, module in model.named_modules() if isinstance(module, MaskedConv2d)]
    assert not [layer.why for layer in FilterPruner(model, 0.5).report().layers if "left alone" in layer.why]


# ---- without ----


def test_output_layers_are_left_alone() -> None:
    model = segmentation()
    pruner = FilterPruner(model, 0.9, every=1)
    assert list(pruner.layers) == ["0"]
    assert type(model[3][0]) is nn.Conv2d
    assert whys(pruner)["3.0"] == "left alone: its filters cannot be removed (writes the output)"


@pytest.mark.parametrize("include", [["0", "3.0"], "modules", None])
def test_output_layers_are_pruned_where_they_are_asked_for(include: object) -> None:
    model = segmentation()
    options = {"include": [model[0], model[3][0]] if include == "modules" else include}
    assert list(FilterPruner(model, 0.5, **options, removable_only=include is not None).layers) == ["0", "3.0"]


def test_an_output_layer_within_what_is_included_is_left_alone() -> None:
    assert list(FilterPruner(segmentation(), 0.5, include=["0", "3"]).layers) == ["0"]


def test_a_model_of_output_layers_alone_is_refused() -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Conv2d(3, 4, 1)):
        for example in (None, IMAGES):
            with pytest.raises(
                ValueError, match=r"nothing to prune .*writes the output\): name layers one by one in inc"
            ):
                FilterPruner(model, 0.5, example_input=example)
    with pytest.raises(ValueError, match=r"nothing to prune that could be removed \(3\.0: writes the output\)"):
        FilterPruner(segmentation(), 0.5, ignore=["0"])


def test_of_many_layers_the_first_are_named() -> None:
    model = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Conv2d(3, 3, 1), nn.PReLU())])
    said = r"\(0: read whole by 1; 2: read whole by 3; 4: read whole by 5; and 2 more\): name layers one by one"
    with pytest.raises(ValueError, match=said):
        FilterPruner(model, 0.5, example_input=IMAGES)


def test_output_layers_of_known_networks() -> None:
    names = {"squeezenet1_1": {"classifier.1"}, "resnet18": set(), "mobilenet_v2": set(), "densenet121": set()}
    for name, expected in names.items():
        assert output_layers(torchvision.models.get_model(name, weights=None)) == expected, name
    segmenting = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    assert output_layers(segmenting) == {"classifier.4", "aux_classifier.4"}


def test_the_shape_of_a_result_is_not_the_result() -> None:
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last, self.up = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, 2), nn.ConvTranspose2d(4, 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            return functional.interpolate(self.last(self.up(x)), size=x.shape[-2:]).reshape(x.size(0), -1)

    assert output_layers(Resized()) == {"last"}


class Deciding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def told(make: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    assert {warning.filename for warning in caught} <= {__file__}, "it points to who made the pruner"
    return [str(warning.message) for warning in caught]


def test_what_is_not_known_is_told_once() -> None:
    (said,) = told(lambda: FilterPruner(segmentation(), 0.5))
    assert said.startswith("without example_input, FilterPruner cannot know which filters compact() can remove")
    assert "pass example_input=torch.zeros(1, 3, H, W)" in said
    assert told(lambda: FilterPruner(segmentation(), 0.5)) == []


def test_nothing_is_told_where_it_is_known_or_not_asked() -> None:
    assert told(lambda: FilterPruner(segmentation(), 0.5, example_input=IMAGES)) == []
    assert told(lambda: FilterPruner(segmentation(), 0.5, removable_only=False)) == []
    assert told(lambda: WeightPruner(segmentation(), 0.5)) == []


def test_of_a_model_that_cannot_be_traced_no_output_layer_is_known() -> None:
    (said,) = told(lambda: FilterPruner(Deciding(), 0.5, feedback="none"))
    assert "Deciding cannot be traced" in said
    assert said.endswith("and prunes all of them: list the output layers (heads, classifiers) in ignore")


def test_a_model_that_cannot_be_traced_is_left_as_it_was() -> None:
    model = Deciding()
    with pytest.raises(ValueError, match="cannot be traced"):
        FilterPruner(model, 0.5, example_input=IMAGES)
    assert type(model.conv) is nn.Conv2d


# ---- wrappers ----


@pytest.fixture
def process_group(tmp_path: object) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "DataParallel": (nn.DataParallel, "module."),
    "DistributedDataParallel": (DistributedDataParallel, "module."),
    "compiled": (lambda model: torch.compile(model, backend="eager"), "_orig_mod."),  # type: ignore[dict-item, return-value]
    "both": (lambda model: torch.compile(DistributedDataParallel(model), backend="eager"), "_orig_mod.module."),  # type: ignore[dict-item, return-value]
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("example", [None, IMAGES], ids=["bare", "example"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_model_is_pruned_as_it_is_bare(name: str, example: Tensor | None) -> None:
    wrap, prefix = WRAPPERS[name]
    bare, inner = segmentation(), segmentation()
    wrapped = wrap(inner)
    wrapped.eval()(IMAGES)  # compiled before it is converted
    images, pruners = torch.randn(2, 3, 8, 8), []
    for model in (bare.train(), wrapped.train()):
        pruner = FilterPruner(model, 0.5, every=1, example_input=example)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
            pruner.step()
        pruners.append(pruner)
    assert list(pruners[1].layers) == [f"{prefix}{layer}" for layer in pruners[0].layers]
    assert whys(pruners[1])[f"{prefix}3.0"] == whys(pruners[0])["3.0"]
    for one, other in zip(bare.state_dict().values(), inner.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [FilterPruner, WeightPruner])
def test_an_average_is_not_pruned(kind: type) -> None:
    with pytest.raises(TypeError, match="an AveragedModel is a copy that is not trained: prune the model that is"):
        kind(AveragedModel(segmentation()), 0.5)
