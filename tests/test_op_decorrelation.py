"""decorrelation and its gradient against float64 formulas differentiated by autograd, and its degenerate cases."""

import functools
from collections.abc import Callable

import cases
import pytest
import torch
from cases import Implementation
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune import ops

KINDS = ("covariance", "kernel-covariance", "correlation", "orthogonality")
GOLDEN = (1 + 5**0.5) / 2

property_test = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# The formulas of the contract, for one layer of kept filters [n, C, kh, kw] (or [n, K]), float64.


def summed_triangle(covariance: Tensor, include_diagonal: bool) -> Tensor:
    return covariance.abs().triu(0 if include_diagonal else 1).sum()


def covariance(weight: Tensor, include_diagonal: bool) -> Tensor:
    rows = weight.flatten(1)
    if rows.shape[1] == 1:
        return rows.sum() * 0
    centred = rows - rows.mean(1, keepdim=True)
    return summed_triangle(centred @ centred.T / (rows.shape[1] - 1), include_diagonal)


def kernel_covariance(weight: Tensor, include_diagonal: bool) -> Tensor:
    if weight.dim() != 4 or weight.shape[3] == 1:
        return weight.sum() * 0
    slices = weight.flatten(0, 1)  # [F·C, kh, kw]
    centred = slices - slices.mean(2, keepdim=True)
    return summed_triangle(torch.bmm(centred, centred.mT) / (weight.shape[3] - 1), include_diagonal)


def correlation(weight: Tensor, include_diagonal: bool) -> Tensor:
    rows = weight.flatten(1)
    if rows.shape[0] < 2 or rows.shape[1] < 2:
        return rows.sum() * 0
    pearson = torch.corrcoef(rows)
    return (pearson - pearson.diag().diag()).norm() / rows.shape[0]


def orthogonality(weight: Tensor, include_diagonal: bool) -> Tensor:
    rows = weight.flatten(1)
    size = rows.shape[1]
    matrix = rows.T @ rows - torch.eye(size, dtype=rows.dtype)
    start = torch.arange(1, size + 1, dtype=torch.float64).mul(GOLDEN).frac() - 0.5
    once = matrix @ start
    return (matrix @ once).square().sum() / once.square().sum()


FORMULAS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "covariance": covariance,
    "kernel-covariance": kernel_covariance,
    "correlation": correlation,
    "orthogonality": orthogonality,
}


