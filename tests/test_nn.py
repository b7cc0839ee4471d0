"""MaskedConv2d: what it computes, what it keeps of Conv2d, and that a model masks all of them in one op."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from fastprune import Decorrelation, FilterPruner, MaskedConv2d, WeightPruner, models
from fastprune.nn import mask_convolutions


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, stride=2),
        nn.Flatten(),
    )


def set_masks(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, MaskedConv2d):
            module.mask.copy_(torch.rand(module.mask.shape, generator=generator) > 0.5)


def filter_pruner(model: nn.Module, **arguments: Any) -> FilterPruner:
    return FilterPruner(model, 0.5, **arguments)


def expanded(conv: MaskedConv2d) -> Tensor:
    return conv.mask if conv.mask.dim() > 1 else conv.mask.view(-1, 1, 1, 1)


@pytest.mark.parametrize("by_weight", [False, True])
def test_forward_convolves_with_the_masked_weight(by_weight: bool) -> None:
    model, images = small_model(), torch.randn(4, 3, 9, 7)
    mask_convolutions(model, by_weight=by_weight)
    set_masks(model)
    masked = copy.deepcopy(model)
    for module in masked.modules():
        if isinstance(module, MaskedConv2d):
            with torch.no_grad():
                module.weight *= expanded(module)
            module.mask.fill_(True)
    torch.testing.assert_close(model(images), masked(images))
    # A convolution on its own masks itself.
    torch.testing.assert_close(
        model[0](images), functional.conv2d(images, model[0].weight * expanded(model[0]), padding=1)
    )


def test_the_gradient_is_straight_through() -> None:
    model, images = small_model(), torch.randn(4, 3, 9, 9)
    mask_convolutions(model)
    set_masks(model)
    model(images).square().sum().backward()
    weight = (model[0].weight * expanded(model[0])).detach().requires_grad_()
    hidden = functional.relu(
        functional.batch_norm(functional.conv2d(images, weight, padding=1), None, None, training=True)
    )
    other = (model[3].weight * expanded(model[3])).detach().requires_grad_()
    functional.conv2d(hidden, other, model[3].bias, stride=2).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, weight.grad)
    torch.testing.assert_close(model[3].weight.grad, other.grad)
    assert model[3].weight.grad[~model[3].mask].abs().sum() > 0, "a pruned filter must be fed back"


@pytest.mark.parametrize("feedback", ["straight-through", "none"])
def test_gradient_of_single_weights(feedback: str) -> None:
    conv = nn.Sequential(nn.Conv2d(2, 3, 3))
    WeightPruner(conv, 0.5, every=1, feedback=feedback)
    conv[0](torch.randn(2, 2, 5, 5)).square().sum().backward()
    pruned, grad = ~conv[0].mask, conv[0].weight.grad
    assert pruned.any()
    assert grad[~pruned].ne(0).all()
    assert grad[pruned].eq(0).all() if feedback == "none" else grad[pruned].ne(0).all()


def test_it_keeps_parameters_and_state_dict_keys() -> None:
    model = small_model()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    layers = mask_convolutions(model)
    assert list(layers) == ["0", "3"]
    assert [key for key in model.state_dict() if not key.endswith("mask")] == keys
    assert [key for key in model.state_dict() if key.endswith("mask")] == ["0.mask", "3.mask"]
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    other = small_model()
    mask_convolutions(other)
    set_masks(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other[3].mask, model[3].mask)
    assert not model[3].mask.all()


def test_nothing_is_pruned_at_first() -> None:
    model, images = small_model(), torch.randn(2, 3, 8, 8)
    before = model(images)
    mask_convolutions(model)
    torch.testing.assert_close(model(images), before)


def test_deepcopy_is_independent() -> None:
    model, images = small_model().eval(), torch.randn(2, 3, 8, 8)
    mask_convolutions(model)
    set_masks(model)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(images), model(images), rtol=0, atol=0)
    before = model(images)
    twin[0].mask.fill_(False)
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)
    assert not torch.equal(twin(images), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_masks_in_the_compute_dtype(dtype: torch.dtype) -> None:
    model, images = small_model(), torch.randn(4, 3, 9, 9)
    FilterPruner(model, 0.4, every=1)
    with torch.profiler.profile() as profile, torch.autocast("cpu", dtype):
        out = model(images)
    assert out.dtype == dtype
    casts = sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")
    # The weights come out of the op in the compute dtype: what is cast is the input, the bias and no weight.
    assert casts <= 3
    out.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    reference = model(images)
    torch.testing.assert_close(out.float(), reference, rtol=0.05, atol=0.05)


def test_half_precision_models_keep_working() -> None:
    model = small_model()
    FilterPruner(model, 0.4, every=1)
    model.to(torch.bfloat16)
    model(torch.randn(4, 3, 9, 9, dtype=torch.bfloat16)).float().sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16


def test_channels_last() -> None:
    model, images = small_model().eval(), torch.randn(2, 3, 8, 8)
    mask_convolutions(model)
    set_masks(model)
    before = model(images)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images.contiguous(memory_format=torch.channels_last)), before)


def test_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    model = small_model()
    pruner = FilterPruner(model, 0.7, every=1)
    images = torch.randn(4, 3, 9, 9)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            model.zero_grad()
            expected = model(images)
            expected.square().sum().backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters()]
            model.zero_grad()
            out = compiled(images)
            out.square().sum().backward()
            torch.testing.assert_close(out, expected)
            for parameter, gradient in zip(model.parameters(), gradients):
                torch.testing.assert_close(parameter.grad, gradient)
            with torch.no_grad():  # other filters are the least important now
                model[0].weight.copy_(model[0].weight.roll(1, 0))
            before = model[0].mask.clone()
            pruner.step()  # new masks must not compile anew
            assert not torch.equal(before, model[0].mask)


def test_what_cannot_be_masked() -> None:
    class Padded(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(functional.pad(input, (1, 0, 1, 0)))

    with pytest.raises(TypeError, match=r"1 is a Padded.*ignore"):
        mask_convolutions(nn.Sequential(nn.Conv2d(3, 3, 1), Padded(3, 3, 2)))
    assert list(mask_convolutions(nn.Sequential(nn.Conv2d(3, 3, 1), Padded(3, 3, 2)), ignore=["1"])) == ["0"]
    with pytest.raises(ValueError, match="no Conv2d"):
        mask_convolutions(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="'layer9' is no module"):
        mask_convolutions(small_model(), ignore=["layer9"])


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        *((call, argument) for call in (mask_convolutions, filter_pruner) for argument in ("ignore", "include")),
        (Decorrelation, "ignore"),
    ],
)
def test_lists_of_modules(call: Callable[..., object], argument: str) -> None:
    model = small_model()
    before = {name: type(module) for name, module in model.named_modules()}
    for entries, error, message in (
        ("0", TypeError, r"must be a list of names or modules, got the string '0'; write \['0'\]"),
        (model[0], TypeError, r"must be a list of names or modules, got a Conv2d; write \[module\]"),
        (["0", 3], TypeError, "must be a list of names or modules, got 3 in it"),
        (["3", "conv1"], ValueError, "'conv1' is no module of this model"),
        ([nn.Conv2d(3, 8, 3)], ValueError, "a Conv2d is no module of this model"),
    ):
        with pytest.raises(error, match=rf"^{argument}:? {message}"):
            call(model, **{argument: entries})
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_layer_without_a_shape() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyConv2d(4, 3))
    with pytest.raises(TypeError, match=r"^1 has no shape yet: call the model once on an input, then mask it"):
        mask_convolutions(model)
    assert type(model[0]) is nn.Conv2d, "nothing is changed"
    assert list(mask_convolutions(copy.deepcopy(model), ignore=["1"])) == ["0"]
    model(torch.randn(1, 3, 9, 9))
    assert list(mask_convolutions(model)) == ["0", "1"]


def test_a_dtype_without_masks() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, dtype=torch.complex64))
    with pytest.raises(
        TypeError, match=r"the weight of 1 has dtype complex64: masked are float32, .* list others in ignore"
    ):
        mask_convolutions(model)
    assert type(model[0]) is nn.Conv2d, "nothing is changed"


@pytest.mark.parametrize("by_weight", [False, True])
def test_layers_of_different_dtypes(by_weight: bool) -> None:
    model, images = small_model(), torch.randn(4, 3, 9, 7)
    model[3].bfloat16()
    model.insert(3, ToBfloat16())
    mask_convolutions(model, by_weight=by_weight)
    set_masks(model)
    hidden = model[:3](images).bfloat16()
    expected = functional.conv2d(hidden, model[4].weight * expanded(model[4]), model[4].bias, stride=2)
    assert expected.dtype == torch.bfloat16
    torch.testing.assert_close(model(images), expected.flatten(1))
    model(images).sum().backward()
    assert [model[i].weight.grad.dtype for i in (0, 4)] == [torch.float32, torch.bfloat16]


class ToBfloat16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


# ------------------------------------------------------------------------------------------------- the device `meta`


@pytest.mark.parametrize("by_weight", [False, True])
@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_feedback_of_a_model_made_on_meta(way: str, by_weight: bool) -> None:
    real, images = small_model(), torch.randn(4, 3, 9, 9)
    with torch.device("meta"):
        model = small_model()
    for each in (real, model):
        for layer in mask_convolutions(each, by_weight=by_weight).values():
            layer.fill_feedback(0.25)
    set_masks(real)
    if way == "to_empty":
        model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict(), assign=way == "assign")
    assert model[0].feedback.tolist() == real[0].feedback.tolist()
    for each in (real, model):
        each(images).square().sum().backward()
    for parameter, other in zip(model.parameters(), real.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_feedback_on_another_device_is_named() -> None:
    model = small_model()
    mask_convolutions(model)
    model[0].feedback = torch.ones(8, device="meta")
    with pytest.raises(
        RuntimeError, match=r"^masked_weights: feedback must be on the device of weights \(cpu\), got meta"
    ):
        model(torch.randn(4, 3, 9, 9))


def test_ignore_takes_names_prefixes_and_modules() -> None:
    model = models.create("resnet20")
    layers = mask_convolutions(model, ignore=["layer1", model.conv1])
    assert "conv1" not in layers
    assert not any(name.startswith("layer1.") for name in layers)
    assert len(layers) == 21 - 1 - 6


@pytest.mark.parametrize("first_by_weight", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_that_are_masked_unlike_each_other(first_by_weight: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    model, images = small_model(), torch.randn(4, 3, 9, 9)
    names = ["0", "3"]
    by_weight, by_filter = names if first_by_weight else reversed(names)
    mask_convolutions(model, by_weight=True, include=[by_weight])
    mask_convolutions(model, include=[by_filter])
    set_masks(model)
    conv = model.get_submodule(by_filter)
    conv.feedback = torch.full((len(conv.mask),), 0.25)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name in names:
            copied.get_submodule(name).weight *= expanded(model.get_submodule(name))
            copied.get_submodule(name).mask.fill_(True)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    out, expected = run(images), copied(images)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(model.get_submodule(by_weight).weight.grad, copied.get_submodule(by_weight).weight.grad)
    scale = torch.where(expanded(conv), 1, 0.25)
    torch.testing.assert_close(conv.weight.grad, copied.get_submodule(by_filter).weight.grad * scale)


@pytest.mark.parametrize("without", ["0", "3"])
def test_feedback_of_some_layers_alone(without: str) -> None:
    model, images = small_model(), torch.randn(4, 3, 9, 9)
    layers = mask_convolutions(model)
    for layer in layers.values():
        layer.mask[:4] = False
    nn.init.ones_(model[1].bias)  # a pruned filter's output, 0, would be on the edge of the ReLU
    (other,) = (layer for name, layer in layers.items() if name != without)
    other.feedback = torch.zeros(len(other.mask))
    model(images).square().sum().backward()
    assert other.weight.grad[:4].eq(0).all()
    assert layers[without].weight.grad[:4].ne(0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pruned_weights_are_exactly_zero_whatever_the_feedback(dtype: torch.dtype) -> None:
    conv = nn.Sequential(nn.Conv2d(2, 64, 3, bias=False)).to(dtype)
    layer = mask_convolutions(conv, by_weight=True)["0"]
    layer.mask.fill_(False)
    layer.feedback = torch.tensor(1e-5**0.5)
    out = conv(torch.randn(2, 2, 5, 5, dtype=dtype))
    assert out.eq(0).all()
    out.sum().backward()
    assert layer.weight.grad.ne(0).any()


@pytest.mark.parametrize(
    "reparametrise",
    [
        lambda conv: prune.l1_unstructured(conv, "weight", 0.5),
        nn.utils.spectral_norm,
    ],
    ids=["prune", "spectral_norm"],
)
def test_weights_that_a_hook_makes_are_not_taken(reparametrise: Callable[[nn.Module], object]) -> None:
    model = small_model()
    reparametrise(model[3])
    with pytest.raises(TypeError, match=r"the weight of 3 is no parameter .* fastprune\.accelerate"):
        FilterPruner(model, 0.5, removable_only=False)
    assert type(model[0]) is nn.Conv2d, "nothing is changed"
    assert list(FilterPruner(model, 0.5, ignore=["3"]).layers) == ["0"]


def test_what_ignore_and_include_leave_is_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="ignore and include leave no Conv2d to mask"):
        mask_convolutions(model, ignore=["0"])
    assert type(model[0]) is nn.Conv2d
