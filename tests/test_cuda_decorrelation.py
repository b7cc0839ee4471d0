"""csrc/cuda/decorrelation_gram.cu, its PTX executed on the CPU: values, races, tasks, bytes, budgets, planted faults.

The other kinds have tests of their own; every kind runs the cases of test_op_decorrelation.py, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import cases
import cuda_kernels as cuda
import pytest
import torch
from cuda_kernels import COUNTING, EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from simulated import cuda_decorrelation_gram as launchers
from torch import Tensor

from fastprune import models, ops
from fastprune.ops import reference

SOURCE = "decorrelation_gram"
KINDS = ("covariance", "correlation")
# Small tiles and large ones, several panels, rows of no whole vectors, a depth of several chunks.
SHAPES = [(16, 3, 3, 3), (40, 16, 3, 3), (70, 33), (5, 7)]
PANELS = [(130, 40), (33, 65), (20, 12)]


@dataclass(frozen=True)
class Outcome:
    """What a forward and a backward left, and what their launches cost."""

    penalty: Tensor
    coefficients: Tensor
    gradients: list[Tensor]
    stats: list[Any]

    def tensors(self) -> list[Tensor]:
        return [self.penalty, self.coefficients, *self.gradients]


def call(
    weights: list[Tensor],
    kind: str,
    diagonal: bool = True,
    mask: Tensor | None = None,
    precision: str = "highest",
    arch: str = "sm_80",
    **options: Any,
) -> Outcome:
    gpu = Gpu(arch, options, options.pop("fault", None), options.pop("capacity", None), options.pop("shift", 0))
    penalty, coefficients = launchers.forward(gpu, weights, kind, diagonal, mask, precision)
    grad = torch.tensor(0.5, dtype=penalty.dtype)
    gradients = launchers.backward(gpu, grad, weights, coefficients, kind, diagonal, mask, precision)
    return Outcome(penalty, coefficients, gradients, gpu.stats)


def expected(
    weights: list[Tensor], kind: str, diagonal: bool, mask: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    doubles, half = [weight.double() for weight in weights], torch.tensor(0.5, dtype=torch.float64)
    penalty, coefficients = reference.decorrelation(doubles, kind, diagonal, mask, "highest")
    gradients = reference.decorrelation_backward(half, doubles, coefficients, kind, diagonal, mask, "highest")
    return penalty, coefficients, gradients


def check(
    shapes: cases.Shapes,
    dtype: torch.dtype,
    kind: str,
    layout: str = "contiguous",
    masked: bool = False,
    diagonal: bool = True,
    **options: Any,
) -> Outcome:
    weights = cases.random_weights(shapes, dtype, layout)
    mask = cases.random_mask(shapes) if masked else None
    outcome = call(weights, kind, diagonal, mask, **options)
    penalty, coefficients, gradients = expected(weights, kind, diagonal, mask)
    cases.assert_near(outcome.penalty, penalty, "penalty")
    if kind == "correlation":
        cases.assert_near(outcome.coefficients, coefficients, "coefficients")
    else:
        assert torch.equal(outcome.coefficients, coefficients)
    for i, (gradient, want) in enumerate(zip(outcome.gradients, gradients)):
        assert gradient.stride() == weights[i].stride()
        cases.assert_near(gradient, want, f"gradient {i}")
    return outcome


@EITHER
@pytest.mark.parametrize("kind", KINDS)
def test_one_launch_forward_and_one_backward(kind: str, arch: str) -> None:
    assert len(check(SHAPES, torch.float32, kind, masked=True, arch=arch).stats) == 2


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_other_dtypes_unaligned(dtype: torch.dtype) -> None:
    check(SHAPES[1:], dtype, "covariance", "unaligned", diagonal=False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_results_beside_a_vector(dtype: torch.dtype, kind: str) -> None:
    check(SHAPES, dtype, kind, shift=dtype.itemsize)


# Of the penalty, and of coefficients and gradients by their norms; at least the second is there to see, so that the
# products are not more exact than what was asked for and paid for.
PRECISIONS = {"high": (1e-3, 1e-5, 1e-3), "medium": (8e-3, 1e-4, 8e-3)}


@pytest.mark.parametrize("precision", ["medium", pytest.param("high", marks=pytest.mark.slow)])
def test_precisions(precision: str) -> None:
    weights = cases.random_weights([(40, 16, 3, 3), (20, 70)])
    outcome = call(weights, "correlation", precision=precision)
    penalty, coefficients, gradients = expected(weights, "correlation", True, None)
    of_penalty, least, most = PRECISIONS[precision]
    torch.testing.assert_close(outcome.penalty.double(), penalty, rtol=of_penalty, atol=0)
    for result, want in zip([outcome.coefficients, *outcome.gradients], [coefficients, *gradients]):
        assert least <= (result.double() - want).norm() / want.norm() <= most


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_tensor_cores_may_cut_off_their_sums(kind: str) -> None:
    # They round towards 0. Over a depth of thousands that adds up; here it does not.
    check([(20, 4608)], torch.float32, kind, mma_round="rz")


@pytest.mark.parametrize("kind", ["correlation", pytest.param("covariance", marks=pytest.mark.slow)])
def test_pruned_filters_count_for_nothing_whatever_they_hold(kind: str) -> None:
    weights, mask = cases.random_weights(PANELS), cases.random_mask(PANELS)
    mask[:64] = False  # a panel without filters
    spoiled = [weight.clone() for weight in weights]
    for weight, kept in zip(spoiled, mask.split([len(weight) for weight in weights])):
        weight[~kept] = torch.nan
    results, plain = call(spoiled, kind, mask=mask), call(weights, kind, mask=mask)
    assert all(map(torch.equal, results.tensors(), plain.tensors()))
    for gradient, kept in zip(results.gradients, mask.split([len(weight) for weight in weights])):
        assert gradient[~kept].eq(0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_not_hidden(kind: str) -> None:
    (weight,) = cases.random_weights([(40, 20)])
    weight[3, 5] = torch.nan
    outcome = call([weight], kind)
    assert outcome.penalty.isnan()
    assert outcome.gradients[0].isnan().all()


@pytest.mark.parametrize("kind", ["correlation", pytest.param("covariance", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "order", [ORDERS[2], pytest.param(ORDERS[1], marks=pytest.mark.slow)], ids=["random", "reverse"]
)
def test_bits_do_not_depend_on_the_order_of_blocks(order: dict[str, Any], kind: str) -> None:
    weights = cases.random_weights(PANELS)
    assert all(map(torch.equal, call(weights, kind, **order).tensors(), call(weights, kind).tensors()))


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [1, 40])
def test_tasks_end_on_any_number_of_blocks(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = cases.random_weights(PANELS)
    expected = call(weights, "correlation").tensors()
    monkeypatch.setattr(launchers, "BLOCKS", blocks)
    assert all(map(torch.equal, call(weights, "correlation").tensors(), expected))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_layers_than_the_table_holds(kind: str) -> None:
    weights, mask = cases.random_weights(SHAPES), cases.random_mask(SHAPES)
    split = call(weights, kind, mask=mask, capacity=3)
    assert len(split.stats) == 4
    assert all(map(torch.equal, split.tensors(), call(weights, kind, mask=mask).tensors()))


@pytest.mark.slow
def test_a_full_table() -> None:
    shapes = [(2, 3)] * (launchers.host().gram_capacity() + 2)
    assert len(check(shapes, torch.float32, "covariance").stats) == 4


# ------------------------------------------------------------------------------------------ what it costs


def weights_bytes(weights: list[Tensor]) -> int:
    return sum(weight.nbytes for weight in weights)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_large_layers(kind: str) -> None:
    shapes = [(256, 1152), (512, 512)]
    outcome = check(shapes, torch.float32, kind, arch="sm_90")
    forward, backward = outcome.stats
    weights = 4 * sum(filters * size for filters, size in shapes)
    # Each filter once for its mean (twice for a correlation's norm, which is in the first-level cache), and once for
    # each panel of 64 filters it is multiplied with: from the second-level cache all times but one.
    panels = sum(filters * size * 4 * (filters // 64) for filters, size in shapes)
    measured = weights * (2 if kind == "correlation" else 1)
    assert forward.unique_load_bytes <= 1.2 * weights
    assert measured + panels <= forward.global_load_bytes <= 1.02 * (measured + panels)
    assert backward.unique_load_bytes <= (3 if kind == "correlation" else 1.3) * weights
    # No Gram matrix: of a covariance two bits an entry; of a correlation the coefficients, once.
    matrices = sum(filters**2 for filters, _ in shapes)
    stored = matrices // 4 if kind == "covariance" else 4 * matrices
    slots = 0 if kind == "covariance" else 8 * sum(filters * filters // 64 for filters, _ in shapes)
    assert outcome.coefficients.nbytes == stored
    assert forward.global_store_bytes <= stored + slots + 64 * 1024
    assert backward.global_store_bytes <= weights + 64 * 1024
    for stats in outcome.stats:
        assert stats.bank_conflicts <= 0.05 * stats.shared_ideal_wavefronts
        assert stats.mma > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_memory_gives_the_weights_of_resnet50_twice(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # With a quarter of the channels, a sixteenth of the weights, of an A100's blocks at once, and of its 40 MB.
    monkeypatch.setattr(launchers, "BLOCKS", 3 * 108 // 16)
    convolutions = [p for p in models.create("resnet50").parameters() if p.dim() == 4]
    shapes = [(p.shape[0] // 4, (p.shape[1] // 4 or p.shape[1]) * p[0, 0].numel()) for p in convolutions]
    cached: dict[str, Any] = {**COUNTING, "batch": launchers.BLOCKS, "l2": 40 * 2**20 // 16}
    outcome = call(cases.random_weights(shapes), kind, **cached)
    forward, backward = outcome.stats
    weights = 4 * sum(filters * size for filters, size in shapes)
    assert weights > 2 * cached["l2"]  # once for all means, and once for all tiles: not what is left of the means
    assert forward.l2.missed_bytes / weights == pytest.approx(2.01, abs=0.01)
    twice = 2.05 if kind == "correlation" else 2.01
    assert (backward.l2.missed_bytes - outcome.coefficients.nbytes) / weights == pytest.approx(twice, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bank_conflicts(kind: str) -> None:
    weights = cases.random_weights([(128, 128), (32, 144)])
    for dtype in (torch.float32, torch.float64):
        for stats in call([weight.to(dtype) for weight in weights], kind).stats:
            assert stats.bank_conflicts <= 0.05 * stats.shared_ideal_wavefronts


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_budget(arch: str) -> None:
    budget = cuda.budget(SOURCE, arch)
    assert len(budget) == 8
    products = {0: "m16n8k8.row.col.f32.tf32", 1: "m16n8k8.row.col.f32.tf32", 2: "m16n8k16.row.col.f32.bf16"}
    for name, kernel in budget.items():
        assert kernel.local_bytes == 0
        # Two blocks of 128 threads on a multiprocessor; three forward, but in highest precision.
        assert kernel.registers <= (255 if "PrecisionE0" in name or "backward" in name else 168)
        assert kernel.shared_bytes <= 48 * 1024
        (precision,) = re.findall(r"PrecisionE(\d)", name)
        product = products[int(precision)] if "kernelIf" in name else "m8n8k4.row.col.f64"
        assert f"mma.sync.aligned.{product}" in kernel.ptx
        assert len(cuda.wide(kernel.ptx, "ld.global.nc")) >= 4
        if "backward" in name:
            assert len(cuda.wide(kernel.ptx, "st.global.cg")) >= 4


@pytest.mark.parametrize("op", ["decorrelation", "decorrelation_backward"])
def test_serves_cuda_where_it_was_built(op: str) -> None:
    built = torch.version.cuda is not None and find_spec("fastprune._cuda") is not None
    (serving,) = (row for row in ops.backends() if (row.op, row.device) == (op, "cuda"))
    assert serving.implementation == ("cuda" if built else "triton")


# ------------------------------------------------------------------------------------------ planted faults

# name: (what must be reported, file, text, what it becomes)
FAULTS = {
    "no barrier after panels are put": (
        "race_shared",
        "gram_forward.cuh",
        "right.put(layer, call, depth, sides(buffer)[1]);\n    __syncthreads();",
        "right.put(layer, call, depth, sides(buffer)[1]);",
    ),
    "no barrier before the outcome is put where the panels were": (
        "race_shared",
        "gram_forward.cuh",
        "  __syncthreads();  // all have read what lies where the outcome goes",
        "",
    ),
    "no barrier before warps are added up": (
        "race_shared",
        "gram_forward.cuh",
        "  __syncthreads();\n  if (warp == 0)",
        "  if (warp == 0)",
    ),
    "no fence before means are reported": (
        "race_global",
        "gram.cuh",
        "  __threadfence();  // what this thread wrote comes before the block's report",
        "",
    ),
    "no fence after waiting for means": (
        "race_global",
        "tasks.cuh",
        "  __syncthreads();\n  __threadfence();\n}",
        "  __syncthreads();\n}",
    ),
    "no fence before the ticket": ("race_global", "reduce.cuh", "  __threadfence();  // what this thread", "//"),
    "a vector past the end": ("oob", "gram.cuh", "if (k < size) raw = load<4>", "if (k <= size) raw = load<4>"),
    "an element past the end": ("oob", "gram.cuh", "if (k + i < size) elements", "if (k + i <= size) elements"),
    "filters past the end": (
        "oob|uninit_global",
        "gram_forward.cuh",
        "if (row < rows && first + row < layer.filters)",
        "if (row < rows)",
    ),
    "vectors where there are none": (
        "misaligned",
        "gram.cuh",
        "layer.size, k, layer.size, layer.aligned);",
        "layer.size, k, layer.size, true);",
    ),
    "half of the warp's mask": (
        "outside its member mask",
        "reduce.cuh",
        "kWholeWarp = 0xffffffffu",
        "kWholeWarp = 0x0000ffffu",
    ),
    "words that nobody writes": (
        "were not written",
        "gram_outcome.cuh",
        "panel * each + word < length)",
        "panel * each + word < length - 1)",
    ),
}
QUICK_FAULTS = ("no fence before means are reported",)


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if name in QUICK_FAULTS else pytest.mark.slow) for name in FAULTS]
)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, file, old, new = FAULTS[fault]
    weights = cases.random_weights([(70, 36), (33, 35), (20, 75)])
    with pytest.raises((PtxError, AssertionError), match=expected):
        call(weights, "covariance", fault=(file, old, new))
