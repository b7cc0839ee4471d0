"""FilterPruner and WeightPruner: the rule, the schedule, and the gradient that pruned filters get."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from fastprune import FilterPruner, MaskedConv2d, WeightPruner, importance, models, ops
from fastprune.optim import PrunedSGD
from fastprune.pruner import following_batchnorms


def rule(weights: list[Tensor], rate: float, power: int = 1) -> np.ndarray:
    """method of the paper in numpy: s = mean |w|^power, t = sort(s)[int(N · rate)], kept when s > t."""
    rows = [weight.detach().double().flatten(1).numpy() for weight in weights]
    scores = np.concatenate([(np.abs(row) ** power).mean(1) for row in rows]).astype(np.float32)
    return scores > np.sort(scores)[int(len(scores) * rate)]


def masks_of(pruner: FilterPruner) -> np.ndarray:
    return torch.cat(list(pruner.masks().values())).numpy()


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize(("importance", "power"), [("l1", 1), ("l2", 2)])
def test_masks_follow_the_rule(importance: str, power: int) -> None:
    torch.manual_seed(0)
    model = models.create("resnet56")
    pruner = FilterPruner(model, 0.6, importance, every=1, min_kept=0)
    weights = [layer.weight for layer in pruner.layers.values()]
    for _ in range(3):
        np.testing.assert_array_equal(masks_of(pruner), rule(weights, 0.6, power))
        assert (~masks_of(pruner)).sum() >= int(2128 * 0.6) + 1
        randomise(model)
        pruner.step()


def test_masks_change_when_they_are_due() -> None:
    torch.manual_seed(0)
    model = models.create("resnet20")
    pruner = FilterPruner(model, 0.5, every=4, steps_per_epoch=6, until=14, min_kept=0)
    assert masks_of(pruner).all(), "nothing is pruned before the first update"
    updated = []
    for step in range(1, 25):  # steps finished
        randomise(model)
        before = masks_of(pruner)
        if pruner.step():
            updated.append(step)
            np.testing.assert_array_equal(masks_of(pruner), rule([x.weight for x in pruner.layers.values()], 0.5))
        else:
            np.testing.assert_array_equal(masks_of(pruner), before)
    # Before iteration i of an epoch when (i + 1) % 4 == 0: i = 3 of epochs of 6, and not from step 14 on.
    assert updated == [3, 9]


def test_without_epochs_the_count_goes_on() -> None:
    pruner = FilterPruner(nn.Sequential(nn.Conv2d(3, 8, 3)), 0.5, every=4, removable_only=False)
    assert [step for step in range(1, 16) if pruner.step()] == [3, 7, 11, 15]


def test_state_dict_continues_the_schedule() -> None:
    def make() -> FilterPruner:
        torch.manual_seed(0)
        return FilterPruner(nn.Sequential(nn.Conv2d(3, 8, 3)), 0.5, every=4, removable_only=False)

    first, second = make(), make()
    for _ in range(2):
        first.step()
    second.load_state_dict(first.state_dict())
    assert second.step()


def test_a_pruned_filter_comes_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False))
    pruner = FilterPruner(model, 0.5, every=1, include=["0"])
    lost = int((~model[0].mask).nonzero()[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.randn(4, 3, 6, 6)
    for _ in range(200):
        optimizer.zero_grad()
        (model(images)[:, lost] - 5).square().mean().backward()  # pulls at the pruned filter alone
        optimizer.step()
        pruner.step()
        if model[0].mask[lost]:
            return
    pytest.fail("the gradient never brought the filter back")


class Amplified(nn.Module):
    """A convolution whose outputs are of unit variance, and a BatchNorm."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(2, eps=eps)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images))


def gradient_ratio(feedback: str, eps: float) -> float:
    """The gradient norm of a pruned filter over that of a live one, both asked for the same."""
    torch.manual_seed(0)
    model = Amplified(eps)
    with torch.no_grad():
        direction = torch.randn(16)
        model.conv.weight.copy_((direction / direction.norm()).view(1, 16, 1, 1).expand(2, -1, -1, -1))
    FilterPruner(model, 0.0, every=100, feedback=feedback, removable_only=False)
    model.conv.mask[1] = False
    images, target = torch.randn(256, 16, 4, 4), torch.randn(256, 1, 4, 4)
    (model(images) * target).mean().backward()
    live, pruned = model.conv.weight.grad.flatten(1).norm(dim=1)
    return float(pruned / live)


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_batchnorm_amplifies_the_feedback_and_normalized_removes_it(eps: float) -> None:
    # A live filter's output has unit variance: BatchNorm divides its gradient by 1, a pruned one's by √ε.
    assert gradient_ratio("straight-through", eps) == pytest.approx(eps**-0.5, rel=0.1)
    assert gradient_ratio("normalized", eps) == pytest.approx(1, rel=0.1)
    assert gradient_ratio("none", eps) == 0


