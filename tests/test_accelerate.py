"""Networks masked by torch.nn.utils.prune or by classes of their own, converted: the same outputs and gradients."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from fastprune import FilterPruner, accelerate
from fastprune.nn import MaskedConv2d


def network(kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [kind(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), kind(8, 6, 3, stride=2), nn.Conv2d(6, 4, 1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5)).double()


def outcome(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients by the parameters' order of making, whatever they are called."""
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = model(images)
    model.zero_grad()
    output.square().sum().backward()
    return output.detach(), [p.grad for p in sorted(model.parameters(), key=lambda p: tuple(p.shape))]


def pruned(structured: bool) -> nn.Sequential:
    model = network()
    outcome(model)  # makes the lazy layer
    for layer in (model[0], model[3]):
        if structured:
            prune.ln_structured(layer, "weight", 0.5, n=1, dim=0)
        else:
            prune.l1_unstructured(layer, "weight", 0.5)
    return model


@pytest.mark.parametrize("structured", [True, False])
def test_computes_the_same(structured: bool) -> None:
    model = pruned(structured)
    output, gradients = outcome(model)
    layers = accelerate(model)
    assert list(layers) == ["0", "3"]
    assert layers["0"].mask.shape == ((8,) if structured else (8, 3, 3, 3))
    after, after_gradients = outcome(model)
    torch.testing.assert_close(after, output)
    for gradient, before in zip(after_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, before)


def test_nothing_of_the_other_is_left() -> None:
    model = pruned(structured=True)
    accelerate(model)
    assert not model[0]._forward_pre_hooks
    assert not any(name.endswith(("_orig", "weight_mask")) for name in model.state_dict())
    assert not prune.is_pruned(model[0])
    assert isinstance(model[0], MaskedConv2d)
    assert type(model[4]) is nn.Conv2d


def test_optimizers_stay_valid_and_pruners_go_on() -> None:
    model = pruned(structured=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerate(model)
    before = model[0].weight.detach().clone()
    outcome(model)
    optimizer.step()
    mask = model[0].mask
    assert (model[0].weight != before).flatten(1).any(1)[mask].all()
    assert torch.equal(model[0].weight[~mask], before[~mask])
    assert FilterPruner(model, 0.5, every=1).kept()["0"] > 0


@pytest.mark.parametrize("order", [0, 1])
def test_pruned_again_and_again_and_of_both_kinds(order: int) -> None:
    model = pruned(structured=True)
    layers = [model[0], model[3]][:: 1 if order == 0 else -1]
    prune.l1_unstructured(layers[0], "weight", 0.3)  # torch keeps a list of two masks' makers
    output, gradients = outcome(model)
    assert all(layer.mask.dim() == 4 for layer in accelerate(model).values())
    assert not model[0]._forward_pre_hooks
    after, after_gradients = outcome(model)
    torch.testing.assert_close(after, output)
    for gradient, before in zip(after_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, before)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("index", [0, 3])
def test_beside_layers_that_are_masked_already(structured: bool, index: int) -> None:
    model = network()
    outcome(model)
    FilterPruner(model, 0.5, every=1, include=[model[3 - index]], feedback="straight-through")
    if structured:
        prune.ln_structured(model[index], "weight", 0.5, n=1, dim=0)
    else:
        prune.l1_unstructured(model[index], "weight", 0.5)
    output, gradients = outcome(model)
    assert list(accelerate(model)) == [str(index)]
    after, after_gradients = outcome(model)
    torch.testing.assert_close(after, output)
    for gradient, before in zip(after_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, before)


class OwnConv2d(nn.Conv2d):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.register_buffer("keep", (torch.rand_like(self.weight) < 0.5).to(self.weight.dtype))

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight * self.get_buffer("keep")
        return functional.conv2d(input, weight, self.bias, self.stride, self.padding)


def test_classes_with_a_mask_of_their_own() -> None:
    model = network(OwnConv2d)
    output, gradients = outcome(model)
    layers = accelerate(model, mask_name="keep", classes=[OwnConv2d])
    assert list(layers) == ["0", "3"]
    after, after_gradients = outcome(model)
    torch.testing.assert_close(after, output)
    for gradient, before in zip(after_gradients, gradients, strict=True):
        torch.testing.assert_close(gradient, before)


def test_what_cannot_be_converted_is_left_as_it_was() -> None:
    model = pruned(structured=True)
    prune.l1_unstructured(model[6], "weight", 0.5)
    with pytest.raises(ValueError, match=r"the weight of 6 \(Linear\): only weights of Conv2d"):
        accelerate(model)
    prune.remove(model[6], "weight")
    prune.l1_unstructured(model[4], "bias", 0.5)
    with pytest.raises(ValueError, match=r"the bias of 4 \(Conv2d\)"):
        accelerate(model)
    assert prune.is_pruned(model[0])
    with pytest.raises(ValueError, match=r"no convolution that torch\.nn\.utils\.prune has masked"):
        accelerate(network())
    soft = network(OwnConv2d)
    soft[0].keep.fill_(0.5)
    with pytest.raises(ValueError, match=r"the mask of 0 must hold 0 and 1 .* got \[8, 3, 3, 3\] with 0.5 to 0.5"):
        accelerate(soft, mask_name="keep", classes=[OwnConv2d])
    with pytest.raises(ValueError, match=r"0 \(OwnConv2d\) has no buffer 'mask'"):
        accelerate(soft, classes=[OwnConv2d])
