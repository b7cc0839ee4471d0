"""sgd_step_ against its formula in float64, against torch.optim.SGD, and what it writes besides the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
from cases import Implementation
from torch import Tensor

from fastprune import ops

# Besides the convolutions: vectors, a scalar, a matrix of several runs, and one with nothing in it.
OTHERS: cases.Shapes = [(16,), (), (37, 221), (0, 5), (4097,)]
HYPER: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.05},
    "maximize": {"weight_decay": 0.05, "maximize": True},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01, "maximize": True},
}


@dataclass
class State:
    """The tensors of a step: the first `layers` params are filters."""

    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    layers: int

    def copy(self) -> State:
        lists = [[tensor.clone() for tensor in each] for each in (self.params, self.grads, self.momenta)]
        return State(*lists, self.layers)

    def step(self, **arguments: Any) -> None:
        momenta = self.momenta if arguments.get("momentum") else []
        ops.sgd_step_(self.params, self.grads, momenta, **arguments)

    @property
    def weights(self) -> list[Tensor]:
        return self.params[: self.layers]

    @property
    def channels(self) -> int:
        """M."""
        return sum(weight.shape[1] for weight in self.weights)


def state_of(layers: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> State:
    shapes = [*cases.ALL_LAYERS[layers], *OTHERS]
    made = [cases.random_weights(shapes, dtype, layout, seed=seed) for seed in range(3)]
    return State(*made, len(cases.ALL_LAYERS[layers]))


def expected(state: State, lr: float, inverse: float = 1.0, first: bool = False, **hyper: Any) -> State:
    """torch.optim.SGD's documented formula, in float64."""
    want = state.copy()
    for i, (param, grad, momentum) in enumerate(zip(want.params, want.grads, want.momenta)):
        w, g, b = param.double(), grad.double() * inverse, momentum.double()
        if hyper.get("maximize"):
            g = -g
        g = g + hyper.get("weight_decay", 0) * w
        mu = hyper.get("momentum", 0)
        if mu:
            b = g if first else mu * b + (1 - hyper.get("dampening", 0)) * g
            g = g + mu * b if hyper.get("nesterov") else b
        want.params[i], want.momenta[i] = w - lr * g, b
    return want


@pytest.mark.parametrize("hyper", HYPER)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_steps_by_the_formula(implementation: Implementation, dtype: torch.dtype, hyper: str) -> None:
    for layers in cases.LAYERS:
        for layout in cases.layouts_for(implementation, layers, dtype, hyper):
            for arguments in ({}, {"first": True}, {"grad_scale": torch.tensor(48.0)}):
                state = state_of(layers, dtype, layout)
                before = state.copy()
                inverse = (1 / arguments.get("grad_scale", torch.tensor(1.0))).item()
                want = expected(state, 0.1, inverse, "first" in arguments, **HYPER[hyper])
                state.step(lr=0.1, layers=state.layers, **arguments, **HYPER[hyper])
                for param, value in zip(state.params, want.params):
                    cases.assert_near(param, value, "params")
                for momentum, value in zip(state.momenta, want.momenta):
                    cases.assert_near(momentum, value, "momenta")
                assert all(map(torch.equal, state.grads, before.grads))


def test_whole_network(implementation: Implementation) -> None:
    state = state_of("resnet56")
    want = expected(state, 0.1, **HYPER["nesterov"])
    state.step(lr=0.1, **HYPER["nesterov"])
    for param, value in zip(state.params, want.params):
        cases.assert_near(param, value)


