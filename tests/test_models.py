"""The networks have the published sizes, the right shapes and gradients everywhere."""

from typing import Any

import pytest
import torch
from torch import nn

from fastprune import FilterPruner, models
from fastprune.metapruning import describe
from fastprune.models.resnet import cifar_resnet

CIFAR = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convs(model: nn.Module) -> list[nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def sizes(name: str, **options: Any) -> tuple[int, int, int]:
    with torch.device("meta"):
        model = models.create(name, **options)
    return parameter_count(model), len(convs(model)), sum(c.out_channels for c in convs(model))


# A CIFAR ResNet-(6n+2) with option B by hand: 6n + 3 convs; filters 16 + 2n(16 + 32 + 64) + 32 + 64.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", (272_474, 21, 784)),
        ("resnet32", (466_906, 33, 1232)),
        ("resnet44", (661_338, 45, 1680)),
        ("resnet56", (855_770, 57, 2128)),
        ("resnet110", (1_730_714, 111, 4144)),
    ],
)
def test_cifar_resnets_have_the_sizes_of_the_paper(name: str, expected: tuple[int, int, int]) -> None:
    assert sizes(name) == expected


@pytest.mark.parametrize(
    ("name", "parameters"),  # as torchvision's documentation of the pretrained weights gives them
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_imagenet_resnets_have_the_published_sizes(name: str, parameters: int) -> None:
    assert sizes(name, num_classes=1000, stem="imagenet")[0] == parameters


def test_the_cifar_stem_keeps_the_filters_of_resnet50() -> None:
    _, conv_count, filters = sizes("resnet50")
    assert (conv_count, filters) == (53, 26_560)
    assert sizes("resnet50", stem="imagenet")[1:] == (53, 26_560)


def test_cifar_stem_is_a_3x3_convolution_with_stride_1_and_no_pooling() -> None:
    model: Any = models.create("resnet18")
    stem = model.conv1
    assert (stem.kernel_size, stem.stride, stem.padding, stem.bias) == ((3, 3), (1, 1), (1, 1), None)
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())
    seen: list[torch.Size] = []
    model.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(torch.zeros(2, 3, 32, 32))
    assert seen == [(2, 64, 32, 32)]


def test_imagenet_stem_divides_by_4() -> None:
    model: Any = models.create("resnet18", stem="imagenet")
    seen: list[torch.Size] = []
    model.layer1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(torch.zeros(2, 3, 64, 64))
    assert seen == [(2, 64, 16, 16)]


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50"])
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 33, 17), (2, 7, 5)])
def test_any_image_size_gives_one_row_of_logits(name: str, shape: tuple[int, int, int]) -> None:
    batch, height, width = shape
    model = models.create(name, num_classes=7).eval()
    with torch.no_grad():
        logits = model(torch.randn(batch, 3, height, width))
    assert logits.shape == (batch, 7)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_the_three_stages_have_16_32_64_channels_and_halve_the_image() -> None:
    model: Any = models.create("resnet20")
    x = model.relu(model.bn1(model.conv1(torch.randn(2, 3, 32, 32))))
    for stage, expected in (("layer1", (16, 32, 32)), ("layer2", (32, 16, 16)), ("layer3", (64, 8, 8))):
        x = getattr(model, stage)(x)
        assert x.shape == (2, *expected)


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50"])
def test_gradient_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = models.create(name)
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.arange(4))
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_the_same_seed_gives_the_same_weights(name: str) -> None:
    torch.manual_seed(3)
    first = models.create(name).state_dict()
    torch.manual_seed(3)
    second = models.create(name).state_dict()
    other = models.create(name).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("name", ["resnet56", "resnet18"])
def test_convolutions_start_kaiming_normal_by_fan_out(name: str) -> None:
    torch.manual_seed(0)
    for conv in convs(models.create(name)):
        fan_out = conv.out_channels * conv.kernel_size[0] * conv.kernel_size[1]
        expected = (2 / fan_out) ** 0.5
        tolerance = 4 * expected / (2 * conv.weight.numel()) ** 0.5  # four standard errors of a deviation
        assert abs(conv.weight.std(unbiased=False).item() - expected) < tolerance


def test_shortcuts_are_projections_only_where_the_shape_changes() -> None:
    shortcuts = [m for m in convs(models.create("resnet20")) if m.kernel_size == (1, 1)]
    assert [(m.in_channels, m.out_channels, m.stride) for m in shortcuts] == [
        (16, 32, (2, 2)),
        (32, 64, (2, 2)),
    ]


