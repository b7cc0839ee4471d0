"""Costs by arithmetic are those of the published networks, and of the networks that are built."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastprune import metapruning
from fastprune.metapruning import SCALES, PlainNetwork, Width, cost, costs, describe
from fastprune.metapruning.encoding import as_text, from_text, nearest_choice

SEARCHED = (
    *("resnet20", "resnet56", "resnet50", "mobilenet_v1", "mobilenet_v2"),
    *("resnet50_cifar", "mobilenet_v1_cifar", "mobilenet_v2_cifar"),
)
GENES = {"resnet20": 12, "resnet56": 30, "resnet50": 20, "mobilenet_v1": 13, "mobilenet_v2": 8 + 17}


@pytest.mark.parametrize(
    ("network", "widest", "narrowest"),  # as the original system's counter printed them, at 224×224
    [
        ("resnet50", 4111.71, 85.69),
        ("mobilenet_v1", 573.83, 14.09),
        ("mobilenet_v2", 579.30, 13.81),
    ],
)
def test_flops_are_those_of_the_original_system(network: str, widest: float, narrowest: float) -> None:
    for choice, mega in ((30, widest), (0, narrowest)):
        flops = cost(network, [choice] * GENES[network], 224).flops
        assert round(flops / 1e6, 2) == mega


def test_macs_and_parameters_are_the_published_ones() -> None:
    # torchvision's documentation: ResNet-50 has 4.09 GMACs and 25,557,032 parameters.
    whole = cost("resnet50", [30] * 20)
    assert round(whole.macs / 1e9, 2) == 4.09
    assert whole.parameters == 25_557_032
    # Howard et al., table 4: MobileNet has 569 M multiply-adds and 4.2 M parameters.
    whole = cost("mobilenet_v1", [30] * 13)
    assert (round(whole.macs / 1e6), round(whole.parameters / 1e6, 1)) == (569, 4.2)
    assert cost("resnet20", [30] * 12).parameters == 272_474
    assert cost("resnet56", [30] * 30).parameters == 855_770


class Counter:
    """Counts a network while it runs, by forward hooks, as the original system did."""

    def __init__(self, model: nn.Module, counted: tuple[type[nn.Module], ...]) -> None:
        self.flops = self.macs = 0
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(self.multiplied)
            elif isinstance(module, counted):
                module.register_forward_hook(self.other)

    def multiplied(self, module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            kernel = module.kernel_size[0] * module.kernel_size[1] * module.in_channels // module.groups
            self.macs += output.numel() * kernel
        else:
            self.macs += module.weight.numel()
            self.flops += module.bias.numel()

    def other(self, module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, nn.MaxPool2d):
            self.flops += module.kernel_size**2 * output.numel()
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            side = inputs[0].shape[-1]
            self.flops += side**2 * output.numel()
        else:
            self.flops += inputs[0].numel()


def counted_by_hooks(network: str, encoding: list[int], resolution: int) -> metapruning.Cost:
    # The functional calls of the MobileNets, and the adaptive pool of the ResNets, escaped the original counter.
    resnet = network.startswith("resnet")
    others = (nn.ReLU, nn.MaxPool2d) if resnet else (nn.AdaptiveAvgPool2d,)
    with torch.device("meta"):
        model = PlainNetwork(network, encoding).eval()
        counter = Counter(model, (nn.BatchNorm2d, *others))
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.ReLU, nn.ReLU6)):  # they keep the shape; hooks run all the same
                module.forward = lambda x: x
        with torch.no_grad():
            model(torch.empty(1, 3, resolution, resolution))
    return metapruning.Cost(counter.macs + counter.flops, counter.macs, sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("count", [30, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("network", SEARCHED)
def test_arithmetic_equals_counting_on_the_built_network(network: str, count: int) -> None:
    description = describe(network)
    rng = np.random.default_rng(count)
    population = rng.integers(31, size=(count, len(description.genes)))
    resolutions = rng.integers(1, 100, size=count)
    resolutions[: count // 2] = description.resolution
    for encoding, resolution in zip(population.tolist(), resolutions.tolist()):
        assert cost(network, encoding, resolution) == counted_by_hooks(network, encoding, resolution)


@pytest.mark.parametrize("network", SEARCHED)
def test_a_population_costs_what_its_encodings_cost(network: str) -> None:
    population = np.random.default_rng(1).integers(31, size=(20, len(describe(network).genes)))
    together = costs(network, population, 64, num_classes=7)
    for i, encoding in enumerate(population.tolist()):
        alone = cost(network, encoding, 64, num_classes=7)
        assert (together.flops[i], together.macs[i], together.parameters[i]) == (
            alone.flops,
            alone.macs,
            alone.parameters,
        )


@pytest.mark.parametrize("network", ["resnet20", "resnet50", "mobilenet_v2"])
def test_a_hundred_thousand_encodings_a_second(network: str) -> None:
    population = np.random.default_rng(0).integers(31, size=(20_000, len(describe(network).genes)))

    def seconds(function: Callable[..., Any]) -> float:
        started = time.process_time()  # other processes do not count
        function(network, population)
        return time.process_time() - started

    assert 20_000 / min(seconds(costs) for _ in range(5)) >= 1e5


def test_genes_are_stage_outputs_then_middles() -> None:
    for network, genes in GENES.items():
        assert len(describe(network).genes) == genes
    names = describe("resnet20").genes
    assert names[:4] == ("stage1", "stage2", "stage3", "layer1.0.middle")
    assert describe("resnet50").genes[:5] == ("stem", "stage1", "stage2", "stage3", "layer1.0.middle")
    # A stage's gene is that of all its blocks; ResNet-50's last stage keeps its width.
    model = PlainNetwork("resnet50", [0] * 20)
    assert model.fc.in_features == 2048
    assert {block.conv3.out_channels for block in model.layer2} == {51}


@given(st.integers(1, 4096), st.integers(0, 30))
def test_channels_are_the_integer_part_of_the_share(maximum: int, choice: int) -> None:
    exactly = (maximum * (10 + 3 * choice)) // 100
    assert Width(maximum, 1).channels((0, choice)) == exactly
    assert Width(maximum).channels((0, choice)) == maximum
    population = np.array([[0, choice]])
    assert Width(maximum, 1).channels_of_all(population).tolist() == [exactly]


def test_channels_of_all_searched_widths_are_those_of_the_floating_point_formula() -> None:
    widths = {
        width
        for network in SEARCHED
        for layer in describe(network).layers()
        for width in (layer.conv.inputs, layer.conv.outputs)
        if width.gene is not None
    }
    for width in widths:
        for choice in range(31):
            encoding = [choice] * 64
            assert width.channels(encoding) == int(width.maximum * SCALES[choice])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_an_encoding_as_text_comes_back(genes: list[int]) -> None:
    assert from_text(as_text(genes)) == tuple(genes)


@pytest.mark.parametrize("text", ["", "31", "1--2", "1-x", "-1", "1.5", "²"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="genes from 0 to 30"):
        from_text(text)


def test_the_nearest_choice() -> None:
    assert [nearest_choice(share) for share in (0, 0.1, 0.5, 0.55, 1, 2)] == [0, 0, 13, 15, 30, 30]


def test_wrong_encodings_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="resnet20 has 12 genes, got 11"):
        cost("resnet20", [0] * 11)
    with pytest.raises(ValueError, match="from 0 to 30, got 0 to 31"):
        cost("resnet20", [0] * 11 + [31])
    with pytest.raises(ValueError, match="integers from 0 to 30, got float64"):
        costs("resnet20", np.zeros((2, 12)))
    with pytest.raises(ValueError, match="resnet20 has 12 genes, got 3 genes"):
        costs("resnet20", np.zeros((2, 3), dtype=int))
    with pytest.raises(ValueError, match=r"no encodings of 'vgg'.*resnet20.*mobilenet_v2_cifar"):
        cost("vgg", [0])
    with pytest.raises(ValueError, match="at least 1 pixel, got 0"):
        cost("resnet20", [0] * 12, 0)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        cost("resnet20", [0] * 12, num_classes=0)
