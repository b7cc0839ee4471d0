"""csrc/cuda/decorrelation_kernel_covariance.cu, its PTX executed on the CPU: values, races, bytes, planted faults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cases
import cuda_kernels as cuda
import pytest
import torch
from cuda_kernels import ARCHITECTURES, EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu, cuda_decorrelation_kinds
from simulated import cuda_decorrelation_kernel_covariance as launchers
from torch import Tensor

from fastprune import models
from fastprune.ops import reference

SOURCE = "decorrelation_kernel_covariance"
# Kernels in registers and in shared memory, more slices than threads, and what has no covariance.
SHAPES = [(16, 70, 3, 3), (3, 2, 5, 5), (2, 3, 7, 7), (3, 2, 11, 3), (2, 3, 1, 2), (5, 4, 3, 1), (7, 9)]


@dataclass(frozen=True)
class Outcome:
    """What a forward and a backward left, and what their launches cost."""

    penalty: Tensor
    gradients: list[Tensor]
    stats: list[Any]

    def tensors(self) -> list[Tensor]:
        return [self.penalty, *self.gradients]


def call(
    weights: list[Tensor], mask: Tensor | None = None, diagonal: bool = True, arch: str = "sm_80", **options: Any
) -> Outcome:
    gpu = Gpu(arch, options, options.pop("fault", None), options.pop("capacity", None), options.pop("shift", 0))
    penalty, coefficients = launchers.forward(gpu, weights, diagonal, mask)
    assert coefficients.numel() == 0
    grad = torch.tensor(0.5, dtype=penalty.dtype)
    return Outcome(penalty, launchers.backward(gpu, grad, weights, diagonal, mask), gpu.stats)


def check(
    shapes: cases.Shapes,
    dtype: torch.dtype,
    layout: str = "contiguous",
    masked: bool = False,
    diagonal: bool = True,
    **options: Any,
) -> Outcome:
    weights = cases.random_weights(shapes, dtype, layout)
    mask = cases.random_mask(shapes) if masked else None
    outcome = call(weights, mask, diagonal, **options)
    doubles = [weight.double() for weight in weights]
    penalty, empty = reference.decorrelation(doubles, "kernel-covariance", diagonal, mask, "highest")
    half = torch.tensor(0.5, dtype=torch.float64)
    gradients = reference.decorrelation_backward(half, doubles, empty, "kernel-covariance", diagonal, mask, "highest")
    cases.assert_near(outcome.penalty, penalty, "penalty")
    for i, (gradient, want) in enumerate(zip(outcome.gradients, gradients)):
        assert gradient.stride() == weights[i].stride()
        cases.assert_near(gradient, want, f"gradient {i}")
    return outcome


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_one_launch_forward_and_one_backward(dtype: torch.dtype, arch: str) -> None:
    assert len(check(SHAPES, dtype, arch=arch).stats) == 2


@pytest.mark.parametrize("layout", ["channels-last", "unaligned"])
def test_layouts(layout: str) -> None:
    check(SHAPES, torch.float32, layout, masked=True, diagonal=False)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_slices_of_every_size(layout: str, arch: str) -> None:
    for dtype in cases.DTYPES:
        for masked, diagonal in ((False, True), (True, False), (True, True)):
            check(SHAPES, dtype, layout, masked, diagonal, arch=arch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "arch", "diagonal"), [("contiguous", "sm_80", True), ("channels-last", "sm_90", False)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_slices_beyond_shared_memory(dtype: torch.dtype, layout: str, arch: str, diagonal: bool) -> None:
    """A block for each; executing their long loops takes long, so only two of each."""
    wide = (2, 1, 9, 65) if dtype == torch.float64 else (2, 1, 9, 130)
    check([wide, (2, 2, 3, 3)], dtype, layout, masked=True, diagonal=diagonal, arch=arch)


def test_other_orders_of_dimensions() -> None:
    # [C, kw, kh] and [kh, C, kw] in memory.
    weights = cases.random_weights([(6, 5, 4, 3), (6, 4, 5, 3)])
    weights = [weights[0].transpose(2, 3), weights[1].transpose(1, 2)]
    penalty, _ = reference.decorrelation([w.double() for w in weights], "kernel-covariance", True, None, "highest")
    outcome = call(weights)
    cases.assert_near(outcome.penalty, penalty)
    contiguous = call([weight.contiguous() for weight in weights])
    assert all(map(torch.equal, outcome.gradients, contiguous.gradients))


def test_nothing_to_do_is_no_launch() -> None:
    assert check([(5, 1, 1, 1), (3, 20), (4, 2, 3, 1)], torch.float32).stats[1:] == []


@pytest.mark.slow
def test_results_beside_a_vector() -> None:
    check(SHAPES, torch.bfloat16, shift=2)


def test_pruned_filters_are_not_read() -> None:
    mixed = [(6, 7, 3, 3), (5, 4, 3, 1), (4, 2, 2, 3)]
    weights, mask = cases.random_weights(mixed), cases.random_mask(mixed)
    spoiled = [w.clone() for w in weights]
    for weight, kept in zip(spoiled, mask.split([len(w) for w in weights])):
        weight[~kept] = torch.nan
    assert all(map(torch.equal, call(spoiled, mask).tensors(), call(weights, mask).tensors()))
    shapes = [(24, 64, 3, 3)]
    kept = cases.random_mask(shapes)
    for stats in call(cases.random_weights(shapes), kept).stats:
        assert stats.unique_load_bytes <= int(kept.sum()) * 64 * 9 * 4 + 24 + 512


@pytest.mark.parametrize("order", ORDERS[1:], ids=["reverse", "random"])
def test_bits_do_not_depend_on_the_order_of_blocks(order: dict[str, Any]) -> None:
    weights = cases.random_weights([(30, 70, 3, 3), (3, 5, 2, 2)])
    assert all(map(torch.equal, call(weights, **order).tensors(), call(weights).tensors()))


@pytest.mark.slow
def test_more_layers_than_a_table_has() -> None:
    capacity = cuda_decorrelation_kinds.host().kernel_covariance_capacity()
    check([(2, 3, 2, 2)] * (capacity + 2), torch.float32)
    assert len(check(SHAPES, torch.float32, capacity=2).stats) == 3 + 4  # the backward writes zeros, too


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "dtype", "layout"),
    [
        ("", torch.float32, "contiguous"),
        ("layer2", torch.bfloat16, "contiguous"),
        ("layer2", torch.float32, "channels-last"),
        ("layer2", torch.bfloat16, "channels-last"),
    ],
    ids=str,
)
def test_bytes_of_resnet50(layers: str, dtype: torch.dtype, layout: str) -> None:
    """All layers, or those of a stage."""
    named = models.create("resnet50").named_parameters()
    shapes = [tuple(parameter.shape) for name, parameter in named if parameter.dim() == 4 and layers in name]
    weights = cases.random_weights(shapes, dtype, layout)
    forward, backward = call(weights, arch="sm_90", **cuda.COUNTING).stats
    read = sum(weight.nbytes for weight in weights if weight.shape[3] > 1)
    written = sum(weight.nbytes for weight in weights)
    assert forward.traffic_ratio(read) <= 1.05
    assert backward.traffic_ratio(read + written) <= 1.05
    assert forward.load_efficiency >= 0.95
    assert backward.load_efficiency >= 0.95
    assert backward.store_efficiency >= 0.95
    for stats in (forward, backward):
        assert stats.bank_conflicts <= 0.05 * stats.shared_wavefronts


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*ARCHITECTURES, "sm_100", "sm_120"])
def test_budget(arch: str) -> None:
    budget = cuda.budget(SOURCE, arch)
    assert len(budget) == 2 * len(cases.DTYPES)
    for name, kernel in budget.items():
        assert kernel.local_bytes == 0, name
        assert kernel.registers <= (128 if "kernelId" in name else 64)
        assert kernel.shared_bytes <= 48 * 1024
        if "kernelIf" in name:
            assert len(cuda.wide(kernel.ptx, "ld.global.nc")) >= 4
        if "backward_kernelIf" in name:
            assert len(cuda.wide(kernel.ptx, "st.global.cg")) >= 4


# name: (what must be reported, file, text, what it becomes)
FAULTS = {
    "no barrier before the slices are read": (
        "race_shared|uninit_shared",
        "decorrelation_kernel_covariance_run.cuh",
        "    read_run<T>(run, tile);\n    __syncthreads();",
        "    read_run<T>(run, tile);",
    ),
    "no barrier before the gradient is read": (
        "race_shared|uninit_shared",
        "decorrelation_kernel_covariance.cu",
        "  __syncthreads();\n  write_run<T>(run, result);",
        "  write_run<T>(run, result);",
    ),
    "no barrier before the mask is read": (
        "race_shared|uninit_shared",
        "decorrelation_kernel_covariance_run.cuh",
        "    __syncthreads();\n  }\n  return {",
        "  }\n  return {",
    ),
    "no fence before the ticket": ("race_global", "reduce.cuh", "__threadfence();  // what this thread wrote", "//"),
    "an element past the end": (
        "oob|race_global",
        "decorrelation_kernel_covariance_run.cuh",
        "i < min(e + kWidth<T>, size); ++i) out[i]",
        "i <= min(e + kWidth<T>, size); ++i) out[i]",
    ),
    "a load past the end": (
        "oob",
        "decorrelation_kernel_covariance_run.cuh",
        "if (e + i < size) to.x[i]",
        "if (e + i <= size) to.x[i]",
    ),
    "vectors where there are none": (
        "misaligned",
        "decorrelation_kernel_covariance_run.cuh",
        "if (run.layer.aligned && e + kWidth<T> <= size) {\n      const auto vector",
        "if (e + kWidth<T> <= size) {\n      const auto vector",
    ),
    "a slice too many": (
        "oob|uninit_shared",
        "decorrelation_kernel_covariance_run.cuh",
        "i < run.count; i += kThreads)",
        "i <= run.count; i += kThreads)",
    ),
    "half of a warp": (
        "mask|lane",
        "reduce.cuh",
        "__shfl_xor_sync(kWholeWarp, x, offset)",
        "__shfl_xor_sync(0xffffu, x, offset)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, file, old, new = FAULTS[fault]
    shapes = [(9, 65, 3, 3), (5, 3, 3, 3), (3, 2, 2, 4)]
    layout = "unaligned" if fault in ("vectors where there are none", "a load past the end") else "contiguous"
    with pytest.raises((PtxError, AssertionError), match=expected):
        call(cases.random_weights(shapes, layout=layout), cases.random_mask(shapes), fault=(file, old, new))
