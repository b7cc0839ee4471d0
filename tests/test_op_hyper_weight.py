"""hyper_weight and its gradients against `weight · hidden + bias`, sliced, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cases
import pytest
import torch
from cases import Implementation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastprune import ops

fastprune = torch.ops.fastprune
FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
Case = tuple[tuple[int, int, int, int], tuple[int, int], int]  # (O, I, kh, kw), (out, in), H

# Depthwise, a stem, pointwise, the whole, one element; hidden sizes on and beside vectors, and of several of a warp's.
CASES: dict[str, Case] = {
    "whole": ((8, 4, 3, 3), (8, 4), 32),
    "slice": ((16, 16, 3, 3), (11, 7), 32),
    "even": ((20, 32, 3, 3), (9, 16), 64),
    "pointwise": ((40, 24, 1, 1), (33, 17), 64),
    "depthwise": ((70, 1, 3, 3), (41, 1), 32),
    "stem": ((12, 3, 7, 7), (5, 3), 32),
    "one": ((1, 1, 1, 1), (1, 1), 1),
    "one of many": ((5, 6, 2, 3), (1, 1), 8),
    "odd": ((9, 5, 3, 2), (7, 3), 33),
    "narrow": ((6, 30, 3, 3), (6, 19), 3),
    "wide": ((3, 5, 2, 2), (2, 4), 331),
    "many taps": ((3, 4, 9, 9), (2, 3), 16),
    "long": ((6, 400, 3, 1), (5, 371), 12),
}


@dataclass
class Layer:
    """The tensors of a layer, and the slice that is wanted of it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    shape: tuple[int, int, int, int]
    out_channels: int
    in_channels: int

    def __call__(self, dtype: torch.dtype | None = None, layout: str = "contiguous") -> Tensor:
        return self.of(self.hidden, self.weight, self.bias, dtype, layout)

    def of(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor,
        dtype: torch.dtype | None = None,
        layout: str = "contiguous",
    ) -> Tensor:
        sizes = {"out_channels": self.out_channels, "in_channels": self.in_channels}
        return ops.hyper_weight(
            hidden, weight, bias, **sizes, shape=self.shape, dtype=dtype, memory_format=FORMATS[layout]
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias

    def sliced(self, rows: Tensor) -> Tensor:
        """What is in the slice of one of the layer's tensors with a row for each generated element."""
        return rows.unflatten(0, self.shape)[: self.out_channels, : self.in_channels]

    def generated(self) -> Tensor:
        """The formula, in float64."""
        return self.sliced(self.weight.double() @ self.hidden.double() + self.bias.double())

    def gradients(self, grad: Tensor) -> list[Tensor]:
        """Autograd's, of the formula."""
        leaves = [tensor.detach().double().requires_grad_() for tensor in self.tensors]
        generated = self.sliced(leaves[1] @ leaves[0] + leaves[2])
        return list(torch.autograd.grad(generated, leaves, grad.double()))


def layer_of(case: Case, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> Layer:
    shape, (out_channels, in_channels), size = case
    rows = torch.Size(shape).numel()
    made = cases.random_weights([(size,), (rows, size), (rows,)], dtype, layout, seed=seed)
    return Layer(*made, shape, out_channels, in_channels)


def upstream_of(layer: Layer, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    shape = (layer.out_channels, layer.in_channels, *layer.shape[2:])
    return cases.random_weights([shape], dtype, layout, seed=7)[0]


def compute_of(layer: Layer, dtype: torch.dtype) -> torch.dtype:
    """The coarser of the two dtypes, by which a result in `dtype` is judged."""
    return max(layer.weight.dtype, dtype, key=lambda x: cases.TOLERANCES[x][0])


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_values(implementation: Implementation, case: str, layout: str) -> None:
    layer = layer_of(CASES[case])
    result = layer(layout=layout)
    cases.assert_near(result, layer.generated())
    assert result.is_contiguous(memory_format=FORMATS[layout])


@pytest.mark.parametrize("compute", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_pair_of_dtypes(implementation: Implementation, dtype: torch.dtype, compute: torch.dtype) -> None:
    for case in ("slice", "odd"):
        for layout in ("contiguous", "unaligned"):
            layer = layer_of(CASES[case], dtype, layout)
            result = layer(compute, "channels-last")
            assert result.dtype == compute
            cases.assert_near(result, layer.generated(), computed_in=compute_of(layer, compute))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_gradients(implementation: Implementation, case: str, layout: str) -> None:
    layer = layer_of(CASES[case])
    leaves = [tensor.requires_grad_() for tensor in layer.tensors]
    upstream = upstream_of(layer, torch.float32, layout)
    gradients = torch.autograd.grad(layer(layout=layout), leaves, upstream)
    for name, gradient, expected in zip(("hidden", "weight", "bias"), gradients, layer.gradients(upstream)):
        assert gradient.is_contiguous()
        cases.assert_near(gradient, expected, name)
        assert (gradient == 0).sum() == (expected == 0).sum()


@pytest.mark.parametrize("compute", cases.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_gradients_of_every_pair_of_dtypes(
    implementation: Implementation, dtype: torch.dtype, compute: torch.dtype
) -> None:
    for case, layout in (("slice", "contiguous"), ("slice", "unaligned"), ("odd", "contiguous")):
        layer = layer_of(CASES[case], dtype, layout)
        leaves = [tensor.requires_grad_() for tensor in layer.tensors]
        upstream = upstream_of(layer, compute)
        gradients = torch.autograd.grad(layer(compute), leaves, upstream)
        for name, gradient, expected in zip(("hidden", "weight", "bias"), gradients, layer.gradients(upstream)):
            assert gradient.dtype == dtype
            cases.assert_near(gradient, expected, name, computed_in=dtype)


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 4)] * 2),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    size=st.integers(1, 70),
    layout=st.sampled_from(sorted(FORMATS)),
    seed=st.integers(0, 99),
)
def test_any_slice_of_any_layer(
    shape: tuple[int, int, int, int], share: tuple[float, float], size: int, layout: str, seed: int
) -> None:
    widths = tuple(1 + int(part * (most - 1)) for part, most in zip(share, shape))
    layer = layer_of((shape, (widths[0], widths[1]), size), seed=seed)
    leaves = [tensor.requires_grad_() for tensor in layer.tensors]
    upstream = upstream_of(layer, torch.float32, layout)
    for implementation in cases.HOST:
        with cases.active(implementation):
            result = layer(layout=layout)
            cases.assert_near(result.detach(), layer.generated().detach())
            gradients = torch.autograd.grad(result, leaves, upstream)
            for gradient, expected in zip(gradients, layer.gradients(upstream)):
                cases.assert_near(gradient, expected)


def test_what_is_not_in_the_slice_is_not_looked_at(implementation: Implementation) -> None:
    layer = layer_of(CASES["slice"])
    inside = torch.zeros(layer.shape, dtype=torch.bool)
    layer.sliced(inside.flatten()).fill_(True)
    rows = inside.flatten()
    layer.weight[~rows] = torch.nan
    layer.bias[~rows] = torch.inf
    leaves = [tensor.requires_grad_() for tensor in layer.tensors]
    result = layer()
    assert result.isfinite().all()
    to_hidden, to_weight, to_bias = torch.autograd.grad(result, leaves, torch.ones_like(result))
    assert to_hidden.isfinite().all()
    assert torch.equal(to_bias, rows.float())
    assert not to_weight[~rows].any()
    assert not to_weight[~rows].signbit().any()


def test_not_finite_rows_stay_where_they_are(implementation: Implementation) -> None:
    layer = layer_of(CASES["even"])
    layer.weight.unflatten(0, layer.shape)[2, 3, 1, 1, 5] = torch.inf
    result = layer()
    assert (~result.isfinite()).nonzero().tolist() == [[2, 3, 1, 1]]


def test_gradients_of_any_layout(implementation: Implementation) -> None:
    layer = layer_of(CASES["slice"])
    leaves = [tensor.requires_grad_() for tensor in layer.tensors]
    upstream = torch.randn(7, 11, 3, 3).transpose(0, 1)  # neither contiguous nor channels_last
    expanded = torch.autograd.grad(layer().sum(), leaves)
    for gradients, grad in (
        (torch.autograd.grad(layer(), leaves, upstream), upstream),
        (expanded, torch.ones(11, 7, 3, 3)),
    ):
        for gradient, expected in zip(gradients, layer.gradients(grad)):
            cases.assert_near(gradient, expected)


def test_frozen_tensors_get_no_gradient(implementation: Implementation) -> None:
    layer = layer_of(CASES["slice"])
    layer.bias.requires_grad_()
    layer().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    assert layer.bias.grad.sum() == 11 * 7 * 9


def test_the_gradient_becomes_that_of_the_parameter(registered: Implementation) -> None:
    layer = layer_of(CASES["slice"])
    layer.weight.requires_grad_()
    arrived: list[int] = []
    layer.weight.register_hook(lambda gradient: arrived.append(gradient.data_ptr()))
    layer().sum().backward()
    assert layer.weight.grad is not None
    assert arrived == [layer.weight.grad.data_ptr()]  # it was not copied


@pytest.mark.parametrize("layout", FORMATS)
def test_derivatives_of_both_orders(registered: Implementation, layout: str) -> None:
    layer = layer_of(((4, 3, 2, 2), (3, 2), 5), torch.float64)
    leaves = tuple(tensor.requires_grad_() for tensor in layer.tensors)
    function: Callable[..., Tensor] = lambda *tensors: layer.of(*tensors, layout=layout)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_a_hidden_layer_of_autocast(registered: Implementation) -> None:
    layer, linear = layer_of(CASES["slice"]), torch.nn.Linear(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = linear(torch.tensor([0.5, 1.0]))
        assert hidden.dtype == torch.bfloat16
        result = layer.of(hidden, layer.weight, layer.bias, torch.bfloat16)
    assert result.dtype == torch.bfloat16
    layer.hidden = hidden.detach()
    cases.assert_near(result.detach(), layer.generated())
    result.sum().backward()
    assert linear.weight.grad is not None


def test_same_bits_in_every_run_and_for_every_number_of_threads(implementation: Implementation) -> None:
    layer, threads, runs = layer_of(((40, 40, 3, 3), (37, 37), 36)), torch.get_num_threads(), []
    leaves = [tensor.requires_grad_() for tensor in layer.tensors]
    upstream = upstream_of(layer, torch.bfloat16, "channels-last")
    try:
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            result = layer(torch.bfloat16, "channels-last")
            runs.append([result.detach(), *torch.autograd.grad(result, leaves, upstream)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, runs[0], runs[1]))
    if implementation.backend != "reference":  # its sums are PyTorch's, which promise less
        assert all(map(torch.equal, runs[0], runs[2]))


def test_long_sums(on_host: Implementation) -> None:
    # A gradient of the hidden layer is a sum over all rows: 400,000 of them, which do not cancel.
    layer = layer_of(((400, 1000, 1, 1), (400, 1000), 2))
    layer.weight.copy_(1 + torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)))
    layer.hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(layer().sum(), [layer.hidden])
    cases.assert_near(gradient, layer.weight.double().sum(0), computed_in=torch.float32)
    assert ((gradient - layer.weight.double().sum(0)).abs() / gradient).max() < 2**-22


