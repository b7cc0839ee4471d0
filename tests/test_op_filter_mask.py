"""filter_norms, kth_threshold, filter_mask, update_filter_masks_ against numpy and the rule of the contract."""

import cases
import numpy as np
import pytest
import torch
from cases import Implementation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune import ops

# The implementation is set once for all examples, which is what is wanted.
property_test = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def expected_norms(weights: list[Tensor], ord: int) -> Tensor:
    rows = [weight.double().reshape(len(weight), -1).numpy() for weight in weights]
    means = [(np.abs(row) if ord == 1 else row**2).mean(axis=1) for row in rows]
    return torch.from_numpy(np.concatenate(means))


def expected_mask(scores: Tensor, rate: float) -> Tensor:
    threshold = np.sort(scores.numpy())[int(len(scores) * rate)]
    return torch.from_numpy(scores.numpy() > threshold)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layers", cases.ALL_LAYERS)
def test_norms(implementation: Implementation, layers: str, dtype: torch.dtype, layout: str) -> None:
    weights = cases.random_weights(cases.ALL_LAYERS[layers], dtype, layout)
    for ord in (1, 2):
        norms = ops.filter_norms(weights, ord)
        assert norms.dtype == torch.float32
        cases.assert_near(norms, expected_norms(weights, ord), f"ord {ord}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_of_special_values(implementation: Implementation, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    subnormal = info.smallest_normal / 4
    values = [subnormal, -subnormal, info.max, info.min, info.smallest_normal, -0.0]
    # Every length of a filter, so that whole vectors and the elements left over both see each value.
    weights = [torch.tensor([value] * size, dtype=dtype)[None] for value in values for size in (1, 8, 16, 67)]
    norms = ops.filter_norms(weights)
    expected = expected_norms(weights, 1)
    for norm, want in zip(norms, expected):  # one by one: the largest would hide the rest
        assert norm.double() == pytest.approx(want.item(), rel=1e-6, abs=0)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.6, 0.999])
@pytest.mark.parametrize("layers", cases.ALL_LAYERS)
def test_mask_follows_the_rule(implementation: Implementation, layers: str, rate: float) -> None:
    weights = cases.random_weights(cases.ALL_LAYERS[layers])
    for ord in (1, 2):
        assert torch.equal(ops.filter_mask(weights, rate, ord), expected_mask(ops.filter_norms(weights, ord), rate))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("layers", cases.ALL_LAYERS)
def test_masks_are_identical_for_the_same_scores(
    implementation: Implementation, layers: str, dtype: torch.dtype
) -> None:
    # Sums of whole numbers are exact, so every implementation has the same scores, ties included.
    weights = cases.integer_weights(cases.ALL_LAYERS[layers], dtype)
    for rate in (0.0, 0.4, 0.6, 0.9):
        scores = expected_norms(weights, 1).float()
        assert torch.equal(ops.filter_mask(weights, rate), expected_mask(scores, rate))


def test_ties_at_the_threshold_go_together(implementation: Implementation) -> None:
    weights = [torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[2.0, 2.0], [3.0, 3.0], [-2.0, 2.0]])]
    for rate in (0.2, 0.5, 0.8):  # of the scores 1 2 2 2 2 3, elements 1, 3 and 4: all of them 2
        assert ops.filter_mask(weights, rate).tolist() == [False, False, False, False, True, False]


def test_rate_zero_prunes_the_least_important(implementation: Implementation) -> None:
    assert ops.filter_mask([torch.tensor([[3.0], [-1.0], [2.0]])], 0.0).tolist() == [True, False, True]


def test_equal_filters_all_go(implementation: Implementation) -> None:
    weights = [torch.full((6, 4, 3, 3), 0.3), torch.full((5, 7), -0.3)]
    # 36 and 7 equal elements: the means are those of exact sums.
    assert not ops.filter_mask(weights, 0.0).any()


def test_one_filter_goes(implementation: Implementation) -> None:
    assert ops.filter_mask([torch.randn(1, 3, 3, 3)], 0.0).tolist() == [False]