@pytest.mark.parametrize("form", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("hyper", HYPER)
def test_equals_torch_over_steps(implementation: Implementation, hyper: str, form: dict[str, bool]) -> None:
    state = state_of("mixed")
    theirs = [param.clone().requires_grad_() for param in state.params]
    optimizer = torch.optim.SGD(theirs, lr=0.05, **HYPER[hyper], **form)
    for step in range(5):
        grads = cases.random_weights([tuple(param.shape) for param in theirs], seed=step)
        for param, grad in zip(theirs, grads):
            param.grad = grad.clone()
        optimizer.step()
        state.grads = grads
        state.step(lr=0.05, first=step == 0, **HYPER[hyper])
    for param, other in zip(state.params, theirs):
        cases.assert_near(param, other.detach().double())


def test_first_step_reads_no_momentum(implementation: Implementation) -> None:
    state = state_of("mixed")
    for momentum in state.momenta:
        momentum.fill_(torch.nan)
    state.step(lr=0.1, first=True, momentum=0.9, dampening=0.5)
    assert all(map(torch.equal, state.momenta, state.grads))


def test_without_weight_decay_the_gradient_does_not_meet_the_weight(implementation: Implementation) -> None:
    weight, grad = torch.full((3,), torch.inf), torch.ones(3)
    momentum = torch.zeros(3)
    ops.sgd_step_([weight], [grad], [momentum], lr=0.1, momentum=0.9)
    assert torch.equal(momentum, grad)
    assert torch.equal(weight, torch.full((3,), torch.inf))


# ------------------------------------------------------------------------------------------- what else is written


@pytest.mark.parametrize("compute", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_masked_weights_and_norms_are_those_of_the_new_weights(
    implementation: Implementation, dtype: torch.dtype, compute: torch.dtype
) -> None:
    for layers in cases.LAYERS:
        for layout in cases.layouts_for(implementation, layers, dtype, compute):
            state, mask = state_of(layers, dtype, layout), cases.random_mask(cases.LAYERS[layers])
            masked = [torch.full_like(weight, torch.nan, dtype=compute) for weight in state.weights]
            for ord in (1, 2):
                norms = torch.full((len(mask),), torch.nan)
                outputs = {"layers": state.layers, "mask": mask, "masked": masked, "norms": norms, "ord": ord}
                state.step(lr=0.1, momentum=0.9, **outputs)
                for result, want in zip(masked, ops.masked_weights(state.weights, mask, compute)):
                    assert torch.equal(result, want)
                assert torch.equal(norms, ops.filter_norms(state.weights, ord))


def test_outputs_are_wanted_one_by_one(implementation: Implementation) -> None:
    state, mask = state_of("mixed"), cases.random_mask(cases.LAYERS["mixed"])
    want = state.copy()
    want.step(lr=0.1)
    masked = [torch.empty_like(weight) for weight in state.weights]
    only_masked, only_norms, neither = state.copy(), state.copy(), state.copy()
    only_masked.step(lr=0.1, layers=state.layers, mask=mask, masked=masked)
    norms = torch.empty(len(mask))
    only_norms.step(lr=0.1, layers=state.layers, norms=norms)
    neither.step(lr=0.1, layers=2, mask=mask[:24])
    assert all(map(torch.equal, masked, ops.masked_weights(want.weights, mask)))
    assert torch.equal(norms, ops.filter_norms(want.weights))
    for result in (only_masked, only_norms, neither):
        assert all(map(torch.equal, result.params, want.params))


def test_pruned_filters_are_positive_zero(implementation: Implementation) -> None:
    weight, masked = torch.full((2, 3), -1.0), [torch.full((2, 3), torch.nan)]
    ops.sgd_step_([weight], [-weight], lr=0.1, layers=1, mask=torch.tensor([False, True]), masked=masked)
    assert masked[0].tolist() == [[0.0] * 3, [pytest.approx(-1.1)] * 3]
    assert not masked[0][0].signbit().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_norms_that_are_not_finite_are_nan(implementation: Implementation, dtype: torch.dtype, bad: float) -> None:
    weights = cases.random_weights([(4, 3, 3, 3), (3, 70)], dtype)
    weights[1][2, 69] = bad
    norms = torch.zeros(7)
    ops.sgd_step_(weights, [torch.zeros_like(weight) for weight in weights], lr=0.1, layers=2, norms=norms)
    assert norms.isnan().tolist() == [False] * 6 + [True]


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("first", [False, True])
def test_found_inf_leaves_everything_but_what_is_derived(
    implementation: Implementation, first: bool, shape: tuple[int, ...]
) -> None:
    state, mask = state_of("mixed"), cases.random_mask(cases.LAYERS["mixed"])
    state.grads[1].fill_(torch.inf)
    before, norms = state.copy(), torch.full((len(mask),), torch.nan)
    channel_norms, want = (torch.full((state.channels,), torch.nan) for _ in range(2))
    masked = [torch.full_like(weight, torch.nan) for weight in state.weights]
    scalars = {"grad_scale": torch.full(shape, 8.0), "found_inf": torch.ones(shape)}
    outputs = {"layers": state.layers, "mask": mask, "masked": masked, "norms": norms, "channel_norms": channel_norms}
    state.step(lr=0.1, momentum=0.9, weight_decay=0.1, first=first, **scalars, **outputs)
    assert all(map(torch.equal, state.params, before.params))
    assert all(map(torch.equal, state.momenta, before.momenta))
    assert all(map(torch.equal, masked, ops.masked_weights(before.weights, mask)))
    assert torch.equal(norms, ops.filter_norms(before.weights))
    unmoved = before.copy()
    unmoved.grads = [torch.zeros_like(grad) for grad in before.grads]
    unmoved.step(lr=0.1, layers=before.layers, channel_norms=want)
    assert torch.equal(channel_norms, want)
    state, before = state_of("mixed"), state_of("mixed")
    state.step(lr=0.1, found_inf=torch.zeros(shape))
    before.step(lr=0.1)
    assert all(map(torch.equal, state.params, before.params))


def test_empty_list(implementation: Implementation) -> None:
    ops.sgd_step_([], [], [], lr=0.1, momentum=0.9)
    ops.sgd_step_([torch.empty(0)], [torch.empty(0)], lr=0.1)
    with pytest.raises(RuntimeError, match="grads must have one tensor for each of 0 params, got 1"):
        ops.sgd_step_([], [torch.ones(3)], lr=0.1)
    with pytest.raises(RuntimeError, match=r"channel_norms must be a contiguous float32 tensor of shape \[0\]"):
        ops.sgd_step_([], [], lr=0.1, channel_norms=torch.ones(3))


def test_every_tensor_that_is_written_counts_as_changed(registered: Implementation) -> None:
    state, norms = state_of("mixed"), torch.zeros(cases.count_filters(cases.LAYERS["mixed"]))
    masked = [torch.empty_like(weight) for weight in state.weights]
    channel_norms, lr, decay = torch.zeros(state.channels), torch.tensor(0.1), torch.zeros_like(norms)
    written = [*state.params, *state.momenta, *masked, norms, channel_norms]
    read = [*state.grads, mask := cases.random_mask(cases.LAYERS["mixed"]), lr, decay]
    versions, unread = [tensor._version for tensor in written], [tensor._version for tensor in read]
    outputs = {"mask": mask, "masked": masked, "norms": norms, "channel_norms": channel_norms}
    state.step(lr=lr, momentum=0.9, layers=state.layers, filter_decay=decay, **outputs)
    assert all(tensor._version > version for tensor, version in zip(written, versions))
    assert [tensor._version for tensor in read] == unread


def test_leaves_that_require_gradients_are_stepped(registered: Implementation) -> None:
    weight = torch.ones(2, 3, requires_grad=True)
    loss = (weight * weight).sum()
    ops.sgd_step_([weight], [torch.ones(2, 3)], lr=0.5)
    assert weight.requires_grad
    assert torch.equal(weight, torch.full((2, 3), 0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_allocates_nothing() -> None:
    # Promised by the compiled implementations; the reference may.
    state, mask = state_of("resnet56"), cases.random_mask(cases.RESNET56)
    masked = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in state.weights]
    outputs = {"layers": state.layers, "mask": mask, "masked": masked, "norms": torch.empty(len(mask))}
    outputs |= {"channel_norms": torch.empty(state.channels), "lr": torch.tensor(0.1)}
    for compiled in cases.COMPILED:
        with (
            cases.active(compiled),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        ):
            state.step(momentum=0.9, **outputs)
        names = {event.name for event in profile.events()}
        assert "fastprune::sgd_step_" in names
        assert not any("empty" in name for name in names)
        assert all(event.cpu_memory_usage <= 0 for event in profile.events())


def test_same_bits_in_every_run_and_for_every_number_of_threads(implementation: Implementation) -> None:
    start, shapes = state_of("resnet56"), [*cases.RESNET56, (300, 1501), (70_001,)]
    start.params, start.grads, start.momenta = (cases.random_weights(shapes, seed=seed) for seed in range(3))
    mask, threads = cases.random_mask(cases.RESNET56), torch.get_num_threads()
    runs = []
    try:
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            state, norms = start.copy(), torch.empty(len(mask))
            masked = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in state.weights]
            channel_norms = torch.empty(sum(shape[1] for shape in cases.RESNET56))
            outputs = {"layers": state.layers, "mask": mask, "masked": masked, "norms": norms}
            state.step(lr=0.1, **outputs, channel_norms=channel_norms, **HYPER["nesterov"])
            runs.append([*state.params, *state.momenta, *masked, norms, channel_norms])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, runs[0], runs[1]))
    if implementation.backend != "reference":  # its sums are PyTorch's, which promise less
        assert all(map(torch.equal, runs[0], runs[2]))