@pytest.mark.parametrize("name", CIFAR)
def test_imagenet_stem_on_a_cifar_network_says_what_to_do(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .*no ImageNet stem.*stem='cifar'.*resnet50"):
        models.create(name, stem="imagenet")


def test_wrong_arguments_name_the_choices() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'resnet21'.*resnet20.*resnet152"):
        models.create("resnet21")
    unknown: Any = "tiny"
    with pytest.raises(ValueError, match="unknown stem 'tiny'"):
        models.create("resnet20", stem=unknown)
    with pytest.raises(ValueError, match="num_classes must be at least 1, not 0"):
        models.create("resnet20", num_classes=0)
    with pytest.raises(ValueError, match=r"6n \+ 2.*not 21"):
        cifar_resnet(21, 10)


def test_names_all_build() -> None:
    larger = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
    assert (*CIFAR, *larger, "mobilenet_v1", "mobilenet_v2") == models.NAMES
    for name in models.NAMES:
        assert sizes(name)[0] > 0


@pytest.mark.parametrize(
    ("name", "millions"),  # Howard et al., table 4; Sandler et al., table 4, whose 1.4 has wider ends: 6.9 M
    [("mobilenet_v1", 4.2), ("mobilenet_v2", 5.3)],
)
def test_mobilenets_have_their_sizes(name: str, millions: float) -> None:
    assert round(sizes(name, num_classes=1000, stem="imagenet")[0] / 1e6, 1) == millions


@pytest.mark.parametrize(("name", "sides"), [("mobilenet_v1", (2, 7)), ("mobilenet_v2", (4, 7))])
def test_mobilenets_have_the_strides_of_their_stem(name: str, sides: tuple[int, int]) -> None:
    seen: list[int] = []
    for stem, pixels in (("cifar", 32), ("imagenet", 224)):
        with torch.device("meta"):
            model: Any = models.create(name, stem=stem)  # type: ignore[arg-type]
            model.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
            assert model(torch.zeros(1, 3, pixels, pixels)).shape == (1, 10)
    assert seen == list(sides)


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_gradient_reaches_every_parameter_of_a_mobilenet(name: str) -> None:
    torch.manual_seed(0)
    narrow = models.create(name, encoding=[5] * len(describe(name).genes))
    loss = nn.functional.cross_entropy(narrow(torch.randn(8, 3, 32, 32)), torch.arange(8))
    loss.backward()
    for key, parameter in narrow.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 0, key


def test_inverted_residuals_add_their_input_only_within_a_stage() -> None:
    shortcuts = [block.shortcut for block in describe("mobilenet_v2").blocks]
    # Stages of 1, 2, 3, 4, 3, 3 and 1 blocks between the stem and the last convolution.
    starts = {1, 2, 4, 7, 11, 14, 17}
    assert [i for i, shortcut in enumerate(shortcuts) if shortcut == "identity"] == [
        i for i in range(1, 18) if i not in starts
    ]


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_the_widest_encoding_is_the_network_itself(name: str) -> None:
    torch.manual_seed(0)
    plain = models.create(name).state_dict()
    torch.manual_seed(0)
    widest = models.create(name, encoding=[30] * len(describe(name).genes)).state_dict()
    assert list(plain) == list(widest)
    assert all(torch.equal(plain[key], widest[key]) for key in plain)


def test_the_widest_resnet50_has_the_tensors_of_torchvisions() -> None:
    for stem in ("cifar", "imagenet"):
        with torch.device("meta"):
            plain = models.create("resnet50", stem=stem).state_dict()  # type: ignore[arg-type]
            widest = models.create("resnet50", stem=stem, encoding=[30] * 20).state_dict()  # type: ignore[arg-type]
        assert [(key, value.shape) for key, value in plain.items()] == [
            (key, value.shape) for key, value in widest.items()
        ]


def test_an_encoding_may_stand_behind_the_name() -> None:
    encoding = [15, 3, 30, 0, 8, 8, 8, 8, 8, 8, 8, 12]
    name = "resnet20@15-3-30-0-8-8-8-8-8-8-8-12"
    assert models.exists(name)
    assert not any(map(models.exists, ("resnet20@", "resnet20@1-x", "resnet18@1", "resnet21")))
    torch.manual_seed(0)
    by_name = models.create(name, num_classes=3)
    torch.manual_seed(0)
    by_argument = models.create("resnet20", num_classes=3, encoding=encoding)
    assert [p.shape for p in by_name.parameters()] == [p.shape for p in by_argument.parameters()]
    assert by_name(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    convolution: Any = by_name.get_submodule("layer1.0.conv1")
    assert (convolution.in_channels, convolution.out_channels) == (int(16 * 0.55), int(16 * 0.10))


def test_wrong_encodings_say_what_is_wrong() -> None:
    assert "resnet20@1-2-x" not in models.NAMES
    assert "resnet18@1" not in models.NAMES
    with pytest.raises(ValueError, match="resnet20 has 12 genes, got 2"):
        models.create("resnet20@1-2")
    with pytest.raises(ValueError, match=r"no encodings of 'resnet18': choose one of resnet20"):
        models.create("resnet18@1-2")
    with pytest.raises(ValueError, match="genes from 0 to 30"):
        models.create("resnet20@1-31")
    with pytest.raises(ValueError, match="another one was given"):
        models.create("resnet20@1-2", encoding=[1])


@pytest.mark.parametrize("name", ["mobilenet_v1", "mobilenet_v2"])
def test_filters_of_mobilenets_can_be_pruned(name: str) -> None:
    model = models.create(name, encoding=[5] * len(describe(name).genes))
    pruner = FilterPruner(model, rate=0.5, every=1)
    filters = sum(conv.out_channels for conv in convs(model))
    assert 0.45 * filters < sum(pruner.kept().values()) < 0.55 * filters
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)
