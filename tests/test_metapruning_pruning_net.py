"""A PruningNet's networks are those of the encodings, and its weights are learned through what it generates."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastprune.metapruning import PlainNetwork, PruningNet, describe
from fastprune.metapruning.description import Block, Conv, Description
from fastprune.metapruning.encoding import SCALES, Width
from fastprune.metapruning.hyper import HyperConv2d, WidthBatchNorm2d

CIFAR = ("resnet20", "resnet56", "mobilenet_v1_cifar", "mobilenet_v2_cifar")
GENES = 3
STEM, MIDDLE, OUT = Width(10, 0), Width(12, 1), Width(20, 2)
# Every kind of layer, and small.
TINY = Description(
    "tiny",
    ("stem", "middle", "out"),
    (
        Block("", (Conv(Width(3), STEM, 3),), (STEM,), pooled=True),
        Block(
            "layer1.0",
            (Conv(STEM, MIDDLE, 1), Conv(MIDDLE, MIDDLE, 3, 2, depthwise=True), Conv(MIDDLE, OUT, 1, activated=False)),
            (MIDDLE, STEM, OUT),
            Conv(STEM, OUT, 1, 2, activated=False),
            activated=True,
        ),
        Block("layer1.1", (Conv(OUT, OUT, 3, activated=False),), (OUT, OUT), "identity"),
    ),
    resolution=12,
    num_classes=5,
)


def random_encoding(genes: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(31, size=genes).tolist())


def test_hyper_convolution_is_the_formula() -> None:
    torch.manual_seed(0)
    hyper = HyperConv2d(Conv(STEM, OUT, 3, 2), (OUT, STEM, Width(7)), GENES, 6)
    encoding = (13, 4, 21)
    hyper.encoding = encoding
    hyper.table = torch.tensor([*(SCALES[choice] for choice in encoding), 1.0])
    x = torch.randn(2, STEM.channels(encoding), 9, 9)
    scales = torch.tensor([SCALES[21], SCALES[13], 1.0])
    hidden = functional.relu(hyper.fc1.weight @ scales + hyper.fc1.bias)
    every = (hyper.fc2.weight @ hidden + hyper.fc2.bias).view(20, 10, 3, 3)
    expected = functional.conv2d(x, every[: OUT.channels(encoding), : STEM.channels(encoding)], None, 2, 1)
    torch.testing.assert_close(hyper(x), expected)
    # Gradients reach both layers, but of the second only the rows in the slice.
    hyper(x).square().sum().backward()
    assert hyper.fc1.weight.grad is not None
    assert hyper.fc1.weight.grad.abs().sum() > 0
    assert hyper.fc2.weight.grad is not None
    rows = hyper.fc2.weight.grad.view(20, 10, 9, 6).abs().sum((2, 3)) > 0
    assert rows[: OUT.channels(encoding), : STEM.channels(encoding)].all()
    assert rows.sum() == OUT.channels(encoding) * STEM.channels(encoding)


def test_batch_norm_keeps_statistics_for_each_width() -> None:
    norm = WidthBatchNorm2d(Width(10, 0))
    x = torch.randn(8, 1, 4, 4) * 3 + 2
    norm.encoding = (0,)
    norm(x)
    mean, var = norm.statistics()
    torch.testing.assert_close(mean, 0.1 * x.mean().reshape(1))
    torch.testing.assert_close(var, 0.9 + 0.1 * x.var().reshape(1))
    norm.encoding = (30,)
    mean, var = norm.statistics()
    assert (mean.tolist(), var.tolist()) == ([0.0] * 10, [1.0] * 10)
    assert not list(norm.parameters())
    assert WidthBatchNorm2d(Width(10)).running_mean.shape == (1, 10)


@pytest.mark.parametrize("network", CIFAR)
def test_widths_are_those_of_the_plain_network(network: str) -> None:
    encoding = random_encoding(len(describe(network).genes), 3)
    pruning, plain = PruningNet(network), PlainNetwork(network, encoding)
    candidate = pruning.candidate(encoding)
    shapes = {name: module.weight.shape for name, module in plain.named_modules() if isinstance(module, nn.Conv2d)}
    generated = {name: m.weight.shape for name, m in candidate.named_modules() if isinstance(m, nn.Conv2d)}
    assert generated == shapes
    strides = [(m.stride, m.padding, m.groups) for m in plain.modules() if isinstance(m, nn.Conv2d)]
    assert strides == [(m.stride, m.padding, m.groups) for m in candidate.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        assert pruning(torch.randn(2, 3, 16, 16), encoding).shape == plain(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("network", [TINY, "resnet20", "mobilenet_v2_cifar"], ids=["tiny", "resnet20", "mobilenet_v2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_candidate_computes_what_the_pruning_net_does(network: str | Description, seed: int) -> None:
    torch.manual_seed(0)
    pruning = PruningNet(network)
    encoding = random_encoding(len(pruning.description.genes), seed)
    x = torch.randn(8, 3, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(pruning.candidate(encoding).train()(x), pruning.train()(x, encoding))
        same_statistics = pruning.candidate(encoding, with_statistics=True)
        torch.testing.assert_close(same_statistics.eval()(x), pruning.eval()(x, encoding))
        assert not torch.equal(pruning.candidate(encoding).eval()(x), pruning(x, encoding))  # of no statistics yet


def test_a_candidate_takes_the_mean_of_its_statistics_over_batches() -> None:
    pruning = PruningNet(TINY)
    before = {name: tensor.clone() for name, tensor in pruning.state_dict().items()}
    candidate = pruning.candidate((20, 20, 20))
    batches = torch.randn(3, 8, 3, 12, 12)
    with torch.no_grad():
        for batch in batches:
            candidate.train()(batch)
        features = torch.stack([functional.conv2d(batch, candidate.conv1.weight, padding=1) for batch in batches])
    torch.testing.assert_close(candidate.bn1.running_mean, features.mean((0, 1, 3, 4)))
    torch.testing.assert_close(candidate.bn1.running_var, torch.stack([f.var((0, 2, 3)) for f in features]).mean(0))
    after = pruning.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_encodings_begin_with_nearly_the_weights_of_one_network() -> None:
    torch.manual_seed(0)
    pruning = PruningNet("resnet20")
    name = "layer3.2.conv2"  # 64 → 64 channels
    narrow, wide = (pruning.candidate((gene,) * 12).get_submodule(name).weight for gene in (10, 30))
    both = wide[: len(narrow), : narrow.shape[1]]
    assert (narrow - both).std() < 0.2 * both.std()
    assert wide.std() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


def test_gradients_reach_every_layer() -> None:
    torch.manual_seed(0)
    pruning = PruningNet(TINY)
    functional.cross_entropy(pruning(torch.randn(8, 3, 12, 12), (9, 30, 17)), torch.arange(8) % 5).backward()
    for name, parameter in pruning.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_channels_last_and_autocast_compute_in_that_form() -> None:
    pruning = PruningNet("resnet20")
    x = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    seen: list[tuple[torch.dtype, bool]] = []
    pruning.layer2[0].conv1.register_forward_hook(
        lambda _, inputs, output: seen.append((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))
    )
    with torch.autocast("cpu", torch.bfloat16):
        pruning(x, [15] * 12).float().sum().backward()
    assert seen == [(torch.bfloat16, True)]
    assert pruning.conv1.fc2.weight.grad.dtype == torch.float32


def test_wrong_use_says_what_to_do() -> None:
    pruning = PruningNet(TINY)
    with pytest.raises(RuntimeError, match="choose an encoding first"):
        pruning(torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match="tiny has 3 genes, got 2"):
        pruning.choose((1, 2))
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        PruningNet("resnet20", 0)
