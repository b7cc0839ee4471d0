"""Wrong arguments: the same error, in the same words, from every implementation of every op."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from cases import Implementation
from torch import Tensor

from fastprune import ops

fastprune = torch.ops.fastprune
Call = Callable[[Sequence[Tensor]], Any]


def take_weights() -> dict[str, Call]:
    """Every op that takes weights, by name, as a function of them alone (12 filters in all)."""
    mask, grad = torch.ones(12, dtype=torch.bool), torch.ones(())
    return {
        "filter_norms": lambda w: fastprune.filter_norms(w, 1),
        "filter_mask": lambda w: fastprune.filter_mask(w, 0.5, 1),
        "update_filter_masks_": lambda w: fastprune.update_filter_masks_(w, 0.5, 1, mask),
        "weight_mask": lambda w: fastprune.weight_mask(w, 0.5, "l1", []),
        "masked_weights": lambda w: fastprune.masked_weights(w, mask, torch.float32, None),
        "masked_weights_backward": lambda w: fastprune.masked_weights_backward(w, mask, torch.float32, None),
        "decorrelation": lambda w: fastprune.decorrelation(w, "covariance", True, None, "highest"),
        "decorrelation_backward": lambda w: fastprune.decorrelation_backward(
            grad, w, torch.zeros(0, dtype=torch.int32), "covariance", True, None, "highest"
        ),
    }


SUPPORTED = "weights must share one dtype of float32, float64, bfloat16, float16; "
DENSE = "must be contiguous or channels_last (each filter one dense run), got strides "
AT_LEAST = "must be [filters, ...] with at least one filter and element, got "
# name: (the second of two weights, the message after the op's name); the first is [8, 3] float32.
WRONG_WEIGHTS: dict[str, tuple[Tensor, str]] = {
    "mixed dtypes": (torch.ones(4, 3).double(), SUPPORTED + "weights[1] has float64"),
    "int32": (torch.ones(4, 3, dtype=torch.int32), SUPPORTED + "weights[1] has int32"),
    "uint8": (torch.ones(4, 3, dtype=torch.uint8), SUPPORTED + "weights[1] has uint8"),
    "complex64": (torch.ones(4, 3, dtype=torch.complex64), SUPPORTED + "weights[1] has complex64"),
    "one dimension": (torch.ones(4), "weights[1] " + AT_LEAST + "[4]"),
    "no filter": (torch.ones(0, 3), "weights[1] " + AT_LEAST + "[0, 3]"),
    "no element": (torch.ones(4, 0, 3, 3), "weights[1] " + AT_LEAST + "[4, 0, 3, 3]"),
    "transposed": (torch.ones(3, 4).T, f"weights[1] {DENSE}[1, 4]"),
    "every other": (torch.ones(4, 6)[:, ::2], f"weights[1] {DENSE}[6, 2]"),
    "part of a filter": (torch.ones(4, 6)[:, :3], f"weights[1] {DENSE}[6, 1]"),
    "expanded": (torch.ones(4, 1).expand(4, 3), f"weights[1] {DENSE}[1, 0]"),
}


def message_of(call: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value).splitlines()[0]


# An op built of others may leave the message to them.
SPEAKS_FOR = {
    "filter_mask": ("filter_mask", "filter_norms"),
    "update_filter_masks_": ("update_filter_masks_", "filter_mask", "filter_norms"),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
@pytest.mark.parametrize("op", take_weights())
def test_wrong_weights(registered: Implementation, op: str, wrong: str) -> None:
    second, expected = WRONG_WEIGHTS[wrong]
    message = message_of(lambda: take_weights()[op]([torch.ones(8, 3), second]))
    name, _, text = message.partition(": ")
    assert name in SPEAKS_FOR.get(op, (op,))
    assert text == expected


MASK = "must be a contiguous {} tensor of shape [12] (one entry per filter), got {}"
ONES, GOOD = [torch.ones(8, 3), torch.ones(4, 2, 3, 3)], torch.ones(12, dtype=torch.bool)
WRONG_VECTORS: dict[str, tuple[Tensor, str]] = {
    "short": (GOOD[:11], "bool [11]"),
    "long": (torch.ones(13, dtype=torch.bool), "bool [13]"),
    "matrix": (GOOD.view(3, 4), "bool [3, 4]"),
    "float": (GOOD.float(), "float32 [12]"),
    "byte": (GOOD.byte(), "uint8 [12]"),
    "strided": (torch.ones(24, dtype=torch.bool)[::2], "bool [12]"),
}


@pytest.mark.parametrize("wrong", WRONG_VECTORS)
def test_wrong_masks(registered: Implementation, wrong: str) -> None:
    mask, got = WRONG_VECTORS[wrong]
    calls: dict[str, Callable[[], Any]] = {
        "update_filter_masks_": lambda: ops.update_filter_masks_(ONES, 0.5, mask),
        "masked_weights": lambda: ops.masked_weights(ONES, mask),
        "masked_weights_backward": lambda: fastprune.masked_weights_backward(ONES, mask, torch.float32, None),
        "decorrelation": lambda: ops.decorrelation(ONES, mask=mask),
    }
    for op, call in calls.items():
        assert message_of(call) == f"{op}: mask " + MASK.format("bool", got)


COVARIANCE = torch.zeros(12, dtype=torch.int32)  # a word for each filter
WRONG_ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "rate 1": (lambda: ops.filter_mask(ONES, 1.0), "filter_mask: rate must be in [0, 1), got 1"),
    "rate below 0": (lambda: ops.filter_mask(ONES, -0.25), "filter_mask: rate must be in [0, 1), got -0.25"),
    "rate nan": (lambda: ops.filter_mask(ONES, float("nan")), "filter_mask: rate must be in [0, 1), got nan"),
    "rate of the update": (
        lambda: ops.update_filter_masks_(ONES, 1.5, GOOD.clone()),
        "update_filter_masks_: rate must be in [0, 1), got 1.5",
    ),
    "rate of single weights": (
        lambda: ops.weight_mask(ONES, 2.0),
        "weight_mask: rate must be in [0, 1), got 2",
    ),
    "ord": (
        lambda: ops.filter_norms(ONES, 3),
        "filter_norms: ord must be 1 (mean |w|) or 2 (mean w^2), got 3",
    ),
    "importance": (
        lambda: ops.weight_mask(ONES, 0.5, "L1"),
        "weight_mask: importance must be l1, l2, grad or taylor, got L1",
    ),
    "kind": (
        lambda: ops.decorrelation(ONES, "cov"),
        "decorrelation: kind must be one of covariance, kernel-covariance, correlation, orthogonality; got cov",
    ),
    "precision": (
        lambda: ops.decorrelation(ONES, precision="tf32"),
        "decorrelation: precision must be one of highest, high, medium; got tf32",
    ),
    "precision of the backward": (
        lambda: fastprune.decorrelation_backward(torch.ones(()), ONES, COVARIANCE, "covariance", True, None, "low"),
        "decorrelation_backward: precision must be one of highest, high, medium; got low",
    ),
    "feedback": (
        lambda: ops.masked_weights(ONES, GOOD, feedback=torch.ones(12).double()),
        "masked_weights: feedback " + MASK.format("float32", "float64 [12]"),
    ),
    "feedback of the backward": (
        lambda: fastprune.masked_weights_backward(ONES, GOOD, torch.float32, torch.ones(11)),
        "masked_weights_backward: feedback " + MASK.format("float32", "float32 [11]"),
    ),
    "compute dtype": (
        lambda: ops.masked_weights(ONES, GOOD, torch.int32),
        "masked_weights: dtype must be one of float32, float64, bfloat16, float16; got int32",
    ),
    "coefficients": (
        lambda: fastprune.decorrelation_backward(
            torch.ones(()), ONES, COVARIANCE[:11], "covariance", True, None, "highest"
        ),
        "decorrelation_backward: coefficients must be the forward's, int32 [12], got int32 [11]",
    ),
    "grad": (
        lambda: fastprune.decorrelation_backward(
            torch.ones((), dtype=torch.float64), ONES, COVARIANCE, "covariance", True, None, "highest"
        ),
        "decorrelation_backward: grad must be a scalar of float32, got float64 []",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_wrong_arguments(registered: Implementation, wrong: str) -> None:
    call, expected = WRONG_ARGUMENTS[wrong]
    assert message_of(call) == expected