def expected(
    weights: list[Tensor], kind: str, include_diagonal: bool, mask: Tensor | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The penalty and its gradients; filters that are masked out are not even given to the formula."""
    doubles = [weight.detach().double().contiguous().requires_grad_() for weight in weights]
    total = torch.zeros((), dtype=torch.float64)
    masks = [None] * len(doubles) if mask is None else mask.split([len(weight) for weight in doubles])
    for weight, kept in zip(doubles, masks):
        total = total + FORMULAS[kind](weight if kept is None else weight[kept], include_diagonal)
    return total.detach(), torch.autograd.grad(total, doubles)


LAYERS = {**cases.ALL_LAYERS, "resnet56 in part": cases.RESNET56[::6]}


@functools.cache
def expected_of_case(
    layers: str, dtype: torch.dtype, layout: str, kind: str, include_diagonal: bool, masked: bool
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same for a case of the table, computed once for all implementations."""
    shapes = LAYERS[layers]
    mask = cases.random_mask(shapes) if masked else None
    return expected(cases.random_weights(shapes, dtype, layout), kind, include_diagonal, mask)


def penalty_and_gradients(
    weights: list[Tensor],
    kind: str,
    include_diagonal: bool = True,
    mask: Tensor | None = None,
    precision: str = "highest",
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The op's; the penalty is scaled before the backward, so that the incoming gradient counts."""
    leaves = [weight.detach().requires_grad_() for weight in weights]
    penalty = ops.decorrelation(leaves, kind, include_diagonal, mask, precision)
    gradients = torch.autograd.grad(penalty * 64, leaves)
    return penalty.detach(), tuple(gradient / 64 for gradient in gradients)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layers", cases.LAYERS)
def test_values_and_gradients(
    implementation: Implementation, layers: str, dtype: torch.dtype, kind: str, masked: bool
) -> None:
    shapes = cases.LAYERS[layers]
    mask = cases.random_mask(shapes) if masked else None
    for layout in cases.layouts_for(implementation, layers, dtype, kind, masked):
        include_diagonal = layout != "channels-last"
        weights = cases.random_weights(shapes, dtype, layout)
        penalty, gradients = penalty_and_gradients(weights, kind, include_diagonal, mask)
        want, want_gradients = expected_of_case(layers, dtype, layout, kind, include_diagonal, masked)
        assert penalty.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        cases.assert_near(penalty, want, f"penalty, {layout}")
        for i, (gradient, want_gradient, weight) in enumerate(zip(gradients, want_gradients, weights)):
            assert gradient.dtype == dtype
            assert gradient.stride() == weight.stride()
            cases.assert_near(gradient, want_gradient, f"gradient {i}, {layout}")


@pytest.mark.parametrize("kind", KINDS)
def test_whole_network(implementation: Implementation, kind: str) -> None:
    # Interpreted, the whole one takes six minutes.
    in_part = implementation in cases.INTERPRETED and kind == "kernel-covariance"
    layers = "resnet56 in part" if in_part else "resnet56"
    weights = cases.random_weights(LAYERS[layers], layout="channels-last")
    penalty, gradients = penalty_and_gradients(weights, kind)
    want, want_gradients = expected_of_case(layers, torch.float32, "channels-last", kind, True, masked=False)
    cases.assert_near(penalty, want)
    for gradient, want_gradient in zip(gradients, want_gradients):
        cases.assert_near(gradient, want_gradient)


@pytest.mark.parametrize("include_diagonal", [True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(implementation: Implementation, kind: str, masked: bool, include_diagonal: bool) -> None:
    # Two forwards for every element: fewer of them where instruction after instruction is executed.
    shapes = [(4, 2, 3, 3), (5, 3)] if implementation in cases.HOST else [(3, 1, 2, 2), (2, 3)]
    mask = torch.ones(cases.count_filters(shapes), dtype=torch.bool) if masked else None
    if mask is not None:
        mask[1] = False
    weights = [weight.requires_grad_() for weight in cases.random_weights(shapes, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda *leaves: ops.decorrelation(leaves, kind, include_diagonal, mask), weights, eps=1e-7
    )


# Of the penalty, and of the gradient by norms: the sign of a covariance near 0 is anybody's.
PRECISIONS = {"highest": (1e-5, 1e-5), "high": (1e-3, 4e-2), "medium": (8e-3, 0.15)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_precisions(implementation: Implementation, kind: str, precision: str) -> None:
    of_penalty, of_gradient = PRECISIONS[precision]
    for dtype in (torch.float32, torch.float64):
        weights = cases.random_weights([(40, 16, 3, 3), (20, 70)], dtype)
        penalty, gradients = penalty_and_gradients(weights, kind, False, None, precision)
        want, want_gradients = expected(weights, kind, False, None)
        if dtype == torch.float64:
            cases.assert_near(penalty, want)
        else:
            torch.testing.assert_close(penalty.double(), want, rtol=of_penalty, atol=0)
        for gradient, want_gradient in zip(gradients, want_gradients):
            assert (gradient.double() - want_gradient).norm() <= of_gradient * want_gradient.norm()


def test_signs_of_covariances_are_packed(implementation: Implementation) -> None:
    shapes = [(37, 5, 3, 3), (16, 40), (1, 9)]
    weights, mask = cases.random_weights(shapes), cases.random_mask(shapes)
    mask[-1] = True
    _, packed = torch.ops.fastprune.decorrelation(weights, "covariance", True, mask, "highest")
    expected_words = []
    for weight, kept in zip(weights, mask.split([37, 16, 1])):
        rows = weight.double().flatten(1)
        centred = (rows - rows.mean(1, keepdim=True)) * kept[:, None]
        for i, products in enumerate((centred @ centred.T).tolist()):
            words = [0] * ((len(products) + 15) // 16)
            for j, product in enumerate(products):
                code = 0 if product == 0 else 2 if i == j else 1 if product > 0 else 3
                words[j // 16] |= code << 2 * (j % 16)
            expected_words += words
    assert packed.dtype == torch.int32
    assert [word % 2**32 for word in packed.tolist()] == expected_words


# ------------------------------------------------------------------------------------------- degenerate cases


def zero_and_finite(weights: list[Tensor], kind: str, mask: Tensor | None = None, diagonal: bool = True) -> None:
    penalty, gradients = penalty_and_gradients(weights, kind, diagonal, mask)
    assert penalty == 0
    for gradient in gradients:
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["covariance", "kernel-covariance", "correlation"])
def test_degenerate_layers_are_zero(implementation: Implementation, kind: str, dtype: torch.dtype) -> None:
    one_element = cases.random_weights([(5, 1, 1, 1), (20, 1)], dtype)
    zero_and_finite(one_element, kind)
    zero_and_finite([torch.zeros(6, 2, 3, 3, dtype=dtype), torch.zeros(50, 4, dtype=dtype)], kind)
    # Powers of two have exact means, so that even a covariance of constant filters is exactly 0.
    constant = 0.25 * torch.arange(1, 8, dtype=dtype).view(7, 1, 1, 1).expand(7, 3, 3, 3).contiguous()
    zero_and_finite([constant], kind)
    nothing_kept = torch.zeros(7, dtype=torch.bool)
    zero_and_finite(cases.random_weights([(7, 3, 3, 3)], dtype), kind, nothing_kept)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.1, -1 / 3, 1000.3])
def test_constant_filters_have_no_correlation(implementation: Implementation, dtype: torch.dtype, value: float) -> None:
    # The mean of 27 equal numbers may be rounded, which must not be taken for a direction.
    zero_and_finite([torch.full((6, 3, 3, 3), value, dtype=dtype)], "correlation")
    mixed = cases.random_weights([(4, 3, 3, 3)], dtype)[0]
    with_constant = torch.cat([mixed, torch.full((1, 3, 3, 3), value, dtype=dtype)])
    penalty, (gradient,) = penalty_and_gradients([with_constant], "correlation")
    assert torch.equal(gradient[4], torch.zeros_like(gradient[4]))
    alone, _ = penalty_and_gradients([mixed], "correlation")
    cases.assert_near(penalty * 5, alone.double() * 4)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_one_kept_filter(implementation: Implementation, dtype: torch.dtype) -> None:
    weights = cases.random_weights([(7, 3, 3, 3)], dtype)
    mask = torch.arange(7) == 3
    zero_and_finite(weights, "correlation", mask)
    zero_and_finite(weights, "covariance", mask, diagonal=False)
    zero_and_finite([weights[0][:1]], "correlation")
    penalty, _ = penalty_and_gradients(weights, "covariance", True, mask)
    cases.assert_near(penalty, weights[0][3].double().var())


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_orthogonality_of_nothing_and_of_the_identity(implementation: Implementation, dtype: torch.dtype) -> None:
    size = 20
    for weights, mask in [
        (torch.zeros(6, size, dtype=dtype), None),
        (torch.randn(6, size).to(dtype), torch.zeros(6, dtype=torch.bool)),
    ]:  # WᵀW − I = −I, whose singular values are 1
        penalty, (gradient,) = penalty_and_gradients([weights], "orthogonality", True, mask)
        cases.assert_near(penalty, torch.ones((), dtype=torch.float64))
        assert torch.equal(gradient, torch.zeros_like(gradient))
    zero_and_finite([torch.eye(size, dtype=dtype)], "orthogonality")


@pytest.mark.parametrize("kind", KINDS)
def test_empty_list(implementation: Implementation, kind: str) -> None:
    assert ops.decorrelation([], kind) == 0
    with pytest.raises(RuntimeError, match=r"mask must be a contiguous bool tensor of shape \[0\]"):
        ops.decorrelation([], kind, mask=torch.ones(3, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_and_trained_weights_together(implementation: Implementation, kind: str) -> None:
    frozen, trained = cases.random_weights([(4, 2, 3, 3), (5, 3, 3, 3)])
    trained.requires_grad_()
    ops.decorrelation([frozen, trained], kind).backward()
    assert frozen.grad is None
    assert trained.grad is not None
    cases.assert_near(trained.grad, expected([frozen, trained], kind, True, None)[1][1])


# ------------------------------------------------------------------------------------------------ properties

layer_sizes = st.tuples(st.integers(1, 60), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))


@property_test
@given(shapes=st.lists(layer_sizes, min_size=1, max_size=3), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_penalty_is_not_negative_and_a_full_mask_is_none(
    implementation: Implementation, shapes: list[tuple[int, ...]], kind: str, seed: int
) -> None:
    weights = cases.random_weights(shapes, seed=seed)
    full = torch.ones(cases.count_filters(shapes), dtype=torch.bool)
    penalty, gradients = penalty_and_gradients(weights, kind)
    assert penalty >= 0
    with_mask, gradients_with_mask = penalty_and_gradients(weights, kind, True, full)
    assert torch.equal(penalty, with_mask)
    assert all(map(torch.equal, gradients, gradients_with_mask))


@property_test
@given(shape=layer_sizes, kind=st.sampled_from(["covariance", "correlation"]), seed=st.integers(0, 99))
def test_order_of_filters_does_not_matter(
    implementation: Implementation, shape: tuple[int, ...], kind: str, seed: int
) -> None:
    # Two elements correlate by exactly 1 or −1: the gradient is 0, and what is computed is rounding.
    assume(kind == "covariance" or torch.Size(shape[1:]).numel() != 2)
    (weight,) = cases.random_weights([shape], torch.float64, seed=seed)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    penalty, (gradient,) = penalty_and_gradients([weight], kind)
    permuted, (permuted_gradient,) = penalty_and_gradients([weight[order]], kind)
    cases.assert_near(permuted, penalty)
    cases.assert_near(permuted_gradient, gradient[order])


def test_second_derivative_is_an_error(implementation: Implementation) -> None:
    weight = torch.randn(4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.decorrelation([weight]), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum(), weight)
