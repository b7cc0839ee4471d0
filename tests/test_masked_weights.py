"""Masked convolutions are ordinary modules, and the masked weights that an optimizer keeps for them are never stale."""

from __future__ import annotations

import copy
import io
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fake_cuda
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from fastprune import FilterPruner, MaskedConv2d, WeightPruner, optim
from fastprune import nn as masking
from fastprune.optim import PrunedSGD

IMAGES = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
PRUNERS: dict[str, Callable[[nn.Module], Any]] = {
    "filters": lambda model: FilterPruner(model, 0.4, every=1),
    "weights": lambda model: WeightPruner(model, 0.4, every=1),
}


class Network(nn.Module):
    """A block that may be checkpointed, between layers that are not."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.use_reentrant = use_reentrant
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.head = nn.Linear(8, 5)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block(x) if self.use_reentrant is None else checkpoint(self.block, x, use_reentrant=self.use_reentrant)
        return self.head((x + y).relu().mean((2, 3)))


def pruned(keep: bool = True) -> tuple[Network, FilterPruner, PrunedSGD]:
    """A network, its pruner and an optimizer that has stepped once."""
    model = Network()
    pruner = FilterPruner(model, 0.4, every=3)
    dtype = torch.float64 if keep else None
    optimizer = PrunedSGD(model.parameters(), lr=0.05, momentum=0.9, pruner=pruner, masked_dtype=dtype)
    backward(model)
    optimizer.step()
    return model, pruner, optimizer


def backward(model: nn.Module, images: Tensor = IMAGES) -> list[Tensor]:
    """The gradients of a loss."""
    model.zero_grad()
    model(images).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_same(results: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    assert len(results) == len(others) > 0
    for result, other in zip(results, others):
        torch.testing.assert_close(result, other, rtol=1e-12, atol=1e-12)


def expected(model: nn.Module) -> Tensor:
    """What the model computes with its masks multiplied into its weights."""
    plain = Network()
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if not name.endswith("mask")})
    for name, layer in model.named_modules():
        if isinstance(layer, MaskedConv2d):
            plain.get_submodule(name).weight.data.mul_(layer.mask.view(-1, 1, 1, 1))
    return plain.train(model.training)(IMAGES)


@pytest.fixture
def masked_alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a forward masks a weight itself."""
    seen: list[int] = []
    mask = masking.masked_weight

    def counted(*arguments: Any) -> Tensor:
        seen.append(1)
        return mask(*arguments)

    monkeypatch.setattr(masking, "masked_weight", counted)
    return seen


# ------------------------------------------------------------------------------------------ ordinary modules


@pytest.mark.parametrize("pruner", PRUNERS)
def test_no_hooks_and_no_state_of_a_call(pruner: str) -> None:
    """`torch.cuda.make_graphed_callables` refuses hooks, and what a call leaves is shared by all threads."""
    model = Network()
    PRUNERS[pruner](model)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    model(IMAGES)
    for name, module in model.named_modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert not module._backward_hooks
        assert vars(module).keys() == before[name].keys()
        if isinstance(module, MaskedConv2d):
            assert all(value is before[name][key] for key, value in vars(module).items())


@pytest.mark.parametrize("keep", [False, True], ids=["", "kept"])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("pruner", PRUNERS)
def test_activation_checkpointing(pruner: str, use_reentrant: bool, keep: bool) -> None:
    model, other = Network(), Network(use_reentrant)
    for each in (model, other):
        made = PRUNERS[pruner](each)
        if keep and isinstance(made, FilterPruner):
            with made.masked_weights.writing(torch.float64):
                pass
            made.masked_weights.renew()
    assert_same(backward(other), backward(model))


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_traced_model_follows_the_masks_and_trains(pruner: str) -> None:
    model = Network()
    made = PRUNERS[pruner](model)
    traced = fx.symbolic_trace(model)
    assert_same(backward(traced), backward(model))
    with torch.no_grad():
        model.stem.weight.copy_(torch.randn_like(model.stem.weight).sort(0).values)
        model.block[0].weight.mul_(3)
    before = model(IMAGES)
    made.update()
    assert not torch.equal(model(IMAGES), before)
    torch.testing.assert_close(traced(IMAGES), model(IMAGES), rtol=0, atol=0)