def test_batchnorm_is_found_by_the_graph() -> None:
    class Crossed(nn.Module):
        """Registered in another order than it is called."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm_of_second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.second, self.norm_of_first = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.bare = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.bare(self.norm_of_second(self.second(self.norm_of_first(self.first(x)))))

    model = Crossed()
    assert following_batchnorms(model) == {"first": model.norm_of_first, "second": model.norm_of_second}
    pruner = FilterPruner(model, 0.5, removable_only=False)
    scales = {name: layer.feedback.unique().tolist() for name, layer in pruner.layers.items()}
    assert scales["first"] == pytest.approx([1e-5**0.5])
    assert scales["bare"] == [1.0]


def test_a_model_that_cannot_be_traced_is_read_in_order_with_a_warning() -> None:
    class Untraceable(Amplified):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) if float(images.sum()) == float(images.sum()) else images

    with pytest.warns(UserWarning, match="cannot be traced"):
        pruner = FilterPruner(Untraceable(1e-4), 0.5)
    assert pruner.layers["conv"].feedback.tolist() == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize("name", models.NAMES)
def test_every_convolution_of_the_models_has_its_batchnorm(name: str) -> None:
    with torch.device("meta"):
        model = models.create(name)
    convolutions = [key for key, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert sorted(following_batchnorms(model)) == sorted(convolutions)


def test_kept_and_sparsity() -> None:
    torch.manual_seed(0)
    model = models.create("resnet56")
    pruner = FilterPruner(model, 0.6, every=1)
    zeros = sum(int((~layer.mask).sum()) * layer.weight[0].numel() for layer in pruner.layers.values())
    assert pruner.sparsity() == pytest.approx(100 * zeros / 855_770)
    assert pruner.kept() == {name: int(layer.mask.sum()) for name, layer in pruner.layers.items()}
    assert sum(pruner.kept().values()) == masks_of(pruner).sum()


def test_a_nan_names_its_layer() -> None:
    model = models.create("resnet20")
    pruner = FilterPruner(model, 0.5)
    with torch.no_grad():
        model.layer2[1].conv1.weight[3, 0, 0, 0] = float("nan")
    before = masks_of(pruner)
    with pytest.raises(RuntimeError, match=r"layer layer2\.1\.conv1: .*NaN or Inf"):
        pruner.update()
    np.testing.assert_array_equal(masks_of(pruner), before)


def test_a_moved_model_is_still_pruned() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    pruner = FilterPruner(model, 0.5, removable_only=False)
    model.to(torch.float64)
    pruner.update()
    np.testing.assert_array_equal(masks_of(pruner), rule([model[0].weight], 0.5))


@pytest.mark.parametrize("importance", ["l1", "l2", "grad", "taylor"])
def test_weight_pruner_follows_the_rule(importance: str) -> None:
    torch.manual_seed(0)
    model = models.create("resnet20")
    pruner = WeightPruner(model, 0.7, importance, every=2)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert pruner.step()
    scores = []
    for layer in pruner.layers.values():
        w, g = layer.weight.detach(), layer.weight.grad
        scores.append({"l1": w.abs(), "l2": w * w, "grad": g.abs(), "taylor": (w * g).abs()}[importance].flatten())
    every = torch.cat(scores).numpy()
    expected = every > np.sort(every)[int(len(every) * 0.7)]
    found = torch.cat([mask.flatten() for mask in pruner.masks().values()]).numpy()
    np.testing.assert_array_equal(found, expected)
    zeros = (~found).sum()
    assert pruner.sparsity() == pytest.approx(100 * zeros / sum(p.numel() for p in model.parameters()))


def test_weight_pruner_with_gradients_starts_after_the_first_step() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    pruner = WeightPruner(model, 0.5, "taylor", every=1)
    assert model[0].mask.all()
    model(torch.randn(2, 3, 5, 5)).square().sum().backward()
    assert pruner.step()
    assert not model[0].mask.all()


def test_weight_pruner_needs_gradients_for_taylor() -> None:
    pruner = WeightPruner(nn.Sequential(nn.Conv2d(3, 8, 3)), 0.5, "taylor")
    with pytest.raises(RuntimeError, match=r"layer 0 has no gradient.*before zero_grad"):
        pruner.update()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"rate": 1.0}, "rate must be in"),
        ({"rate": -0.1}, "rate must be in"),
        ({"rate": 0.5, "every": 0}, "every must be at least 1"),
        ({"rate": 0.5, "steps_per_epoch": 0}, "steps_per_epoch must be at least 1"),
        ({"rate": 0.5, "until": -1}, "until must be at least 0"),
        ({"rate": 0.5, "importance": "l3"}, "importance must be"),
        ({"rate": 0.5, "feedback": "yes"}, "feedback must be"),
    ],
)
def test_bad_arguments(arguments: dict, match: str) -> None:
    for kind in (FilterPruner, WeightPruner):
        model = nn.Sequential(nn.Conv2d(3, 8, 3))
        with pytest.raises(ValueError, match=match):
            kind(model, **arguments)
        assert type(model[0]) is nn.Conv2d, "nothing is changed"


# ------------------------------------------------------------------------------------- schedules, masks, report


@pytest.mark.parametrize(("schedule", "power"), [("linear", 1), ("cubic", 3)])
def test_the_rate_rises(schedule: str, power: int) -> None:
    torch.manual_seed(0)
    pruner = FilterPruner(models.create("resnet20"), 0.6, every=1, min_kept=0, schedule=schedule, ramp_steps=8)
    assert masks_of(pruner).all(), "the ramp begins with nothing pruned"
    weights = [layer.weight for layer in pruner.layers.values()]
    for step in range(1, 12):
        pruner.step()
        rate = 0.6 * (1 - max(1 - step / 8, 0) ** power)
        assert pruner.current_rate == pytest.approx(rate)
        np.testing.assert_array_equal(masks_of(pruner), rule(weights, pruner.current_rate))


def test_a_ramp_ends_with_the_masks_if_not_told_otherwise() -> None:
    pruner = FilterPruner(network(), 0.5, every=1, until=11, schedule="linear")
    for _ in range(5):
        pruner.step()
    assert pruner.current_rate == 0.25
    with pytest.raises(ValueError, match="schedule 'cubic' needs ramp_steps of at least 1"):
        FilterPruner(network(), 0.5, schedule="cubic")


@given(
    every=st.integers(1, 7),
    until=st.integers(9, 60),
    epoch=st.none() | st.integers(7, 20),
    schedule=st.sampled_from(["linear", "cubic"]),
)
def test_the_last_update_of_a_ramp_has_the_whole_rate(every: int, until: int, epoch: int | None, schedule: str) -> None:
    arguments: dict[str, Any] = {"every": every, "until": until, "steps_per_epoch": epoch, "schedule": schedule}
    arguments["removable_only"] = False
    rates = []
    try:
        pruner = FilterPruner(nn.Sequential(nn.Conv2d(1, 8, 1)), 0.5, **arguments)
    except ValueError:  # there is no update to rise to
        constant = FilterPruner(nn.Sequential(nn.Conv2d(1, 8, 1)), 0.5, **(arguments | {"schedule": "constant"}))
        assert not any(constant.step() for _ in range(until))
        return
    while not pruner.frozen:
        if pruner.step():
            rates.append(pruner.current_rate)
    assert rates[-1] == 0.5
    assert rates == sorted(rates)
    with pytest.raises(
        ValueError, match=rf"ramp_steps must be at most \d+, got {until}: the last update before until="
    ):
        FilterPruner(nn.Sequential(nn.Conv2d(1, 8, 1)), 0.5, **arguments, ramp_steps=until)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 4, 1)), *head)


def test_include_and_ignore() -> None:
    assert list(FilterPruner(network(), 0.5, include=["1"]).layers) == ["1.0", "1.1"]
    assert list(FilterPruner(network(), 0.5, include=["1"], ignore=["1.1"]).layers) == ["1.0"]
    model = network()
    assert list(FilterPruner(model, 0.5, include=[model[1]]).layers) == ["1.0", "1.1"]
    with pytest.raises(ValueError, match="include: 'nowhere' is no module of this model"):
        FilterPruner(network(), 0.5, include=["nowhere"])


def test_no_layer_dies_by_default() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight *= 1e-3
    assert FilterPruner(model, 0.5, every=1, min_kept=0).kept()["0"] == 0
    pruner = FilterPruner(model, 0.5, every=1)
    assert pruner.kept()["0"] == 1
    assert int(pruner.masks()["0"].long().argmax()) == int(model[0].weight.abs().mean((1, 2, 3)).argmax())


def test_kept_filters_come_in_multiples() -> None:
    counts = FilterPruner(network(), 0.5, every=1, round_to=4).kept()
    assert all(kept % 4 == 0 or (name, kept) == ("1.0", 6) for name, kept in counts.items())


def test_masks_can_be_exported_set_and_frozen() -> None:
    first, second = FilterPruner(network(), 0.5, every=1), FilterPruner(network(), 0.0, every=4)
    exported = first.export_masks()
    second.set_masks(exported)
    assert all(map(torch.equal, second.masks().values(), exported.values()))
    exported["0"][:] = False
    assert first.masks()["0"].any(), "exported masks are copies"
    assert not second.frozen
    second.freeze()
    assert second.frozen
    before = masks_of(second)
    randomise(second.model)
    assert not any(second.step() for _ in range(8))
    np.testing.assert_array_equal(masks_of(second), before)
    third = FilterPruner(network(), 0.5, every=1)
    third.load_state_dict(second.state_dict())
    assert third.frozen
    assert third.steps == 8
    third.load_state_dict({"steps": 3})  # of an earlier release
    assert not third.frozen


def test_masks_end_frozen() -> None:
    pruner = FilterPruner(network(), 0.5, every=1, until=2)
    assert [pruner.frozen, pruner.step(), pruner.frozen, pruner.step(), pruner.frozen] == [
        *(False, True, False),
        *(False, True),
    ]


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"2": torch.ones(8, dtype=torch.bool)}, "'2' is no masked layer: they are 0, 1.0, 1.1"),
        ({"0": torch.ones(7, dtype=torch.bool)}, r"the mask of 0 must be bool of shape \[8\], got torch.bool of \[7\]"),
        ({"1.0": torch.zeros(6, dtype=torch.bool), "0": torch.ones(8)}, "got torch.float32"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(masks: dict[str, Tensor], said: str) -> None:
    pruner = FilterPruner(network(), 0.5, every=1)
    before = masks_of(pruner)
    with pytest.raises(ValueError, match=said):
        pruner.set_masks(masks)
    np.testing.assert_array_equal(masks_of(pruner), before)


def test_report_says_what_is_kept_and_why() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight *= 1e-3
    pruner = FilterPruner(model, 0.5, every=1, ignore=["1.1"])
    report = pruner.report()
    assert [(layer.name, layer.filters, layer.kept) for layer in report.layers] == [
        *(("0", 8, 1), ("1.0", 6, pruner.kept()["1.0"]), ("1.1", 4, 4)),
    ]
    assert report.layers[0].why == "0 above the global threshold, 1 more for min_kept 1"
    assert "left alone" in report.layers[2].why
    assert report.layers[0].share == pytest.approx(1 / 8)
    text = str(report)
    assert len(text.splitlines()) == 5
    assert f"{report.kept:7,}" in text
    pruner.set_masks(pruner.export_masks())
    assert "set" in pruner.report().layers[0].why
    assert "weights" in WeightPruner(network(), 0.5, every=1).report().layers[0].why


@pytest.mark.filterwarnings("error")
def test_a_model_that_is_masked_already_is_traced_again() -> None:
    model = models.create("resnet20")
    FilterPruner(model, 0.5)
    again = FilterPruner(model, 0.5)
    assert all(layer.feedback is not None and bool((layer.feedback < 0.01).all()) for layer in again.layers.values())


# ---------------------------------------------------------------------------------------- inside other people's loops


class Reads(TorchDispatchMode):
    """Notes the operations, and among them those that wait for a device to tell a value."""

    WAIT = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "item", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name().split("::")[1].split(".")[0])
        return function(*args, **(kwargs or {}))

    @property
    def waited(self) -> list[str]:
        return [name for name in self.names if name in self.WAIT]


OPTIONS: list[dict[str, Any]] = [
    *({"min_kept": 0}, {}, {"importance": "l2"}, {"scope": "layer"}),
    *(
        {"round_to": 4},
        {"schedule": "cubic", "ramp_steps": 9},
        {"example_input": torch.zeros(1, 3, 8, 8), "min_kept": 0},
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("norms_are_known", [False, True])
def test_a_step_waits_for_nothing(options: dict[str, Any], norms_are_known: bool) -> None:
    model = network()
    pruner = FilterPruner(model, 0.5, every=1, **options)
    optimizer = PrunedSGD(model.parameters(), lr=0.1, pruner=pruner if norms_are_known else None)
    model(torch.randn(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    with Reads() as reads:
        assert pruner.step()
    assert reads.waited == []
    measured = {name for name in reads.names if name in ("filter_norms", "update_filter_masks_")}
    if norms_are_known:
        assert not measured, "the optimizer has measured the filters"
    else:
        assert measured == {"update_filter_masks_" if options == {"min_kept": 0} else "filter_norms"}
    with Reads() as control:
        pruner.sparsity()
    assert control.waited, "the test sees what waits"


@pytest.mark.parametrize("min_kept", [0, 1])
def test_scores_that_are_not_finite_leave_masks_as_they_were_set(
    min_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = FilterPruner(network(), 0.5, every=1, min_kept=min_kept)
    masks = {name: ~mask for name, mask in pruner.export_masks().items()}
    pruner.set_masks(masks)
    # As on a GPU, where no error is raised.
    monkeypatch.setattr(importance, "scores", lambda weights, importance: torch.full((18,), torch.inf))
    monkeypatch.setattr(ops, "update_filter_masks_", lambda weights, rate, mask, ord: mask)
    pruner.update()
    assert all(map(torch.equal, pruner.masks().values(), masks.values()))


def test_averaged_models_have_the_masks() -> None:
    model, images = network(), torch.randn(2, 3, 8, 8)
    pruner = FilterPruner(model, 0.5, every=1)
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    averaged.update_parameters(model)
    first = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    randomise(model)
    assert pruner.step()
    averaged.update_parameters(model)
    expected = network()
    with torch.no_grad():
        for name, weight in expected.named_parameters():
            weight.copy_((first[name] + model.get_parameter(name)) / 2)
        for name, mask in pruner.masks().items():
            expected.get_parameter(f"{name}.weight")[~mask] = 0
    torch.testing.assert_close(averaged(images), expected(images))


def test_a_copied_pruner_prunes_the_copied_model() -> None:
    pruner = FilterPruner(network(), 0.5, every=1)
    twin, before = copy.deepcopy(pruner), pruner.export_masks()
    randomise(twin.model)
    assert twin.step()
    assert all(map(torch.equal, pruner.masks().values(), before.values()))
    weights = [layer.weight for layer in twin.model.modules() if isinstance(layer, MaskedConv2d)]
    expected = torch.from_numpy(rule(weights, 0.5))
    assert not torch.equal(torch.cat(list(before.values())), expected)
    assert (torch.from_numpy(masks_of(twin)) | ~expected).all(), "and what min_kept adds"
    assert all(twin.layers[name] is twin.model.get_submodule(name) for name in twin.layers)


def test_report_tells_masks_that_were_loaded() -> None:
    first, second = FilterPruner(network(), 0.5, every=1), FilterPruner(network(), 0.9, every=1)
    second.model.load_state_dict(first.model.state_dict())
    changed = [name for name, mask in first.masks().items() if mask.sum() > 1]  # at rate 0.9 few keep more
    whys = {layer.name: layer.why for layer in second.report().layers}
    assert changed
    assert all(whys[name] == "as loaded, or changed by others than this pruner" for name in changed)


def test_a_ramp_without_a_rising_schedule_is_told() -> None:
    with pytest.raises(ValueError, match="ramp_steps=10 is for a rate that rises: set schedule to linear or cubic"):
        FilterPruner(models.create("resnet20"), 0.5, ramp_steps=10, removable_only=False)
