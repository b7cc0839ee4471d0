"""A pruner's beginning and end: errors that change nothing, masks that are still to come, checkpoints, removal."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastprune import FilterPruner, MaskedConv2d, WeightPruner
from fastprune.optim import PrunedSGD
from fastprune.pruning_schedule import is_due, next_due

IMAGES = torch.zeros(1, 3, 8, 8)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


def state(model: nn.Module) -> list[Any]:
    """Classes, attributes, tensors (their identity and their values): all that a pruner changes."""
    found: list[Any] = []
    for module in model.modules():
        found += [type(module), sorted(vars(module)), module.training, dict(module._load_state_dict_post_hooks)]
        found += [sorted(module._non_persistent_buffers_set)]
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                found += [name, id(tensor), None if tensor is None else tensor.detach().cpu().numpy().tobytes()]
    return found


# ---- what fails changes nothing ----


def with_nan(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[3].weight[2, 1, 0, 0] = torch.nan


def raising(name: str, weight: Tensor) -> Tensor:
    if name == "3":
        raise ZeroDivisionError("of the user's")
    return weight.flatten(1).mean(1)


FAULTS: dict[str, tuple[Callable[[nn.Sequential], object], dict[str, Any], type[Exception], str]] = {
    "NaN": (with_nan, {}, RuntimeError, r"layer 3: .*NaN or Inf"),
    "NaN, coupled": (with_nan, {"example_input": IMAGES}, RuntimeError, r"layer 3: .*NaN or Inf"),
    "dtypes": (
        lambda model: model[3].double(),
        {"feedback": "none"},
        ValueError,
        r"one dtype and one device: 0 is torch.float32 on cpu, 3 is torch.float64 on cpu; convert or move the model",
    ),
    "devices": (
        lambda model: model[0].to("meta"),
        {},
        ValueError,
        "0 is torch.float32 on meta, 3 is torch.float32 on cpu",
    ),
    "example": (lambda model: None, {"example_input": torch.zeros(1, 4, 8, 8)}, ValueError, "on the example input"),
    "examples": (lambda model: None, {"example_input": (IMAGES, IMAGES)}, ValueError, "example_input has 2"),
    "importance raises": (lambda model: None, {"importance": raising}, ZeroDivisionError, "of the user's"),
    "importance of another shape": (
        lambda model: None,
        {"importance": lambda name, weight: weight},
        ValueError,
        r"layer 0: importance must return \[8\]",
    ),
    "no list": (
        lambda model: None,
        {"ignore": "3"},
        TypeError,
        r"ignore must be a list of names or modules, got the str",
    ),
    "no list of modules": (lambda model: None, {"include": 3}, TypeError, "not iterable"),
    "unknown": (lambda model: None, {"include": ["nowhere"]}, ValueError, "'nowhere' is no module of this model"),
    "subclass": (
        lambda model: model.append(type("Own", (nn.Conv2d,), {})(2, 2, 1)),
        {"removable_only": False},
        TypeError,
        "Own",
    ),
    "no shape": (
        lambda model: model.append(nn.LazyLinear(3)),
        {},
        TypeError,
        "8.weight has no shape yet: call the model once",
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("masked_before", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("fault", FAULTS)
def test_filter_pruner_leaves_a_model_as_it_was(fault: str, masked_before: bool) -> None:
    break_it, options, error, said = FAULTS[fault]
    model = network()
    if masked_before:
        first = FilterPruner(model, 0.4, every=1)
        assert first.masked_weights.in_use
    break_it(model)
    before = state(model) if fault not in ("no shape", "devices") else [type(module) for module in model.modules()]
    with pytest.raises(error, match=said):
        FilterPruner(model, 0.5, every=1, **options)
    after = state(model) if fault not in ("no shape", "devices") else [type(module) for module in model.modules()]
    assert after == before


@pytest.mark.parametrize("fault", ["NaN", "dtypes", "no list"])
def test_weight_pruner_leaves_a_model_as_it_was(fault: str) -> None:
    break_it, options, error, said = FAULTS[fault]
    model = network()
    break_it(model)
    before = state(model)
    with pytest.raises(error, match=said):
        WeightPruner(model, 0.5, every=1, **options)
    assert state(model) == before


@pytest.mark.filterwarnings("error")
def test_warnings_that_are_errors_leave_a_model_as_it_was() -> None:
    model = network()
    before = state(model)
    with pytest.raises(UserWarning, match="nothing will be pruned"):
        FilterPruner(model, 0.5, every=4, until=2, example_input=IMAGES)
    assert state(model) == before


# ---- numbers ----


@pytest.mark.parametrize("kind", [FilterPruner, WeightPruner])
@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"rate": "0.5"}, TypeError, "rate must be a number, got '0.5'"),
        ({"rate": True}, TypeError, "rate must be a number, got True"),
        ({"rate": torch.tensor(0.5)}, TypeError, "rate must be a number, got tensor"),
        ({"rate": math.nan}, ValueError, "rate must be finite, got nan"),
        ({"rate": math.inf}, ValueError, "rate must be finite, got inf"),
        ({"every": 2.5}, TypeError, "every must be a whole number, got 2.5"),
        ({"every": True}, TypeError, "every must be a whole number, got True"),
        ({"every": np.int64(0)}, ValueError, "every must be at least 1, got 0"),
        ({"until": 1.5}, TypeError, "until must be a whole number, got 1.5"),
        ({"steps_per_epoch": "9"}, TypeError, "steps_per_epoch must be a whole number, got '9'"),
    ],
)
def test_numbers_that_are_none(kind: type, arguments: dict[str, Any], error: type[Exception], said: str) -> None:
    model = network()
    before = state(model)
    with pytest.raises(error, match=said):
        kind(model, **{"rate": 0.5, **arguments})
    assert state(model) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"min_kept": 1.5}, "min_kept must be a whole number, got 1.5"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"schedule": "linear", "ramp_steps": 2.5}, "ramp_steps must be a whole number, got 2.5"),
        ({"schedule": "linear", "ramp_steps": math.inf}, "ramp_steps must be a whole number, got inf"),
    ],
)
def test_numbers_of_filter_pruner_that_are_none(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises((TypeError, ValueError), match=said):
        FilterPruner(network(), 0.5, **arguments)


def test_numbers_of_numpy_are_numbers() -> None:
    pruner = FilterPruner(network(), np.float32(0.5), every=np.int64(2), until=np.int32(8), min_kept=np.uint8(2))  # type: ignore[arg-type]
    assert [type(value) for value in (pruner.rate, pruner.every, pruner.until)] == [float, int, int]
    assert pruner.step()


# ---- masks that are still to come ----


def why(pruner: FilterPruner | WeightPruner) -> str:
    return pruner.report().layers[0].why


@pytest.mark.parametrize("kind", [FilterPruner, WeightPruner])
def test_masks_that_were_never_updated_say_when_they_will_be(kind: type) -> None:
    pruner = kind(network(), 0.5, every=4)
    assert why(pruner) == "nothing pruned yet: the first update comes before iteration 4; pruner.update() makes it now"
    assert [pruner.step() for _ in range(2)] == [False] * 2
    assert "before iteration 4" in why(pruner)
    assert pruner.step()
    assert "nothing" not in why(pruner)
    other = kind(network(), 0.5, every=4)
    other.update()
    assert "nothing" not in why(other)
    other.set_masks(other.export_masks())
    assert why(other) == "as set by set_masks()"
    other.update()
    assert "set" not in why(other)
    third = kind(network(), 0.5, every=4)
    third.model.load_state_dict(other.model.state_dict())
    assert why(third) == "as loaded, or changed by others than this pruner"


def test_masks_that_never_come_are_told() -> None:
    with pytest.warns(
        UserWarning, match="nothing will be pruned but by .*every=4 counts from the start of each epoch, and"
    ):
        pruner = FilterPruner(network(), 0.5, every=4, steps_per_epoch=3)
    assert why(pruner).startswith(
        "nothing pruned: every=4 counts from the start of each epoch, and an epoch has 3 iter"
    )
    with pytest.warns(UserWarning, match="until=2 ends the schedule before the first update, which every=4 asks for"):
        assert "until=2" in why(FilterPruner(network(), 0.5, every=4, until=2))
    pruner = FilterPruner(network(), 0.5, every=4, until=0)  # as somebody means it who calls update()
    assert why(pruner) == "nothing pruned: the masks are frozen; pruner.update() makes masks now"


@pytest.mark.parametrize("period", [None, 1, 3, 4, 7])
@pytest.mark.parametrize("until", [None, 0, 3, 4, 11])
@pytest.mark.parametrize("every", [1, 2, 4])
def test_next_due_is_the_first_that_is_due(every: int, until: int | None, period: int | None) -> None:
    for steps in range(12):
        due = [i for i in range(steps, 99) if is_due(i, every, period) and (until is None or i < until)]
        assert next_due(steps, every, until, period) == (due[0] if due else None)


# ---- checkpoints of dense and of masked models ----


def test_a_dense_checkpoint_in_a_masked_model_says_what_to_do() -> None:
    dense, model = network().state_dict(), network()
    pruner = FilterPruner(model, 0.5, every=1)
    whole = nn.ModuleDict({"net": model})
    masks = pruner.export_masks()
    said = (
        r"weights without masks \((net\.)?0\.mask\).*before a pruner converts the model; or with strict=False, and then"
    )
    for target, keys in ((model, dense), (whole, {f"net.{key}": value for key, value in dense.items()})):
        with pytest.warns(UserWarning, match=said), pytest.raises(RuntimeError, match=r"Missing key.*0\.mask"):
            target.load_state_dict(keys)
    with pytest.warns(UserWarning, match=said):
        model.load_state_dict(dense, strict=False)
    assert all(torch.equal(pruner.masks()[name], mask) for name, mask in masks.items())


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_checkpoints_that_fit() -> None:
    model = network()
    FilterPruner(model, 0.5, example_input=IMAGES)
    model.load_state_dict(model.state_dict())
    model.load_state_dict({"7.bias": torch.ones(2)}, strict=False)


def test_a_masked_checkpoint_goes_into_a_model_that_was_converted_or_becomes_dense() -> None:
    model = network()
    pruner = FilterPruner(model, 0.5, every=1)
    other = network()
    FilterPruner(other, 0.5)
    other.load_state_dict(model.state_dict())
    outputs = model.eval()(torch.ones(2, 3, 8, 8))
    assert torch.equal(other.eval()(torch.ones(2, 3, 8, 8)), outputs)
    pruner.remove()
    plain = network()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(torch.ones(2, 3, 8, 8)), outputs)


# ---- removal ----


def removed(kind: type, bake: bool) -> tuple[nn.Sequential, dict[str, Tensor], dict[str, Tensor]]:
    model = network()
    before, weights = state(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    pruner = kind(model, 0.5, every=1)
    if kind is FilterPruner:
        assert pruner.masked_weights.in_use
    masks = pruner.export_masks()
    pruner.remove(bake)
    after = state(model)
    changed = [one for one, other in zip(before, after, strict=True) if one != other]
    assert all(isinstance(value, bytes) for value in changed), "only values may differ"
    assert len(changed) == (2 if bake else 0)
    return model, masks, weights


@pytest.mark.parametrize("kind", [FilterPruner, WeightPruner])
@pytest.mark.parametrize("bake", [True, False])
def test_a_removed_pruner_leaves_no_traces(kind: type, bake: bool) -> None:
    model, masks, weights = removed(kind, bake)
    assert list(model.state_dict()) == list(weights)
    for name, mask in masks.items():
        rows = mask if mask.dim() > 1 else mask.view(-1, 1, 1, 1)
        expected = torch.where(rows, weights[f"{name}.weight"], 0) if bake else weights[f"{name}.weight"]
        assert torch.equal(model.state_dict()[f"{name}.weight"], expected)
    pickle.loads(pickle.dumps(model))
    assert not any(isinstance(module, MaskedConv2d) for module in copy.deepcopy(model).modules())


def test_training_goes_on_without_the_pruner() -> None:
    model, images = network(), torch.randn(4, 3, 8, 8)
    pruner = FilterPruner(model, 0.5, every=1)
    optimizer = PrunedSGD(model.parameters(), lr=0.1, momentum=0.9, pruner=pruner, masked_dtype=torch.float32)
    model(images).square().sum().backward()
    optimizer.step()
    pruner.remove()
    optimizer.pruner = None
    plain = network()
    plain.load_state_dict(model.state_dict())
    other = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, own in ((model, optimizer), (plain, other)):
        own.zero_grad()
        trained(images).square().sum().backward()
        own.step()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected)


def test_a_removed_pruner_says_so() -> None:
    model = network()
    pruner = FilterPruner(model, 0.5, every=1)
    optimizer = PrunedSGD(model.parameters(), lr=0.1, pruner=pruner)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    pruner.remove()
    for name in ("step", "update", "report", "masks", "kept", "remove", "layers", "frozen", "masked_weights"):
        with pytest.raises(RuntimeError, match="this pruner has been removed from its model, whose convolutions are"):
            getattr(pruner, name)
    with pytest.raises(RuntimeError, match="set the pruner of a PrunedSGD to None"):
        optimizer.step()


def test_masked_models_are_copied_and_stored_with_their_explanation() -> None:
    pruner = FilterPruner(network(), 0.5, every=1)
    stored = io.BytesIO()
    torch.save(pruner.model, stored)
    stored.seek(0)
    twin = copy.deepcopy(pruner)
    for model in (twin.model, torch.load(stored, weights_only=False), pickle.loads(pickle.dumps(pruner.model))):
        with pytest.warns(UserWarning, match="weights without masks"):
            model.load_state_dict(network().state_dict(), strict=False)
    twin.remove()
    assert not twin.__dict__
    assert pruner.model._load_state_dict_post_hooks
    assert isinstance(pruner.model[0], MaskedConv2d)