# -------------------------------------------------------------------------------------------------- wrong arguments

W, V = torch.ones(8, 3), torch.ones(5)
PARAMS = [W, V]
MASK = torch.ones(8, dtype=torch.bool)
LIKE = "must have the shape, dtype, strides and device of params"
ONE = "must be one float32, got"
SHARE = "must share one dtype of float32, float64, bfloat16, float16;"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "too many layers": ({"layers": 3}, "layers must be in [0, 2], the number of params, got 3"),
    "negative layers": ({"layers": -1}, "layers must be in [0, 2], the number of params, got -1"),
    "dtypes": ({"params": [W, V.double()]}, f"params {SHARE} params[1] has float64"),
    "complex": ({"params": [W, torch.ones(5, dtype=torch.complex64)]}, f"params {SHARE} params[1] has complex64"),
    "no filters": (
        {"layers": 2},
        "params[1] must be [filters, ...] with at least one filter and element, got [5]",
    ),
    "not filter-major": (
        {"params": [torch.ones(3, 8).T, V], "layers": 1},
        "params[0] must be contiguous or channels_last (each filter one dense run), got strides [1, 8]",
    ),
    "with gaps": (
        {"params": [W, torch.ones(10)[::2]]},
        "params[1] must be dense (one run of memory, in whatever order), got strides [2]",
    ),
    "expanded": (
        {"params": [W, torch.ones(1).expand(5)]},
        "params[1] must be dense (one run of memory, in whatever order), got strides [0]",
    ),
    "few grads": ({"grads": [W]}, "grads must have one tensor for each of 2 params, got 1"),
    "grad shape": ({"grads": [W, torch.ones(6)]}, f"grads[1] {LIKE}[1]"),
    "grad dimensions": ({"grads": [W, torch.ones(5, 1)]}, f"grads[1] {LIKE}[1]"),
    "grad dtype": ({"grads": [W.half(), V]}, f"grads[0] {LIKE}[0]"),
    "grad strides": ({"grads": [torch.ones(3, 8).T, V]}, f"grads[0] {LIKE}[0]"),
    "no momenta": ({"momentum": 0.9}, "momenta must have one tensor for each of 2 params, got 0"),
    "momenta": ({"momenta": PARAMS}, "without momentum there are no momenta, got 2"),
    "momentum strides": (
        {"momentum": 0.9, "momenta": [torch.ones(3, 8).T, V]},
        f"momenta[0] {LIKE}[0]",
    ),
    "nesterov": ({"nesterov": True}, "nesterov takes a momentum above 0 and no dampening"),
    "dampened nesterov": (
        {"nesterov": True, "momentum": 0.9, "dampening": 0.1, "momenta": PARAMS},
        "nesterov takes a momentum above 0 and no dampening",
    ),
    "scale dtype": ({"grad_scale": torch.ones((), dtype=torch.float64)}, f"grad_scale {ONE} float64 []"),
    "scales": ({"grad_scale": torch.ones(2)}, f"grad_scale {ONE} float32 [2]"),
    "found_inf": ({"found_inf": torch.tensor(False)}, f"found_inf {ONE} bool []"),
    "no mask": ({"layers": 1, "masked": [W]}, "masked weights take a mask"),
    "mask": (
        {"layers": 1, "mask": MASK[:7], "masked": [W]},
        "mask must be a contiguous bool tensor of shape [8] (one entry per filter), got bool [7]",
    ),
    "masked": (
        {"layers": 1, "mask": MASK, "masked": [W, W]},
        "masked must have one tensor for each of 1 layers, got 2",
    ),
    "masked dtype": ({"layers": 1, "mask": MASK, "masked": [W.int()]}, f"masked {SHARE} masked[0] has int32"),
    "masked shape": (
        {"layers": 1, "mask": MASK, "masked": [torch.ones(8, 4)]},
        "masked[0] must have the shape, strides and device of params[0]",
    ),
    "norms": (
        {"layers": 1, "norms": torch.ones(8).double()},
        "norms must be a contiguous float32 tensor of shape [8] (one entry per filter), got float64 [8]",
    ),
    "lr": ({"lr": torch.ones((), dtype=torch.float16)}, "lr must be one float32 or float64, got float16 []"),
    "several lr": ({"lr": torch.ones(2)}, "lr must be one float32 or float64, got float32 [2]"),
    "filter decay": (
        {"layers": 1, "filter_decay": torch.ones(7)},
        "filter_decay must be a contiguous float32 tensor of shape [8] (one entry per filter), got float32 [7]",
    ),
    "filter decay dtype": (
        {"layers": 1, "filter_decay": torch.ones(8).half()},
        "filter_decay must be a contiguous float32 tensor of shape [8] (one entry per filter), got float16 [8]",
    ),
    "channel norms": (
        {"layers": 1, "channel_norms": torch.ones(8)},
        "channel_norms must be a contiguous float32 tensor of shape [3] (one entry per input channel), got float32 [8]",
    ),
    "channel norms dtype": (
        {"layers": 1, "channel_norms": torch.ones(3).double()},
        "channel_norms must be a contiguous float32 tensor of shape [3] (one entry per input channel), got float64 [3]",
    ),
    "channel norms with gaps": (
        {"layers": 1, "channel_norms": torch.ones(6)[::2]},
        "channel_norms must be a contiguous float32 tensor of shape [3] (one entry per input channel), got float32 [3]",
    ),
    "ord": ({"ord": 3}, "ord must be 1 (mean |w|) or 2 (mean w^2), got 3"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_change_nothing(registered: Implementation, wrong: str) -> None:
    changed, expected = WRONG[wrong]
    arguments: dict[str, Any] = {"params": PARAMS, "grads": PARAMS, "lr": 0.1} | changed
    tensors = [tensor for value in arguments.values() if isinstance(value, list) for tensor in value]
    before = [tensor.clone() for tensor in tensors]
    call: Callable[[], None] = lambda: ops.sgd_step_(**arguments)  # noqa: E731
    with pytest.raises(RuntimeError) as caught:
        call()
    assert str(caught.value).splitlines()[0] == f"sgd_step_: {expected}"
    assert all(map(torch.equal, tensors, before))


def test_fakes_check_too() -> None:
    with torch.device("meta"):
        params = [torch.ones(8, 3), torch.ones(5)]
    with pytest.raises(RuntimeError, match=r"grads\[1\] must have the shape"):
        ops.sgd_step_(params, [params[0], params[1][:4]], lr=0.1)