def test_a_feature_extractor_of_a_model_that_is_being_pruned() -> None:
    model, _, _ = pruned()
    extractor = create_feature_extractor(model, ["block", "head"])
    assert_same(list(extractor(IMAGES).values())[1:], [model(IMAGES)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantization_aware_training_of_a_model_that_is_being_pruned() -> None:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="removed from later PyTorch")
    mapping = torch.ao.quantization.get_default_qat_qconfig_mapping("x86")
    model = Network().float()
    FilterPruner(model, 0.4, every=1)
    prepared = quantize_fx.prepare_qat_fx(model.train(), mapping, (IMAGES.float(),))
    prepared(IMAGES.float()).sum().backward()
    # Only numbers on the grid of 8 bits differ from the network's.
    torch.testing.assert_close(prepared(IMAGES.float()), model(IMAGES.float()), rtol=0.1, atol=0.1)


def test_one_thread_evaluates_while_another_trains() -> None:
    """Every step has its gradients, whoever calls the model in the meantime, and they are right."""
    (model, pruner, optimizer), (other, other_pruner, other_optimizer) = pruned(), pruned()
    for each in (model, other):
        each.block[1].momentum = 0.0  # the running statistics are of no thread
    stop = threading.Event()

    def evaluate() -> None:
        with torch.no_grad():
            while not stop.is_set():
                model(IMAGES)

    thread, interval = threading.Thread(target=evaluate), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        for _ in range(60):
            assert_same(backward(model), backward(other))
            for step in (optimizer.step, pruner.step, other_optimizer.step, other_pruner.step):
                step()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


# --------------------------------------------------------------------------------- what an optimizer keeps ready


def test_steps_and_updates_leave_nothing_to_mask_in_the_forward(masked_alone: list[int]) -> None:
    model, pruner, optimizer = pruned()
    buffers = [x.data_ptr() for x in pruner.masked_weights._buffers[torch.float64]]
    masked_alone.clear()  # before the first step there are none
    updates = 0
    for _ in range(7):
        backward(model)
        assert not masked_alone
        torch.testing.assert_close(model(IMAGES), expected(model))
        optimizer.step()
        updates += pruner.step()
    assert updates > 1
    assert buffers == [x.data_ptr() for x in pruner.masked_weights._buffers[torch.float64]]


CHANGES: dict[str, Callable[[Network, FilterPruner], Any]] = {
    "a weight": lambda model, pruner: model.stem.weight.mul_(-2),
    "a mask": lambda model, pruner: model.block[0].mask.logical_not_(),
    "masks set": lambda model, pruner: pruner.set_masks({"stem": torch.arange(8) < 3}),
    "a parameter": lambda model, pruner: setattr(model.stem, "weight", nn.Parameter(torch.randn(8, 3, 3, 3).double())),
    "another layout": lambda model, pruner: model.to(memory_format=torch.channels_last),
    "a checkpoint": lambda model, pruner: model.load_state_dict(
        {name: x.roll(1, 0) if x.dim() else x for name, x in model.state_dict().items()}
    ),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_the_network_computes_with_it_and_trains(change: str, inference: bool) -> None:
    """Also where some layers alone have changed, behind others whose buffers the backward still needs."""
    model, pruner, optimizer = pruned()
    before = model(IMAGES)
    with torch.no_grad():
        CHANGES[change](model, pruner)
    with torch.inference_mode(inference):
        after = model(IMAGES).clone()
    torch.testing.assert_close(after, expected(model))
    assert change == "another layout" or not torch.allclose(after, before)
    for _ in range(3):
        backward(model)
        optimizer.step()
        pruner.step()
    torch.testing.assert_close(model(IMAGES), expected(model))


def test_a_later_layer_that_another_optimizer_steps() -> None:
    model, _, optimizer = pruned()
    other, _, other_optimizer = pruned(keep=False)
    for each, own in ((model, optimizer), (other, other_optimizer)):
        plain = torch.optim.SGD([each.block[3].weight], lr=0.01)
        for _ in range(3):
            backward(each)
            plain.step()
            backward(each)
            own.step()
    assert_same(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("how", ["deepcopy", "save", "layer"])
def test_copies_mask_by_themselves(how: str) -> None:
    model, _, optimizer = pruned()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "save":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.copy(model)
        twin._modules = dict(model._modules, stem=copy.deepcopy(model.stem))
    assert twin.stem.kept is None
    assert model.stem.kept is not None
    before = twin(IMAGES).detach()
    torch.testing.assert_close(before, model(IMAGES), rtol=0, atol=0)
    backward(model)
    optimizer.step()
    if how != "layer":
        torch.testing.assert_close(twin(IMAGES), before, rtol=0, atol=0)


def test_functional_calls_use_the_weights_they_are_given() -> None:
    model, _, _ = pruned()
    other, _, _ = pruned(keep=False)
    parameters = {name: (x.detach() * 1.5).requires_grad_() for name, x in model.named_parameters()}
    results = []
    for each in (model, other):
        loss = torch.func.functional_call(each, parameters, (IMAGES,)).square().sum()
        results.append(torch.autograd.grad(loss, list(parameters.values())))
    assert_same(*results)
    torch.testing.assert_close(model(IMAGES), expected(model))


@pytest.mark.parametrize("feedback", ["straight-through", "none"])
def test_second_derivatives(feedback: str) -> None:
    """A gradient penalty reads the gradient's graph; both ways to a masked weight have it."""
    penalties = []
    for keep in (False, True):
        model = Network()
        pruner = FilterPruner(model, 0.4, every=1, feedback=feedback)
        if keep:
            with pruner.masked_weights.writing(torch.float64):
                pass
            pruner.masked_weights.renew()
        loss = model(IMAGES).square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()
        penalties.append([parameter.grad for parameter in model.parameters()])
    assert_same(*penalties)
    assert penalties[0][0].abs().sum() > 0


def test_function_transforms() -> None:
    model, _, _ = pruned()
    model.eval()
    torch.testing.assert_close(torch.func.vmap(lambda image: model(image[None])[0])(IMAGES), model(IMAGES))
    _, tangent = torch.func.jvp(model, (IMAGES,), (IMAGES,))
    _, same = torch.autograd.functional.jvp(model, IMAGES, IMAGES)
    torch.testing.assert_close(tangent, same)


def test_tracing_of_a_narrow_strided_convolution() -> None:
    """Which may be one that PyTorch computes wrongly, as the forward finds out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, stride=2), nn.BatchNorm2d(8))
    FilterPruner(model, 0.4, every=1, include=["0"])
    images = IMAGES.float().contiguous(memory_format=torch.channels_last)
    traced = torch.jit.trace(model.eval(), images)
    torch.testing.assert_close(traced(images), model(images))


def test_tracing_by_example_records_the_masks() -> None:
    model, pruner, _ = pruned()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model.eval(), IMAGES)
    with torch.no_grad():
        pruner.set_masks({"stem": torch.arange(8) < 3})
    torch.testing.assert_close(traced(IMAGES), expected(model))


# ------------------------------------------------------------------------------------------------ captured steps


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_cuda.FakeGraph]:
    """A graph of what runs within, which the code takes for CUDA's."""
    graph = fake_cuda.FakeGraph()
    with monkeypatch.context() as patch, graph:
        patch.setattr(optim, "is_capturing", lambda device: True)
        yield graph


@pytest.mark.parametrize("captured_step", [True, False], ids=["whole-step", "without-the-optimizer"])
def test_a_captured_step_is_the_eager_one(captured_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (model, pruner, optimizer), (other, other_pruner, other_optimizer) = pruned(), pruned(keep=False)
    images, lr = torch.empty_like(IMAGES), torch.tensor(0.05, dtype=torch.float64)
    optimizer.param_groups[0]["lr"] = lr

    def step() -> Tensor:
        model.zero_grad(set_to_none=False)
        loss = functional.cross_entropy(model(images), torch.arange(4))
        loss.backward()
        if captured_step:
            optimizer.step()
        return loss

    state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    images.copy_(IMAGES)
    with capturing(monkeypatch) as graph:
        loss = step()
    with torch.no_grad():  # the fake one computes while it captures
        model.load_state_dict(state[0])
        for i, parameter in enumerate(model.parameters()):
            optimizer.state[parameter]["momentum_buffer"].copy_(state[1]["state"][i]["momentum_buffer"])
    pruner.masked_weights.renew()
    for i in range(9):
        batch = IMAGES.roll(i, 3)
        images.copy_(batch)
        lr.fill_(0.05 / (1 + i))
        other_optimizer.param_groups[0]["lr"] = 0.05 / (1 + i)
        graph.replay()
        if not captured_step:
            optimizer.step()
        other.zero_grad()
        other_loss = functional.cross_entropy(other(batch), torch.arange(4))
        other_loss.backward()
        other_optimizer.step()
        torch.testing.assert_close(loss, other_loss, rtol=1e-12, atol=1e-12)
        assert pruner.step() == other_pruner.step()
    assert_same(list(model.state_dict().values()), list(other.state_dict().values()))
    assert not all(mask.all() for mask in pruner.masks().values())


def test_a_change_before_a_capture_is_masked_in_the_graph(masked_alone: list[int]) -> None:
    model, _, _ = pruned()
    masked_alone.clear()
    graph = fake_cuda.FakeGraph()
    with torch.no_grad():
        model.stem.weight.mul_(2)
        with graph:
            out = model(IMAGES)
        assert masked_alone == [1]
        model.stem.weight.mul_(-1.5)
    graph.replay()
    torch.testing.assert_close(out, expected(model))


def test_what_a_graph_cannot_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pruner, optimizer = pruned()
    backward(model)
    before = copy.deepcopy(model.state_dict())
    with capturing(monkeypatch), pytest.raises(RuntimeError, match=r"keep the learning rate, the number 0\.05.*fill_"):
        optimizer.step()
    fresh = PrunedSGD(model.parameters(), lr=torch.tensor(0.1), momentum=0.9, pruner=pruner)
    with capturing(monkeypatch), pytest.raises(RuntimeError, match="take a step before the capture"):
        fresh.step()
    assert_same(list(model.state_dict().values()), list(before.values()))
