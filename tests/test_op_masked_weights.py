"""masked_weights and its straight-through gradient against their formulas."""

import cases
import pytest
import torch
from cases import Implementation
from torch import Tensor

from fastprune import ops


def expected_masked(weights: list[Tensor], mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """W · mask, rounded once to the compute dtype."""
    masks = cases.by_layer(mask, weights)
    return [(weight.double() * kept).to(dtype) for weight, kept in zip(weights, masks)]


def expected_gradient(grad: Tensor, kept: Tensor, factors: Tensor | None) -> Tensor:
    """The gradient as it came; that of pruned filters times their factors."""
    scale = torch.ones(()) if factors is None else torch.where(kept, 1.0, factors)
    return grad.double() * scale.double()


@pytest.mark.parametrize("compute", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layers", cases.LAYERS)
def test_values(implementation: Implementation, layers: str, dtype: torch.dtype, compute: torch.dtype) -> None:
    mask = cases.random_mask(cases.LAYERS[layers])
    for layout in cases.layouts_for(implementation, layers, dtype, compute):
        weights = cases.random_weights(cases.LAYERS[layers], dtype, layout)
        masked = ops.masked_weights(weights, mask, compute)
        assert [result.dtype for result in masked] == [compute] * len(weights)
        for result, expected in zip(masked, expected_masked(weights, mask, compute)):
            if dtype == torch.float64 and compute in (torch.bfloat16, torch.float16):
                cases.assert_near(result, expected.double())  # may be rounded through float32
            else:
                assert torch.equal(result, expected)
        like = weights if layout != "unaligned" else [weight.clone() for weight in weights]
        cases.assert_same_layout(masked, like)


def test_whole_network_in_bfloat16(implementation: Implementation) -> None:
    weights = cases.random_weights(cases.RESNET56)
    mask = cases.random_mask(cases.RESNET56)
    masked = ops.masked_weights(weights, mask, torch.bfloat16)
    for result, expected in zip(masked, expected_masked(weights, mask, torch.bfloat16)):
        assert torch.equal(result, expected)


def test_own_dtype_by_default(implementation: Implementation) -> None:
    mask = torch.tensor([True, False])
    (masked,) = ops.masked_weights([torch.ones(2, 3, dtype=torch.float16)], mask)
    assert masked.dtype == torch.float16


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_special_values(implementation: Implementation, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    values = [info.smallest_normal / 4, -info.smallest_normal / 4, info.max, info.min, -0.0, float("inf")]
    weight = torch.tensor(values * 12, dtype=dtype).repeat(2, 1)  # 72 to a filter: vectors and a rest
    (masked,) = ops.masked_weights([weight], torch.tensor([True, True]))
    assert torch.equal(masked, weight)
    assert torch.equal(masked.signbit(), weight.signbit())


def test_overflow_of_the_cast_is_that_of_torch(implementation: Implementation) -> None:
    weight = torch.tensor([[65504.0, 65519.0, 65520.0, -1e6, 1e-8, 6e-8, 2.98e-8]]).repeat(1, 5)
    for compute in (torch.float16, torch.bfloat16):
        (masked,) = ops.masked_weights([weight], torch.tensor([True]), compute)
        assert torch.equal(masked, weight.to(compute))


@pytest.mark.parametrize("held", [float("nan"), float("inf"), -1.0])
def test_pruned_filters_are_positive_zero(implementation: Implementation, held: float) -> None:
    for dtype in cases.DTYPES:
        weight = torch.full((3, 5, 3, 3), held, dtype=dtype)
        (masked,) = ops.masked_weights([weight], torch.tensor([False, True, False]))
        pruned = masked[[0, 2]]
        assert torch.equal(pruned, torch.zeros_like(pruned))
        assert not pruned.signbit().any()


def test_empty_list(implementation: Implementation) -> None:
    assert ops.masked_weights([], torch.empty(0, dtype=torch.bool)) == []
    with pytest.raises(RuntimeError, match=r"mask must be a contiguous bool tensor of shape \[0\]"):
        ops.masked_weights([], torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("feedback", ["none", "ones", "factors", "zeros"])
@pytest.mark.parametrize("compute", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradient(implementation: Implementation, dtype: torch.dtype, compute: torch.dtype, feedback: str) -> None:
    shapes = [*cases.LAYERS["mixed"], (17, 49)]
    n, mask = cases.count_filters(shapes), cases.random_mask(shapes)
    choices = {"none": None, "ones": torch.ones(n), "zeros": torch.zeros(n)}
    factors = choices.get(feedback, torch.linspace(-0.5, 3, n))
    for layout in ("contiguous", "channels-last"):
        weights = [weight.requires_grad_() for weight in cases.random_weights(shapes, dtype, layout)]
        upstream = cases.random_weights(shapes, compute, layout, seed=1)
        masked = ops.masked_weights(weights, mask, compute, factors)
        gradients = torch.autograd.grad(masked, weights, upstream)
        cases.assert_same_layout(gradients, weights)
        parts = cases.by_layer(mask, weights)
        scales = [None] * len(weights) if factors is None else cases.by_layer(factors, weights)
        for gradient, grad, kept, scale in zip(gradients, upstream, parts, scales):
            assert gradient.dtype == dtype
            # Products are float32 ones unless the gradient that arrives is float64.
            coarse = torch.float32 if dtype == torch.float64 and compute != torch.float64 else dtype
            cases.assert_near(gradient, expected_gradient(grad, kept, scale), computed_in=coarse)


def test_gradients_of_any_layout_and_of_unused_layers(implementation: Implementation) -> None:
    weights = [weight.requires_grad_() for weight in cases.random_weights([(6, 5, 3, 3), (4, 7, 3, 3), (3, 8)])]
    mask = cases.random_mask([(13,)])
    masked = ops.masked_weights(weights, mask)
    upstream = torch.randn(5, 6, 3, 3).transpose(0, 1)  # neither contiguous nor channels_last
    loss = (masked[0] * upstream).sum() + 3 * masked[2].sum()
    first, unused, expanded = torch.autograd.grad(loss, weights)
    assert torch.equal(first, upstream)
    assert torch.equal(unused, torch.zeros_like(unused))
    assert torch.equal(expanded, torch.full_like(expanded, 3))


def test_frozen_weights_get_no_gradient(implementation: Implementation) -> None:
    frozen, trained = cases.random_weights([(4, 3), (5, 3)])
    trained.requires_grad_()
    masked = ops.masked_weights([frozen, trained], cases.random_mask([(9,)]))
    (masked[0].sum() + 2 * masked[1].sum()).backward()
    assert frozen.grad is None
    assert trained.grad is not None
    assert torch.equal(trained.grad, torch.full_like(trained, 2))


def test_a_pruned_filter_can_come_back(implementation: Implementation) -> None:
    weight = torch.tensor([[1.0], [0.5]], requires_grad=True)
    mask = ops.filter_mask([weight], 0.0)
    assert mask.tolist() == [True, False]
    (masked,) = ops.masked_weights([weight], mask)
    (-masked).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        weight -= torch.tensor([[0.0], [1.0]]) * weight.grad
    assert ops.filter_mask([weight], 0.0).tolist() == [False, True]


def test_feedback_0_stops_every_gradient(implementation: Implementation) -> None:
    weight, mask = torch.randn(2, 3), torch.tensor([True, False])
    grad = torch.tensor([[1.0, torch.inf, 2.0], [torch.inf, torch.nan, 3.0]])
    result = torch.ops.fastprune.masked_weights_backward([grad], mask, weight.dtype, torch.zeros(2))[0]
    assert torch.equal(result, torch.tensor([[1.0, torch.inf, 2.0], [0.0, 0.0, 0.0]]))


def test_second_derivative(implementation: Implementation) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 4, requires_grad=True)
    mask, feedback = torch.tensor([True, False, True]), torch.tensor([0.5, 0.25, 0.5])
    (masked,) = ops.masked_weights([weight], mask, torch.float32, feedback)
    (first,) = torch.autograd.grad((masked**3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    # d/dw of scale · 3 (w ⊙ mask)², straight-through once more: scale² · 6 (w ⊙ mask).
    torch.testing.assert_close(second, 6 * (weight * mask[:, None]).detach())