def test_empty_list(implementation: Implementation) -> None:
    assert ops.filter_norms([]).shape == (0,)
    mask = ops.filter_mask([], 0.5)
    assert mask.shape == (0,)
    assert mask.dtype == torch.bool
    assert ops.update_filter_masks_([], 0.5, mask) is mask
    for call in (
        lambda: ops.filter_norms([], ord=3),
        lambda: ops.filter_mask([], 0.5, ord=3),
        lambda: ops.update_filter_masks_([], 0.5, mask, ord=3),
    ):
        with pytest.raises(RuntimeError, match=r"ord must be 1 \(mean \|w\|\) or 2 \(mean w\^2\), got 3"):
            call()
    with pytest.raises(RuntimeError, match=r"rate must be in \[0, 1\), got 1"):
        ops.filter_mask([], 1.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_nan_and_inf_name_the_layer(on_host: Implementation, dtype: torch.dtype, bad: float) -> None:
    weights = cases.random_weights([(4, 3, 3, 3), (3, 70), (5, 2)], dtype)
    weights[1][2, 69] = bad
    mask = torch.zeros(12, dtype=torch.bool)
    for op, call in {
        "filter_norms": lambda: ops.filter_norms(weights),
        "filter_mask": lambda: ops.filter_mask(weights, 0.5),
        "update_filter_masks_|filter_norms": lambda: ops.update_filter_masks_(weights, 0.5, mask),
    }.items():
        with pytest.raises(RuntimeError, match=rf"(filter_norms|{op}): weights\[1\] has a NaN or Inf"):
            call()


def test_update_writes_the_mask_in_place(implementation: Implementation) -> None:
    weights = cases.random_weights(cases.LAYERS["mixed"])
    mask = torch.ones(cases.count_filters(cases.LAYERS["mixed"]), dtype=torch.bool)
    pointer = mask.data_ptr()
    assert ops.update_filter_masks_(weights, 0.5, mask, ord=2) is mask
    assert mask.data_ptr() == pointer
    assert torch.equal(mask, ops.filter_mask(weights, 0.5, ord=2))


def test_update_counts_as_a_change(implementation: Implementation) -> None:
    # A mask that masked_weights keeps for its backward must not change unseen in between.
    weights = [weight.requires_grad_() for weight in cases.random_weights([(4, 3)])]
    mask = torch.ones(4, dtype=torch.bool)
    (masked,) = ops.masked_weights(weights, mask)
    version = mask._version
    ops.update_filter_masks_(weights, 0.5, mask)
    assert mask._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        masked.sum().backward()


def test_update_allocates_nothing() -> None:
    # Promised by the compiled implementations; the reference may.
    weights = cases.random_weights(cases.RESNET56)
    mask = torch.zeros(cases.count_filters(cases.RESNET56), dtype=torch.bool)
    for compiled in cases.COMPILED:
        with (
            cases.active(compiled),
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        ):
            ops.update_filter_masks_(weights, 0.6, mask)
        names = {event.name for event in profile.events()}
        assert "fastprune::update_filter_masks_" in names
        assert not any("empty" in name for name in names)
        assert all(event.cpu_memory_usage <= 0 for event in profile.events())


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 3.4e38, float("inf"), -float("inf"), 1.5, 1.5, -1.5]


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 1000])
def test_kth_threshold(implementation: Implementation, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    scores = torch.randn(n, generator=generator)
    scores[: n // 2] = scores[: n // 2].round()  # duplicates
    for i, value in enumerate(SPECIAL[: n // 2]):
        scores[-1 - i] = value
    before, ordered = scores.clone(), np.sort(scores.numpy())
    for k in sorted({0, 1, n // 3, n // 2, n - 2, n - 1} & set(range(n))):
        threshold = ops.kth_threshold(scores, k)
        assert threshold.shape == ()
        assert threshold.dtype == torch.float32
        assert threshold.item() == ordered[k]
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("scores", "k", "message"),
    [
        (torch.ones(3), 3, r"k must be in \[0, 3\), got 3"),
        (torch.ones(3), -1, r"k must be in \[0, 3\), got -1"),
        (torch.ones(0), 0, r"k must be in \[0, 0\), got 0"),
        (torch.tensor([1.0, float("nan")]), 0, "scores have a NaN"),
        (torch.ones(3).double(), 0, r"contiguous float32 vector, got float64 \[3\]"),
        (torch.ones(2, 2), 0, r"contiguous float32 vector, got float32 \[2, 2\]"),
        (torch.ones(6)[::2], 0, r"contiguous float32 vector, got float32 \[3\]"),
    ],
)
def test_kth_threshold_errors(on_host: Implementation, scores: Tensor, k: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"kth_threshold: .*{message}"):
        ops.kth_threshold(scores, k)


# ------------------------------------------------------------------------------------------------ properties

values = st.floats(-1e3, 1e3, width=32, allow_subnormal=False) | st.sampled_from([0.0, 1.0, -1.0, 2.0])
layers_of_values = st.lists(st.lists(values, min_size=1, max_size=9), min_size=1, max_size=4)
rates = st.floats(0, 1, exclude_max=True)


def one_element_filters(layers: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(layer)[:, None] for layer in layers]


@property_test
@given(layers=layers_of_values, rate=rates)
def test_never_keeps_too_many(implementation: Implementation, layers: list[list[float]], rate: float) -> None:
    mask = ops.filter_mask(one_element_filters(layers), rate)
    assert mask.sum() <= len(mask) - int(len(mask) * rate) - 1


@property_test
@given(layers=layers_of_values, rate=rates)
def test_threshold_is_that_of_a_sort(implementation: Implementation, layers: list[list[float]], rate: float) -> None:
    weights = one_element_filters(layers)
    scores = torch.cat(weights).flatten().abs()
    assert torch.equal(ops.filter_mask(weights, rate), expected_mask(scores, rate))
    k = int(len(scores) * rate)
    assert ops.kth_threshold(scores, k) == np.sort(scores.numpy())[k]


@property_test
@given(layers=layers_of_values, rate=rates, exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_nothing(
    implementation: Implementation, layers: list[list[float]], rate: float, exponent: int
) -> None:
    weights = [torch.cat([weight, weight * 0.7, weight + 0.1], 1) for weight in one_element_filters(layers)]
    scaled = [weight * 2.0**exponent for weight in weights]
    assert torch.equal(ops.filter_mask(weights, rate), ops.filter_mask(scaled, rate))
