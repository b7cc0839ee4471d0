"""csrc/cuda/hyper_weight.cu, its PTX executed on the CPU: memory safety, races, orders, bytes, planted faults."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import cases
import cuda_kernels as cuda
import pytest
import torch
from cuda_kernels import EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from simulated import cuda_hyper_weight as launchers
from test_op_hyper_weight import Case, Layer, layer_of, upstream_of
from torch import Tensor

from fastprune import ops

# (O, I, kh, kw), (out, in), H. Lines that are whole in a tile, windows of longer ones that begin on a sector or before,
# taps in groups, several panels, unaligned rows.
CASES: dict[str, Case] = {
    "whole lines": ((5, 16, 3, 3), (4, 11), 32),
    "windows": ((3, 320, 3, 3), (2, 307), 8),
    "even windows": ((2, 256, 3, 3), (2, 240), 4),
    "groups of taps": ((2, 9, 9, 9), (2, 7), 4),
    "panels": ((4, 5, 2, 2), (3, 4), 300),
    "unaligned": ((4, 7, 3, 2), (3, 5), 9),
    "many tiles": ((530, 2, 2, 1), (525, 2), 4),  # more than blocks of the backward
    "pointwise": ((40, 30, 1, 1), (33, 17), 32),
}


@dataclass(frozen=True)
class Outcome:
    """What a launch of each direction left, and what it cost."""

    tensors: list[Tensor]
    stats: list[Any]


def call(
    layer: Layer, dtype: torch.dtype = torch.float32, channels_last: bool = True, gpu: Gpu | None = None
) -> Outcome:
    """The generated weight, and the gradients of hidden, weight and bias."""
    gpu = gpu or Gpu("sm_80")
    sizes = layer.out_channels, layer.in_channels, layer.shape
    generated = launchers.hyper_weight(gpu, *layer.tensors, *sizes, dtype, channels_last)
    upstream = upstream_of(layer, dtype, "channels-last" if channels_last else "contiguous")
    gradients = launchers.hyper_weight_backward(gpu, upstream, layer.hidden, layer.weight, layer.shape)
    return Outcome([generated, *gradients], gpu.stats)


def check(layer: Layer, channels_last: bool, gpu: Gpu) -> None:
    generated, *gradients = call(layer, torch.float32, channels_last, gpu).tensors
    cases.assert_near(generated, layer.generated())
    upstream = upstream_of(layer, torch.float32, "channels-last" if channels_last else "contiguous")
    for gradient, expected in zip(gradients, layer.gradients(upstream)):
        cases.assert_near(gradient, expected)


def check_all(layers: Sequence[Layer], gpu: Gpu) -> None:
    for layer in layers:
        check(layer, True, gpu)


@EITHER
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_values_in_one_launch_each(case: str, channels_last: bool, arch: str) -> None:
    gpu = Gpu(arch)
    check(layer_of(CASES[case]), channels_last, gpu)
    assert len(gpu.stats) == 2


@pytest.mark.parametrize("channels_last", [False, True])
def test_beside_a_vector(channels_last: bool) -> None:
    # Whatever is aligned and what not: the layer's rows, or where the results lie.
    for layout, shift in itertools.product(("contiguous", "unaligned"), (0, 4)):
        check(layer_of(CASES["whole lines"], layout=layout), channels_last, Gpu("sm_80", shift=shift))


@pytest.mark.parametrize("order", ORDERS[1:], ids=["reverse", "random"])
@pytest.mark.parametrize("case", ["whole lines", "panels", pytest.param("windows", marks=pytest.mark.slow)])
def test_bits_do_not_depend_on_the_order_of_blocks(case: str, order: dict[str, Any]) -> None:
    first, other = (call(layer_of(CASES[case]), gpu=Gpu("sm_80", options)).tensors for options in ({}, order))
    assert all(map(torch.equal, first, other))


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
def test_many_rows(channels_last: bool) -> None:
    # Tiles of 1,024 rows, and more of them than blocks of the backward.
    layer = layer_of(((700, 1000, 1, 1) if not channels_last else (160, 500, 3, 3), (600, 990), 4))
    layer.out_channels, layer.in_channels = (600, 990) if not channels_last else (150, 450)
    check(layer, channels_last, Gpu("sm_90", cuda.COUNTING))


# ------------------------------------------------------------------------------------------------------------ layout


def test_every_tile_fits_into_shared_memory() -> None:
    for taps, channels in itertools.product(range(1, 130), (1, 2, 3, 15, 16, 17, 31, 100, 113, 512, 2048)):
        made = launchers.geometry((9, channels, taps, 1), (9, channels), 32, True, 4, True)
        assert made.places <= launchers.host().places()
        assert made.slots <= made.blocks <= 512


def test_divisions_are_exact() -> None:
    largest = 2**31 - 1
    for divisor in [*range(1, 70), 127, 128, 129, 4607, 4608, 65535, 65537, 2**30 + 1, largest]:
        for near in (0, divisor, 7 * divisor, largest // divisor * divisor, largest):
            for n in (near - 1, near, near + 1):
                if 0 <= n <= largest:
                    assert launchers.host().divide(n, divisor) == n // divisor


def test_the_grid_of_a_backward_with_many_columns() -> None:
    for size in (2**25, 2**31 - 2**20):
        made = launchers.geometry((1, 1, 1, 1), (1, 1), size, False, 8, True)
        assert made.panels == -(-size // 64)
        assert made.panels <= 2**31 - 1  # the most in x
    assert launchers.geometry((2**15, 2**15, 1, 1), (1, 1), 32, False, 4, True).blocks <= 65535  # and in y


def test_most_rows() -> None:
    with pytest.raises(RuntimeError, match=r"a layer may generate at most 2146959359 weights on CUDA"):
        launchers.geometry((2**16, 2**15, 1, 1), (1, 1), 32, False, 4, True)
    assert launchers.geometry((2**15, 2**15, 1, 1), (2**15, 2**15), 32, False, 4, True).tiles == 2**20


# ------------------------------------------------------------------------------------------------------ bytes, budget

# R20's last stage at odd and at full widths; ResNet-50's largest convolutions, in part: 64 of 512 filters, 256 of 2048.
BYTES: dict[str, Case] = {
    "resnet20 odd": ((64, 64, 3, 3), (41, 37), 32),
    "resnet20 whole": ((64, 64, 3, 3), (64, 64), 64),
    "resnet50 3×3": ((64, 512, 3, 3), (29, 307), 32),
    "resnet50 1×1": ((256, 512, 1, 1), (153, 281), 32),
}


@pytest.mark.parametrize(
    ("dtype", "compute"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow if "50" in name or "whole" in name else []) for name in BYTES]
)
def test_bytes(case: str, channels_last: bool, dtype: torch.dtype, compute: torch.dtype) -> None:
    layer = layer_of(BYTES[case], dtype)
    outcome = call(layer, compute, channels_last, Gpu("sm_90", cuda.COUNTING))
    forward, backward = outcome.stats
    generated, *gradients = outcome.tensors
    wanted = layer.sliced(layer.weight).numel() * dtype.itemsize
    read = wanted + layer.sliced(layer.bias).numel() * dtype.itemsize + layer.hidden.nbytes
    assert (forward.unique_load_bytes, forward.unique_store_bytes) == (read, generated.nbytes)
    assert forward.traffic_ratio(read + generated.nbytes) <= 1.05
    least = wanted + generated.nbytes + layer.hidden.nbytes + sum(gradient.nbytes for gradient in gradients)
    assert backward.traffic_ratio(least) <= 1.05
    for stats in (forward, backward):
        assert stats.load_efficiency >= 0.95
        assert stats.store_efficiency >= 0.95
        assert stats.bank_conflicts <= 0.05 * stats.shared_wavefronts


@pytest.mark.slow
def test_bank_conflicts_of_short_lines() -> None:
    # The worst width found: written by channels, read by taps, of which no pitch serves both.
    forward, backward = call(layer_of(((64, 64, 3, 3), (62, 20), 32)), gpu=Gpu("sm_90", cuda.COUNTING)).stats
    assert forward.bank_conflicts <= 0.23 * forward.shared_wavefronts
    assert backward.bank_conflicts <= 0.13 * backward.shared_wavefronts


@pytest.mark.parametrize(
    "arch", ["sm_80", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("sm_90", "sm_100", "sm_120"))]
)
def test_budget(arch: str) -> None:
    budget = cuda.budget("hyper_weight", arch)
    assert len(budget) == 2 * 16
    for name, kernel in budget.items():
        backward = "backward" in name
        assert kernel.local_bytes == 0
        # Three blocks of 256 threads on a multiprocessor; of the backward of 16 bits, two.
        sixteen = "kernelI6__half" in name or "kernelI13__nv_bfloat16" in name
        assert kernel.registers <= (128 if backward and sixteen else 80)
        assert kernel.shared_bytes <= 32 << 10
        # Four vectors of 16 bytes in flight; as many products, and as many zeros, are stored.
        assert len(cuda.wide(kernel.ptx, "ld.global.nc")) == 4
        assert len(cuda.wide(kernel.ptx, "st.global.cg")) == (8 if backward else 0)


@pytest.mark.parametrize("op", ["hyper_weight", "hyper_weight_backward"])
def test_serves_cuda_where_it_was_built(op: str) -> None:
    built = torch.version.cuda is not None and find_spec("fastprune._cuda") is not None
    (serving,) = (row for row in ops.backends() if (row.op, row.device) == (op, "cuda"))
    assert serving.implementation == ("cuda" if built else "triton")


# name: (what must be reported, file, text, what it becomes)
FAULTS = {
    "no barrier before the tile is stored": (
        "race_shared",
        "hyper_weight.cu",
        "sums, Elements{});\n    __syncthreads();",
        "sums, Elements{});",
    ),
    "no barrier before the gradients are read": (
        "race_shared|uninit_shared",
        "hyper_weight.cu",
        "widen(__ldg(grad + element))); });\n    __syncthreads();",
        "widen(__ldg(grad + element))); });",
    ),
    "no barrier between two tiles": (
        "race_shared",
        "hyper_weight.cu",
        "backward.differentiate(tile, grads, Elements{});\n    __syncthreads();",
        "backward.differentiate(tile, grads, Elements{});",
    ),
    "no fence before the ticket": (
        "race_global",
        "reduce.cuh",
        "__threadfence();  // what this thread wrote comes before its block's ticket",
        "",
    ),
    "one slot for all blocks": (
        "race_global|uninit_global",
        "hyper_weight_backward.cuh",
        "slot[int64_t{blockIdx.y} * stride + k] = total",
        "slot[k] = total",
    ),
    "a block too few": (
        "race_global|not within|is not",
        "hyper_weight_backward.cuh",
        "block = part; block < slots",
        "block = part; block < slots - 1",
    ),
    "elements past a line": (
        "race_global|oob|uninit_shared",
        "hyper_weight.cuh",
        "channel >= 0 && channel < g.length",
        "channel >= 0 && channel <= g.length",
    ),
    "a row of the next tile": (
        "race_global|uninit_shared",
        "hyper_weight.cuh",
        "j >= g.window) return",
        "j > g.window) return",
    ),
    "zeros past the end": ("oob|race_global", "hyper_weight.cuh", "free >= g.free_rows", "free > g.free_rows"),
    "a vector past the panel": ("oob|race_global", "hyper_weight.cuh", "&& first < g.size)", ")"),
    "an element too many": (
        "oob|race_global",
        "vector.cuh",
        "return left < Width ? static_cast<int32_t>(left) : Width",
        "return left < Width ? static_cast<int32_t>(left) + 1 : Width",
    ),
    "vectors where there are none": (
        "misaligned",
        "hyper_weight.cu",
        "if (g.aligned)\n      generate_panel",
        "if (true)\n      generate_panel",
    ),
    "half of the warp's mask": (
        "outside its member mask",
        "reduce.cuh",
        "kWholeWarp = 0xffffffffu",
        "kWholeWarp = 0x0000ffffu",
    ),
}
FAULTY = ("windows", "whole lines", "panels", "unaligned", "many tiles")  # the cases they are looked for in
# One of each class runs with the quick tests.
QUICK_FAULTS = {"no barrier before the tile is stored", "one slot for all blocks", "elements past a line"}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[] if name in QUICK_FAULTS else pytest.mark.slow) for name in FAULTS]
)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, file, old, new = FAULTS[fault]
    gpu = Gpu("sm_80", fault=(file, old, new))
    with pytest.raises((PtxError, AssertionError), match=expected):
        check_all([layer_of(CASES[case]) for case in FAULTY], gpu)
