"""PrunedSGD: equal to torch.optim.SGD and a pruner beside it, and interchangeable with it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases import Implementation
from torch import Tensor, nn
from torch.nn import functional

from fastprune import FilterPruner, WeightPruner, checkpoint, ops, optim
from fastprune import nn as nn_module
from fastprune.models.resnet import cifar_resnet
from fastprune.optim import PrunedSGD

HYPER: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}
DAMPED: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "dampening": 0.5, "weight_decay": 1e-3, "maximize": True}


def network() -> nn.Module:
    """A ResNet-8, in float64 as every model here: what rounding does to 200 steps stays small."""
    torch.manual_seed(0)
    return cifar_resnet(8, 10).double()


def backward(model: nn.Module, step: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 8, 8, generator=generator).to(next(model.parameters()).dtype)
    labels = torch.randint(10, (8,), generator=generator)
    model.zero_grad()
    (factor * functional.cross_entropy(model(images), labels)).backward()


def layered(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten())
    return layers.append(nn.Linear(96, 10)).double()


Make = Callable[[nn.Module], torch.optim.Optimizer]


def theirs(model: nn.Module, **hyper: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **(hyper or HYPER))


def ours(model: nn.Module, **hyper: Any) -> torch.optim.Optimizer:
    return PrunedSGD(model.parameters(), **(hyper or HYPER))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def assert_equal(model: nn.Module, other: nn.Module, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    for (name, tensor), same in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, same, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.fixture
def weights_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a pruner reads the weights to update its masks."""
    reads: list[int] = []

    def counted(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            reads.append(1)
            return op(*arguments)

        return call

    for name in ("update_filter_masks_", "filter_norms"):  # with min_kept 0, and with more
        monkeypatch.setattr(ops, name, counted(getattr(ops, name)))
    return reads


@pytest.fixture
def weights_masked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of layers that a forward masks itself, or that are renewed together."""
    calls: list[int] = []
    one, every = nn_module.masked_weight, ops.masked_weights

    def counted(*arguments: Any) -> Tensor:
        calls.append(1)
        return one(*arguments)

    def counted_together(*arguments: Any) -> list[Tensor]:
        calls.append(len(arguments[0]))
        return every(*arguments)

    monkeypatch.setattr(nn_module, "masked_weight", counted)
    monkeypatch.setattr(ops, "masked_weights", counted_together)
    return calls


# --------------------------------------------------------------------------------------------- with a pruner


@pytest.mark.parametrize("importance", ["l1", "l2"])
def test_equals_sgd_and_pruner_over_200_steps(
    registered: Implementation, weights_read: list[int], importance: str
) -> None:
    model, other = network(), network()
    # Both ways to a mask from norms: by the threshold alone, and with what every layer keeps.
    min_kept = 1 if importance == "l1" else 0
    pruner = FilterPruner(model, 0.4, importance, every=4, min_kept=min_kept)
    other_pruner = FilterPruner(other, 0.4, importance, every=4, min_kept=min_kept)
    optimizer, other_optimizer = PrunedSGD(model.parameters(), **HYPER, pruner=pruner), theirs(other)
    seen = set()
    for step in range(200):
        for each in (model, other):
            backward(each, step)
        optimizer.step()
        other_optimizer.step()
        del weights_read[:]
        assert pruner.step() == other_pruner.step()
        assert len(weights_read) == (step % 4 == 2), "only the pruner without PrunedSGD reads the weights"
        for mask, same in zip(pruner.masks().values(), other_pruner.masks().values()):
            assert torch.equal(mask, same)
        seen.add(tuple(torch.cat(list(pruner.masks().values())).tolist()))
    assert len(seen) > 5, "the masks must have moved for this to say anything"
    assert_equal(model, other, rtol=1e-7, atol=1e-9)


def test_one_op_steps_everything() -> None:
    model = network()
    optimizer = PrunedSGD(model.parameters(), **HYPER, pruner=FilterPruner(model, 0.4))
    for step in range(2):
        backward(model, step)
        with torch.profiler.profile() as profile:
            optimizer.step()
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["fastprune::sgd_step_"] == 1
        assert "aten::copy_" not in counts or ops.cpu_isas() == ()


@pytest.mark.parametrize("feedback", ["none", "normalized"])
def test_written_masked_weights_train_the_same_network(
    registered: Implementation, weights_masked: list[int], feedback: str
) -> None:
    models = [network(), network()]
    pruners = [FilterPruner(model, 0.4, every=4, feedback=feedback) for model in models]
    dtypes = (torch.float64, None)
    optimizers = [
        PrunedSGD(model.parameters(), **HYPER, pruner=pruner, masked_dtype=dtype)
        for model, pruner, dtype in zip(models, pruners, dtypes)
    ]
    masked = []
    for step in range(20):
        for model, pruner, optimizer in zip(models, pruners, optimizers):
            del weights_masked[:]
            backward(model, step)
            masked.append(len(weights_masked))
            optimizer.step()
            pruner.step()
    # Nothing is written before the first step; the other masks each layer in every forward.
    layers = len(pruners[0].layers)
    assert masked[::2] == [layers, *[0] * 19]
    assert masked[1::2] == [layers] * 20
    assert_equal(*models, rtol=0, atol=0)


def test_written_masked_weights_serve_autocast(weights_masked: list[int]) -> None:
    model = layered().float()
    pruner = FilterPruner(model, 0.4, every=1)
    optimizer = PrunedSGD(model.parameters(), lr=0.1, pruner=pruner, masked_dtype=torch.bfloat16)
    images = torch.randn(4, 3, 8, 8)
    pruner.step()
    model(images).sum().backward()
    optimizer.step()
    del weights_masked[:]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            written = model(images)
        assert not weights_masked
        with torch.no_grad():
            model[0].weight.mul_(1)  # the same, but who knows
            assert torch.equal(model(images), written)
        assert weights_masked == [1]  # that one alone
    optimizer.step()
    model(images)
    assert weights_masked == [1, 1, 1]  # another dtype than was written


@pytest.mark.parametrize(
    "importance", ["fpgm", lambda name, weight: weight.detach().flatten(1).amax(1).float()], ids=["fpgm", "function"]
)
def test_masked_weights_are_written_whatever_the_importance(importance: Any, weights_masked: list[int]) -> None:
    model = layered()
    pruner = FilterPruner(model, 0.4, every=1, importance=importance)
    optimizer = PrunedSGD(model.parameters(), lr=0.1, pruner=pruner, masked_dtype=torch.float64)
    backward(model, 0)
    optimizer.step()
    pruner.step()
    del weights_masked[:]
    backward(model, 1)
    assert not weights_masked


def test_a_learning_rate_on_the_host_is_not_copied_to_the_device() -> None:
    rate = torch.tensor(0.1)
    assert optim._learning_rate(rate, torch.device("cpu")) is rate
    assert optim._learning_rate(rate, torch.device("meta")) == float(rate)


def test_written_masked_weights_are_not_overwritten_unseen() -> None:
    model = layered()
    optimizer = PrunedSGD(model.parameters(), lr=0.1, pruner=FilterPruner(model, 0.4), masked_dtype=torch.float64)
    backward(model, 0)
    optimizer.step()
    loss = model(torch.randn(8, 3, 8, 8, dtype=torch.float64)).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_masked_dtype_takes_a_pruner_and_a_float() -> None:
    model = layered()
    with pytest.raises(ValueError, match="masked_dtype takes a pruner"):
        PrunedSGD(model.parameters(), masked_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        PrunedSGD(model.parameters(), pruner=FilterPruner(model, 0.4), masked_dtype=torch.int8)


CHANGES: dict[str, Callable[[nn.Sequential], Any]] = {
    "by hand": lambda model: model[0].weight.requires_grad_(False).mul_(torch.rand(8, 1, 1, 1)).requires_grad_(),
    "loaded": lambda model: model.load_state_dict(layered(seed=1).state_dict(), strict=False),
    "replaced": lambda model: setattr(model[0], "weight", nn.Parameter(torch.randn(8, 3, 3, 3, dtype=torch.float64))),
    "other data": lambda model: setattr(model[0].weight, "data", torch.randn(8, 3, 3, 3, dtype=torch.float64)),
    "converted": lambda model: model.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_norms_of_weights_that_changed_are_not_used(change: str, weights_read: list[int]) -> None:
    model = layered()
    pruner = FilterPruner(model, 0.4, every=1, min_kept=0)
    optimizer = PrunedSGD(model.parameters(), lr=0.1, pruner=pruner)
    backward(model, 0)
    optimizer.step()
    del weights_read[:]
    pruner.step()
    assert not weights_read
    with torch.no_grad():
        CHANGES[change](model)
    pruner.step()
    assert weights_read
    weights = [layer.weight.detach() for layer in pruner.layers.values()]
    assert torch.equal(torch.cat(list(pruner.masks().values())), ops.filter_mask(weights, 0.4))


@pytest.mark.parametrize("change", [*CHANGES, "masked"])
def test_masked_weights_of_what_changed_are_not_used(change: str, weights_masked: list[int]) -> None:
    model = layered()
    pruner = FilterPruner(model, 0.4)
    optimizer = PrunedSGD(model.parameters(), lr=0.1, pruner=pruner, masked_dtype=torch.float64)
    backward(model, 0)
    optimizer.step()
    del weights_masked[:]
    backward(model, 1)
    assert not weights_masked
    with torch.no_grad():
        model[0].mask.logical_not_() if change == "masked" else CHANGES[change](model)
    backward(model, 1)
    assert weights_masked


def test_a_nan_still_names_its_layer() -> None:
    model = layered()
    pruner = FilterPruner(model, 0.4, every=1)
    optimizer = PrunedSGD(model.parameters(), lr=0.1, pruner=pruner)
    for bad in (torch.nan, torch.inf):
        backward(model, 0)
        model[3].weight.grad[2] = bad
        before = model[3].mask.clone()
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"layer 3: .*NaN or Inf"):
            pruner.step()
        assert torch.equal(model[3].mask, before)
        with torch.no_grad():
            model[3].weight[2] = 0.1


@pytest.mark.parametrize("split", ["groups", "frozen", "unfrozen"])
def test_where_norms_cannot_be_written_the_pruner_reads_the_weights(split: str, weights_read: list[int]) -> None:
    model, other = layered(), layered()
    pruner, other_pruner = FilterPruner(model, 0.4, every=1), FilterPruner(other, 0.4, every=1)
    frozen = () if split == "groups" else [model[0].weight, other[0].weight]
    for weight in frozen:
        weight.requires_grad_(False)

    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        first = list(model[0].parameters())
        rest = [param for layer in model[1:] for param in layer.parameters()]
        return [{"params": [*rest, *first]}] if frozen else [{"params": first}, {"params": rest, "lr": 0.2}]

    optimizer = PrunedSGD(groups(model), **HYPER, pruner=pruner)
    other_optimizer = torch.optim.SGD(groups(other), **HYPER)
    for step in range(6):
        if split == "unfrozen" and step == 2:
            for weight in frozen:
                weight.requires_grad_()
        for each in (model, other):
            backward(each, step)
        optimizer.step()
        other_optimizer.step()
        del weights_read[:]
        pruner.step()
        together = split == "unfrozen" and step > 2
        assert bool(weights_read) == (not together)
        other_pruner.step()
        assert_equal(model, other)


def test_a_learning_rate_on_the_device_and_its_scheduler() -> None:
    model, other = network(), network()
    lr = torch.tensor(0.05, dtype=torch.float64)
    optimizer, other_optimizer = ours(model, **HYPER | {"lr": lr}), theirs(other)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(each, 5) for each in (optimizer, other_optimizer)]
    for step in range(5):
        for each in (model, other):
            backward(each, step)
        for each in (optimizer, other_optimizer, *schedulers):
            each.step()
    assert optimizer.param_groups[0]["lr"] is lr, "a graph would read this one"
    assert lr < 1e-12
    assert_equal(model, other)


@pytest.mark.parametrize("lr", [torch.tensor([0.1, 0.2]), torch.tensor(1), torch.tensor(0.1, dtype=torch.float16)])
def test_a_learning_rate_that_no_op_takes(lr: Tensor) -> None:
    with pytest.raises(ValueError, match="lr must be a number or a tensor of one float32 or float64, got torch"):
        PrunedSGD(layered().parameters(), lr=lr)


def test_a_model_that_another_pruner_has_masked_since() -> None:
    model = layered()
    pruner = FilterPruner(model, 0.4)
    optimizer = PrunedSGD(model.parameters(), lr=0.1, pruner=pruner, masked_dtype=torch.float64)
    train(model, optimizer, range(2))
    WeightPruner(model, 0.5)
    before = model[0].weight.detach().clone()
    train(model, optimizer, range(2, 4))
    assert not torch.equal(model[0].weight, before)


def test_with_a_pruner_of_something_else() -> None:
    model = layered()
    with pytest.raises(ValueError, match="none of the pruner's weights is among params"):
        PrunedSGD(layered().parameters(), lr=0.1, pruner=FilterPruner(model, 0.5))
    with pytest.raises(TypeError, match=r"pruner must be a FilterPruner.*got WeightPruner"):
        PrunedSGD(model.parameters(), lr=0.1, pruner=WeightPruner(layered(), 0.5))  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ as torch.optim.SGD


@pytest.mark.parametrize("hyper", [{"lr": 0.1}, HYPER, DAMPED], ids=["plain", "nesterov", "damped"])
@pytest.mark.parametrize(("before", "after"), [(theirs, ours), (ours, theirs), (ours, ours)])
def test_state_dicts_are_exchanged_in_mid_training(before: Make, after: Make, hyper: dict[str, Any]) -> None:
    model, other = layered(), layered()
    optimizer, whole = before(model, **hyper), theirs(other, **hyper)
    train(model, optimizer, range(5))
    second = after(model, lr=17.0)  # everything else comes with the state
    second.load_state_dict(optimizer.state_dict())
    train(model, second, range(5, 10))
    train(other, whole, range(10))
    assert_equal(model, other)
    assert second.state_dict()["state"].keys() == whole.state_dict()["state"].keys()
    for state, same in zip(second.state_dict()["state"].values(), whole.state_dict()["state"].values()):
        assert state.keys() == same.keys() == {"momentum_buffer"}
        torch.testing.assert_close(state["momentum_buffer"], same["momentum_buffer"])


def test_groups_have_their_own_settings() -> None:
    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        decayed = [param for param in model.parameters() if param.dim() > 1]
        rest = [param for param in model.parameters() if param.dim() <= 1]
        return [{"params": decayed, "dampening": 0, **HYPER}, {"params": rest, "lr": 0.2, "weight_decay": 0}]

    model, other = layered(), layered()
    pruner = FilterPruner(model, 0.0, every=10**6)
    FilterPruner(other, 0.0, every=10**6)
    optimizer = PrunedSGD(groups(model), pruner=pruner, **DAMPED)
    other_optimizer = torch.optim.SGD(groups(other), **DAMPED)
    train(model, optimizer, range(8))
    train(other, other_optimizer, range(8))
    assert_equal(model, other)


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=12),
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(scheduler: str, recwarn: pytest.WarningsRecorder) -> None:
    models = [layered(), layered()]
    for model, optimizer in zip(models, (ours(models[0]), theirs(models[1]))):
        schedule = SCHEDULERS[scheduler](optimizer)
        for step in range(12):
            backward(model, step)
            optimizer.step()
            schedule.step() if step < 11 else None
    assert_equal(*models)
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]


def test_parameters_without_a_gradient_are_left_alone() -> None:
    model = layered()
    backward(model, 0)
    model[3].weight.grad = None
    before = model[3].weight.detach().clone()
    optimizer = ours(model)
    optimizer.step()
    assert torch.equal(model[3].weight, before)
    assert model[3].weight not in optimizer.state
    assert len(optimizer.state) == len(list(model.parameters())) - 1
    optimizer.zero_grad()
    optimizer.step()  # nothing at all to do


def test_gradients_of_any_layout_and_parameters_of_several_dtypes() -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3, 3, 3, dtype=dtype)) for dtype in cases.DTYPES]
    same = [nn.Parameter(param.detach().clone()) for param in params]
    optimizer, other = PrunedSGD(params, **HYPER), torch.optim.SGD(same, **HYPER)
    for _ in range(3):
        for param, twin in zip(params, same):
            grad = torch.randn(3, 4, 3, 3, dtype=param.dtype).transpose(0, 1)
            param.grad, twin.grad = grad, grad.clone()
        optimizer.step()
        other.step()
    for param, twin in zip(params, same):
        tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(param.dtype, 1e-6)
        torch.testing.assert_close(param, twin, rtol=tolerance, atol=tolerance)


def test_closure_and_hooks() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer, calls = PrunedSGD([weight], lr=0.5), []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * weight).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert weight.tolist() == [0.0, 0.0, 0.0]
    assert calls == [1]


def test_a_copy_steps_without_the_pruner() -> None:
    model = layered()
    pruner = FilterPruner(model, 0.4)
    optimizer = PrunedSGD(model.parameters(), **HYPER, pruner=pruner)
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    assert other.pruner is None
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert_equal(model, twin, rtol=0, atol=0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": -0.1}, "lr must be at least 0, got -0.1"),
    "nan": ({"lr": float("nan")}, "lr must be at least 0, got nan"),
    "momentum": ({"momentum": -1}, "momentum must be at least 0, got -1"),
    "weight decay": ({"weight_decay": -1}, "weight_decay must be at least 0, got -1"),
    "nesterov": ({"nesterov": True}, "nesterov takes a momentum above 0 and no dampening"),
    "dampened": (HYPER | {"dampening": 0.1}, "nesterov takes a momentum above 0 and no dampening"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings(wrong: str) -> None:
    settings, message = WRONG[wrong]
    params = [nn.Parameter(torch.ones(3))]
    with pytest.raises(ValueError, match=message):
        PrunedSGD(params, **settings)
    with pytest.raises(ValueError, match=message):
        PrunedSGD([{"params": params, **settings}])
    with pytest.raises(ValueError, match=message):
        PrunedSGD([nn.Parameter(torch.ones(2))]).add_param_group({"params": params, **settings})


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="takes no sparse gradients"):
        PrunedSGD(embedding.parameters()).step()


# -------------------------------------------------------------------------------------------------- GradScaler


def scaled_run(make: Make, unscale: bool) -> tuple[nn.Module, list[float], torch.optim.Optimizer]:
    """Ten steps under a scaler, of which the first two and the sixth meet an Inf."""
    model = layered()
    optimizer, scaler = make(model, **DAMPED), torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=3)
    scales = []
    for step in range(10):
        with torch.no_grad():
            before = [param.clone() for param in model.parameters()]
        backward(model, step, factor=scaler.scale(torch.tensor(1.0)).item())
        if step in (0, 1, 5):
            next(model.parameters()).grad[0, 0, 0, 0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        stood_still = all(map(torch.equal, before, model.parameters()))
        assert stood_still == (step in (0, 1, 5))
        scales.append(scaler.get_scale())
    return model, scales, optimizer


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(registered: Implementation, unscale: bool) -> None:
    # Dampening tells a first step from a later one: those that an Inf skipped do not count.
    model, scales, optimizer = scaled_run(ours, unscale)
    other, other_scales, _ = scaled_run(theirs, unscale)
    assert scales == other_scales
    assert_equal(model, other)
    assert not hasattr(optimizer, "found_inf")


def test_nothing_is_read_from_the_device_after_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = layered()
    optimizer = PrunedSGD(model.parameters(), **HYPER, pruner=FilterPruner(model, 0.4))
    train(model, optimizer, range(1))
    backward(model, 1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    for name in ("item", "tolist", "__bool__", "__float__", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("the host waited for a tensor's value"))
    optimizer.step()


def test_scaler_and_pruner_together() -> None:
    models = [layered(), layered()]
    pruners = [FilterPruner(model, 0.4, every=1) for model in models]
    optimizers = [PrunedSGD(models[0].parameters(), **HYPER, pruner=pruners[0]), theirs(models[1])]
    for model, pruner, optimizer in zip(models, pruners, optimizers):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(8):
            backward(model, step, factor=scaler.scale(torch.tensor(1.0)).item())
            if step in (0, 3):
                model[5].weight.grad[0] = torch.nan
            scaler.step(optimizer)
            scaler.update()
            pruner.step()
    assert_equal(*models)


# -------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_resumes_from_a_checkpoint_bit_by_bit(tmp_path: Path, layout: torch.memory_format) -> None:
    def make(seed: int) -> tuple[nn.Module, FilterPruner, PrunedSGD]:
        model = layered(seed)
        model.to(memory_format=layout)  # type: ignore[call-overload]
        pruner = FilterPruner(model, 0.4, every=2)
        return model, pruner, PrunedSGD(model.parameters(), **HYPER, pruner=pruner)

    def run(model: nn.Module, pruner: FilterPruner, optimizer: PrunedSGD, steps: range) -> None:
        for step in steps:
            backward(model, step)
            optimizer.step()
            pruner.step()

    whole, resumed = make(0), make(1)
    run(*whole, range(5))
    states = {name: part.state_dict() for name, part in zip(("model", "pruner", "optimizer"), whole)}
    checkpoint.save(tmp_path / "checkpoint.safetensors", states)
    loaded = checkpoint.load(tmp_path / "checkpoint.safetensors")
    for name, part in zip(("model", "pruner", "optimizer"), resumed):
        part.load_state_dict(loaded[name])
    run(*whole, range(5, 12))
    run(*resumed, range(5, 12))
    assert_equal(whole[0], resumed[0], rtol=0, atol=0)
