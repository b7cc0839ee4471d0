"""sgd_step_: the learning rate as a tensor, weight decay by filter, and the norms of input channels."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Implementation
from test_op_sgd_step import expected, state_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastprune import ops

# --------------------------------------------------------------------------------------------------- learning rate


@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_the_learning_rate_is_what_its_tensor_holds(
    implementation: Implementation, dtype: torch.dtype, lr_dtype: torch.dtype
) -> None:
    for shape in ((), (1,)):
        lr, state = torch.zeros(shape, dtype=lr_dtype), state_of("one-element", dtype)
        for value in (0.3, 0.05):
            lr.fill_(value)
            want = expected(state, lr.double().item(), momentum=0.9)
            state.step(lr=lr, momentum=0.9)
            for param, exact in zip(state.params, want.params):
                cases.assert_near(param, exact, "params")


def test_a_number_is_a_learning_rate_of_float64(implementation: Implementation) -> None:
    states = [state_of("mixed", torch.float64) for _ in range(3)]
    for state, lr in zip(states, (0.1, torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1))):
        state.step(lr=lr)
    number, double, single = ([*state.params] for state in states)
    assert all(map(torch.equal, number, double))
    assert not all(map(torch.equal, number, single))


@pytest.mark.parametrize("capturing", [False, True])
def test_a_graph_takes_no_number(monkeypatch: pytest.MonkeyPatch, capturing: bool) -> None:
    with FakeTensorMode():
        weight, grad, lr = (torch.ones(1, device="cuda") for _ in range(3))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        ops.sgd_step_([weight], [grad], lr=lr)
        if capturing:
            with pytest.raises(RuntimeError, match="sgd_step_: lr must be a tensor on cuda:0 while a CUDA graph is"):
                ops.sgd_step_([weight], [grad], lr=0.1)
        else:
            ops.sgd_step_([weight], [grad], lr=0.1)


def test_tensors_of_another_device_are_refused() -> None:
    with FakeTensorMode():
        weight = torch.ones(3, 2, device="cuda")
        vectors = {"norms": 3, "filter_decay": 3, "channel_norms": 2}
        here = [("lr", {"lr": torch.tensor(0.1)})] + [(name, {name: torch.ones(n)}) for name, n in vectors.items()]
        for name, arguments in here:
            with pytest.raises(RuntimeError, match=f"sgd_step_: {name} must be on the device of params"):
                ops.sgd_step_([weight], [weight.clone()], layers=1, **({"lr": 0.1} | arguments))


# ---------------------------------------------------------------------------------------------------- weight decay


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_decay_by_filter(implementation: Implementation, dtype: torch.dtype, weight_decay: float) -> None:
    hyper = {"momentum": 0.8, "nesterov": True}
    for layers in ("mixed", "many-filters"):
        for layout in cases.layouts_for(implementation, layers, dtype, weight_decay):
            state = state_of(layers, dtype, layout)
            filters = cases.count_filters(cases.LAYERS[layers])
            decay = torch.rand(filters, generator=torch.Generator().manual_seed(1)) - 0.3
            want = expected(state, 0.1, weight_decay=weight_decay, **hyper)
            # d, and with it b and (1 + momentum) · lr · d, is linear in the decay.
            for i, own in enumerate(cases.by_layer(decay.double(), state.weights)):
                more = own * state.params[i].double()
                want.momenta[i] = want.momenta[i] + more
                want.params[i] = want.params[i] - 0.1 * 1.8 * more
            state.step(lr=0.1, layers=state.layers, weight_decay=weight_decay, filter_decay=decay, **hyper)
            for result, exact in zip([*state.params, *state.momenta], [*want.params, *want.momenta]):
                cases.assert_near(result, exact)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_where_both_decays_are_together_0_the_gradient_does_not_meet_the_weight(
    implementation: Implementation, dtype: torch.dtype
) -> None:
    weight, grad = torch.full((3, 2), torch.inf, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    momentum, bias = torch.zeros_like(grad), torch.zeros(1, dtype=dtype)
    decay = torch.tensor([-0.25, 0.25, -0.25])
    step = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.25, "layers": 1, "filter_decay": decay}
    ops.sgd_step_([weight, bias], [grad, bias.clone()], [momentum, bias.clone()], **step)
    assert torch.equal(momentum[[0, 2]], grad[[0, 2]])
    assert momentum[1].isinf().all()


# -------------------------------------------------------------------------------------------------- input channels

# Depthwise and grouped, one filter, more channels than a block of the GPU adds up at once, a kernel as wide, 1×1.
CHANNELS: cases.Shapes = [(12, 1, 3, 3), (8, 2, 3, 3), (1, 5, 3, 1), (3, 130), (2, 3, 11, 7), (70, 1, 1, 1)]


def measured(weights: list[Tensor], ord: int, **step: float) -> Tensor:
    norms = torch.full((sum(weight.shape[1] for weight in weights),), torch.nan)
    grads = [torch.zeros_like(weight) for weight in weights]
    ops.sgd_step_(weights, grads, lr=0.1, layers=len(weights), channel_norms=norms, ord=ord, **step)
    return norms


def exact_norms(weights: list[Tensor], ord: int) -> Tensor:
    rows = [weight.double().transpose(0, 1).flatten(1) for weight in weights]
    return torch.cat([row.abs().pow(ord).mean(1) for row in rows])


@pytest.mark.parametrize("shapes", ["own", *cases.LAYERS])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_channel_norms_are_those_of_the_new_weights(
    implementation: Implementation, dtype: torch.dtype, shapes: str
) -> None:
    for layout in cases.layouts_for(implementation, shapes, dtype, "channels"):
        weights = cases.random_weights(cases.LAYERS.get(shapes, CHANNELS), dtype, layout)
        for ord in (1, 2):
            norms = measured(weights, ord, weight_decay=0.3)
            cases.assert_near(norms, exact_norms(weights, ord), "channel_norms", torch.float32)


def test_channels_lie_in_whatever_order(implementation: Implementation) -> None:
    # Filters are dense in memory; within them channels are the slowest, the middle or the fastest dimension.
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (0, 3, 1, 2), (0, 3, 2, 1), (0, 2, 3, 1)):
        back = [order.index(d) for d in range(4)]
        weight = cases.random_weights([(7, 6, 3, 5)])[0].permute(order).contiguous().permute(back)
        assert weight.shape == (7, 6, 3, 5)
        cases.assert_near(measured([weight], 1), exact_norms([weight], 1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_channel_norms_that_are_not_finite_are_nan(
    implementation: Implementation, dtype: torch.dtype, bad: float
) -> None:
    weights = cases.random_weights([(4, 3, 3, 3), (3, 70)], dtype)
    weights[0][3, 1, 2, 2] = bad
    weights[1][2, 69] = bad
    assert measured(weights, 1).isnan().nonzero().flatten().tolist() == [1, 72]


def test_channel_norms_whose_sum_float32_cannot_hold(implementation: Implementation) -> None:
    weight = torch.full((9, 2, 3, 3), 3.3e38, dtype=torch.bfloat16)
    assert torch.equal(measured([weight], 1), weight[0, :, 0, 0].float())


def test_without_filters_there_are_no_channels(implementation: Implementation) -> None:
    vector, nothing = torch.ones(3), torch.empty(0)
    step = {"filter_decay": nothing, "norms": nothing.clone(), "channel_norms": nothing.clone()}
    ops.sgd_step_([vector], [torch.ones(3)], lr=0.5, **step)
    assert torch.equal(vector, torch.full((3,), 0.5))


def test_channel_norms_change_nothing_else(implementation: Implementation) -> None:
    alone, beside = state_of("mixed"), state_of("mixed")
    n = cases.count_filters(cases.LAYERS["mixed"])
    norms, norms_beside = torch.empty(n), torch.empty(n)
    alone.step(lr=0.1, layers=alone.layers, norms=norms)
    beside.step(lr=0.1, layers=beside.layers, norms=norms_beside, channel_norms=torch.empty(beside.channels))
    assert all(map(torch.equal, [*alone.params, norms], [*beside.params, norms_beside]))
