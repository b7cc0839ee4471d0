"""weight_mask against numpy: the rule over every single weight, exactly."""

import cases
import numpy as np
import pytest
import torch
from cases import Implementation
from torch import Tensor

from fastprune import ops

IMPORTANCES = ("l1", "l2", "grad", "taylor")


def expected_scores(weight: Tensor, grad: Tensor, importance: str) -> np.ndarray:
    """float32 importances: products of float32 (float64 for float64) rounded once, as the contract says."""
    compute = np.float64 if weight.dtype == torch.float64 else np.float32
    w, g = weight.double().numpy().astype(compute), grad.double().numpy().astype(compute)
    formulas = {"l1": lambda: w, "l2": lambda: w * w, "grad": lambda: g, "taylor": lambda: w * g}
    scores = np.abs(formulas[importance]())
    return scores.astype(np.float32)


def expected_masks(weights: list[Tensor], grads: list[Tensor], importance: str, rate: float) -> list[Tensor]:
    scores = [expected_scores(weight, grad, importance) for weight, grad in zip(weights, grads)]
    every = np.concatenate([score.ravel() for score in scores])
    rank = int(every.size * rate)
    threshold = np.partition(every, rank)[rank]
    return [torch.from_numpy(score > threshold) for score in scores]


def masks(weights: list[Tensor], rate: float, importance: str, grads: list[Tensor]) -> list[Tensor]:
    return ops.weight_mask(weights, rate, importance, grads if importance in ("grad", "taylor") else ())


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layers", cases.LAYERS)
def test_masks(implementation: Implementation, layers: str, dtype: torch.dtype, importance: str) -> None:
    shapes = cases.LAYERS[layers]
    rates = dict(zip(cases.LAYOUTS, (0.0, 0.55, 0.97)))
    for layout in cases.layouts_for(implementation, layers, dtype, importance):
        rate = rates[layout]
        weights = cases.random_weights(shapes, dtype, layout)
        grads = cases.random_weights(shapes, dtype, layout, seed=1)
        results = masks(weights, rate, importance, grads)
        like = weights if layout != "unaligned" else [weight.clone() for weight in weights]
        cases.assert_same_layout(results, like)
        for result, expected in zip(results, expected_masks(weights, grads, importance, rate)):
            assert result.dtype == torch.bool
            assert torch.equal(result, expected)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_ties_go_together(implementation: Implementation, importance: str) -> None:
    shapes = cases.LAYERS["mixed"]
    weights, grads = cases.integer_weights(shapes), cases.integer_weights(shapes, seed=1)
    for rate in (0.0, 0.5, 0.9):
        results = masks(weights, rate, importance, grads)
        for result, expected in zip(results, expected_masks(weights, grads, importance, rate)):
            assert torch.equal(result, expected)


def test_two_million_weights(implementation: Implementation) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(500, 1000), (100, 500, 3, 3), (1050, 1001)]
    weights = [torch.randn(shape, generator=generator) * 0.02 for shape in shapes]
    assert sum(weight.numel() for weight in weights) > 2_000_000
    expected = expected_masks(weights, weights, "l1", 0.9)
    for result, mask in zip(ops.weight_mask(weights, 0.9), expected):
        assert torch.equal(result, mask)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_scores_of_all_magnitudes(implementation: Implementation, dtype: torch.dtype) -> None:
    # Zeros of both signs, subnormals and the largest values: each bin of a radix selection is visited.
    info = torch.finfo(dtype)
    generator = torch.Generator().manual_seed(0)
    top = min(np.log2(info.max), 126)
    exponents = torch.empty(5000, dtype=torch.float64).uniform_(-140, top, generator=generator)
    weight = (torch.randn(5000, generator=generator).sign() * 2.0**exponents).to(dtype).view(10, 500)
    special = [0.0, -0.0, info.smallest_normal / 2, -info.smallest_normal]
    weight[0, :5] = torch.tensor([*special, min(info.max, 3e38)])
    for rate in (0.0, 0.01, 0.1, 0.5, 0.9, 0.9995):
        (expected,) = expected_masks([weight], [weight], "l1", rate)
        (result,) = ops.weight_mask([weight], rate)
        assert torch.equal(result, expected)


def test_largest_value_is_not_taken_for_infinity(implementation: Implementation) -> None:
    largest = torch.finfo(torch.float32).max
    (mask,) = ops.weight_mask([torch.tensor([[1.0, largest, -largest, 2.0]])], 0.25)
    assert mask.tolist() == [[False, True, True, False]]


def test_equal_weights_all_go(implementation: Implementation) -> None:
    (mask,) = ops.weight_mask([torch.full((4, 5), -0.3)], 0.0)
    assert not mask.any()


def test_one_weight_and_empty_list(implementation: Implementation) -> None:
    assert ops.weight_mask([torch.ones(1, 1)], 0.0)[0].tolist() == [[False]]
    assert ops.weight_mask([], 0.5) == []
    with pytest.raises(RuntimeError, match="importance l1 takes 0 gradients, got 1"):
        ops.weight_mask([], 0.5, grads=[torch.ones(1, 1)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_nan_and_inf_name_the_layer(on_host: Implementation, importance: str, bad: float) -> None:
    for dtype in cases.DTYPES:
        shapes = [(4, 3, 3, 3), (3, 70), (5, 2)]
        weights, grads = cases.random_weights(shapes, dtype), cases.random_weights(shapes, dtype, seed=1)
        (grads if importance == "grad" else weights)[1][2, 69] = bad
        with pytest.raises(RuntimeError, match=r"weight_mask: weights\[1\] has a NaN or Inf"):
            masks(weights, 0.5, importance, grads)


def test_a_square_that_overflows_is_an_error(on_host: Implementation) -> None:
    with pytest.raises(RuntimeError, match=r"weights\[0\] has a NaN or Inf: its importances are not finite"):
        ops.weight_mask([torch.full((2, 2), 1e30)], 0.5, "l2")


@pytest.mark.parametrize("importance", ["grad", "taylor"])
def test_gradients_must_match(implementation: Implementation, importance: str) -> None:
    weight = torch.randn(4, 3, 3, 3)
    wrong = {
        "shape": torch.randn(4, 3, 3, 2),
        "dtype": weight.double(),
        "strides": weight.contiguous(memory_format=torch.channels_last),
    }
    for grad in wrong.values():
        with pytest.raises(RuntimeError, match=r"grads\[0\] must have the shape, dtype and strides of weights\[0\]"):
            ops.weight_mask([weight], 0.5, importance, [grad])
    with pytest.raises(RuntimeError, match=f"importance {importance} takes 1 gradients, got 0"):
        ops.weight_mask([weight], 0.5, importance)
    with pytest.raises(RuntimeError, match="importance l1 takes 0 gradients, got 1"):
        ops.weight_mask([weight], 0.5, "l1", [weight])