# -------------------------------------------------------------------------------------------------- wrong arguments

GOOD: dict[str, Any] = {
    "hidden": torch.ones(4),
    "weight": torch.ones(36, 4),
    "bias": torch.ones(36),
    "out_channels": 2,
    "in_channels": 1,
    "shape": [2, 2, 3, 3],
    "dtype": torch.float32,
    "channels_last": False,
}
SHARE = "must share one dtype of float32, float64, bfloat16, float16;"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "dtypes": (
        {"bias": torch.ones(36).double()},
        f"(hidden, weight, bias) {SHARE} (hidden, weight, bias)[2] has float64",
    ),
    "int": (
        {"hidden": torch.ones(4, dtype=torch.int32)},
        f"(hidden, weight, bias) {SHARE} (hidden, weight, bias)[0] has int32",
    ),
    "short shape": ({"shape": [2, 2, 3]}, "shape must be [O, I, kh, kw], each at least 1, got [2, 2, 3]"),
    "empty shape": ({"shape": [2, 0, 3, 3]}, "shape must be [O, I, kh, kw], each at least 1, got [2, 0, 3, 3]"),
    "rows beyond int64": (
        {"hidden": torch.ones(4), "weight": torch.ones(0, 4), "bias": torch.ones(0), "shape": [2**32, 2**32, 1, 1]},
        "O·I·kh·kw must be below 2^63, got shape = [4294967296, 4294967296, 1, 1]",
    ),
    "hidden of two dimensions": (
        {"hidden": torch.ones(1, 4)},
        "hidden must be a contiguous [H] with H at least 1, got [1, 4]",
    ),
    "hidden with gaps": (
        {"hidden": torch.ones(8)[::2]},
        "hidden must be a contiguous [H] with H at least 1, got [4]",
    ),
    "no hidden": (
        {"hidden": torch.ones(0), "weight": torch.ones(36, 0)},
        "hidden must be a contiguous [H] with H at least 1, got [0]",
    ),
    "rows": (
        {"weight": torch.ones(35, 4)},
        "weight must be a contiguous [O·I·kh·kw, H] = [36, 4], got [35, 4]",
    ),
    "columns": (
        {"weight": torch.ones(36, 5)},
        "weight must be a contiguous [O·I·kh·kw, H] = [36, 4], got [36, 5]",
    ),
    "transposed": (
        {"weight": torch.ones(4, 36).T},
        "weight must be a contiguous [O·I·kh·kw, H] = [36, 4], got [36, 4]",
    ),
    "bias": ({"bias": torch.ones(37)}, "bias must be a contiguous [O·I·kh·kw] = [36], got [37]"),
    "no outputs": ({"out_channels": 0}, "out_channels must be in [1, O] = [1, 2], got 0"),
    "too many outputs": ({"out_channels": 3}, "out_channels must be in [1, O] = [1, 2], got 3"),
    "no inputs": ({"in_channels": 0}, "in_channels must be in [1, I] = [1, 2], got 0"),
    "too many inputs": ({"in_channels": 3}, "in_channels must be in [1, I] = [1, 2], got 3"),
    "dtype": ({"dtype": torch.int8}, "dtype must be one of float32, float64, bfloat16, float16; got int8"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments(registered: Implementation, wrong: str) -> None:
    changed, expected = WRONG[wrong]
    with pytest.raises(RuntimeError) as caught:
        fastprune.hyper_weight(*{**GOOD, **changed}.values())
    assert str(caught.value).splitlines()[0] == f"hyper_weight: {expected}"


GOOD_BACKWARD: dict[str, Any] = {
    "grad": torch.ones(2, 1, 3, 3),
    "hidden": torch.ones(4),
    "weight": torch.ones(36, 4),
    "shape": [2, 2, 3, 3],
}
WITHIN = "grad must be [out, in, kh, kw] within shape = [2, 2, 3, 3], not empty, got "
WRONG_BACKWARD: dict[str, tuple[dict[str, Any], str]] = {
    "dtypes": ({"hidden": torch.ones(4).half()}, f"(hidden, weight) {SHARE} (hidden, weight)[1] has float32"),
    "grad dtype": ({"grad": torch.ones(2, 1, 3, 3, dtype=torch.int32)}, f"(grad) {SHARE} (grad)[0] has int32"),
    "rows": ({"weight": torch.ones(35, 4)}, "weight must be a contiguous [O·I·kh·kw, H] = [36, 4], got [35, 4]"),
    "rows beyond int64": (
        {"weight": torch.ones(0, 4), "shape": [2**31, 2**31, 3, 3]},
        "O·I·kh·kw must be below 2^63, got shape = [2147483648, 2147483648, 3, 3]",
    ),
    "taps": ({"grad": torch.ones(2, 1, 3, 1)}, WITHIN + "[2, 1, 3, 1]"),
    "dimensions": ({"grad": torch.ones(2, 1, 9)}, WITHIN + "[2, 1, 9]"),
    "outputs": ({"grad": torch.ones(3, 1, 3, 3)}, WITHIN + "[3, 1, 3, 3]"),
    "inputs": ({"grad": torch.ones(2, 3, 3, 3)}, WITHIN + "[2, 3, 3, 3]"),
    "empty": ({"grad": torch.ones(0, 1, 3, 3)}, WITHIN + "[0, 1, 3, 3]"),
    "strides": (
        {"grad": torch.ones(2, 2, 3, 3).transpose(0, 1)},
        "grad must be contiguous or channels_last, got strides [9, 18, 3, 1]",
    ),
}


@pytest.mark.parametrize("wrong", WRONG_BACKWARD)
def test_wrong_arguments_of_the_backward(registered: Implementation, wrong: str) -> None:
    changed, expected = WRONG_BACKWARD[wrong]
    with pytest.raises(RuntimeError) as caught:
        fastprune.hyper_weight_backward(*{**GOOD_BACKWARD, **changed}.values())
    assert str(caught.value).splitlines()[0] == f"hyper_weight_backward: {expected}"


def test_other_memory_formats() -> None:
    arguments = {name: GOOD[name] for name in ("out_channels", "in_channels", "shape")}
    with pytest.raises(ValueError, match=r"must be torch\.contiguous_format or torch\.channels_last, got torch\.pres"):
        ops.hyper_weight(*list(GOOD.values())[:3], **arguments, memory_format=torch.preserve_format)


def test_fakes_check_too() -> None:
    with torch.device("meta"):
        tensors = torch.ones(4), torch.ones(36, 4), torch.ones(36)
    with pytest.raises(RuntimeError, match=r"out_channels must be in \[1, O\] = \[1, 2\], got 5"):
        ops.hyper_weight(*tensors, out_channels=5, in_channels=1, shape=(2, 2, 3, 3))


def test_widths_may_change_from_call_to_call_of_a_compiled_function(registered: Implementation) -> None:
    torch.compiler.reset()
    layer, compilations = layer_of(CASES["slice"]), []

    def counting(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    def function(out_channels: int, in_channels: int) -> Tensor:
        sizes = {"out_channels": out_channels, "in_channels": in_channels, "shape": layer.shape}
        return ops.hyper_weight(*layer.tensors, **sizes, memory_format=torch.channels_last)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counting)
    for sizes in ((11, 7), (5, 9), (16, 12), (3, 2)):
        assert torch.equal(compiled(*sizes), function(*sizes))
    assert len(compilations) == 1
