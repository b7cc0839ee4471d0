"""kernels/hyper_weight.py, what Triton makes of it executed on the CPU: launches, orders, bytes, planted faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cases
import pytest
import torch
import triton_compiled
from cuda_kernels import COUNTING, EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from test_op_hyper_weight import Case, Layer, layer_of, upstream_of
from torch import Tensor
from triton_compiled import call, planted, ptx_of

from fastprune.kernels import hyper_weight as launchers
from fastprune.kernels import layers

SLICE: Case = ((16, 16, 3, 3), (11, 7), 32)
PANELS: Case = ((6, 5, 2, 2), (5, 4), 700)  # more columns than a tile has
UNALIGNED: Case = ((9, 5, 3, 2), (7, 3), 33)


def arguments(layer: Layer, dtype: torch.dtype = torch.float32, channels_last: bool = True) -> tuple[Any, ...]:
    return *layer.tensors, layer.out_channels, layer.in_channels, layer.shape, dtype, channels_last


def backward_arguments(layer: Layer, dtype: torch.dtype = torch.float32, channels_last: bool = True) -> tuple[Any, ...]:
    upstream = upstream_of(layer, dtype, "channels-last" if channels_last else "contiguous")
    return upstream, layer.hidden, layer.weight, layer.shape


def both(gpu: Gpu, layer: Layer, dtype: torch.dtype = torch.float32, channels_last: bool = True) -> list[Tensor]:
    """The generated weight and the gradients of hidden, weight and bias."""
    generated = call(gpu, "hyper_weight", *arguments(layer, dtype, channels_last))
    return [generated, *call(gpu, "hyper_weight_backward", *backward_arguments(layer, dtype, channels_last))]


def both_of(layers: Sequence[Layer]) -> None:
    for layer in layers:
        both(Gpu("sm_80"), layer, channels_last=False)


@pytest.mark.parametrize("order", ORDERS[1:], ids=["reverse", "random"])
@pytest.mark.parametrize("case", [SLICE, PANELS, UNALIGNED], ids=["slice", "panels", "unaligned"])
def test_one_launch_each_whose_bits_do_not_depend_on_the_order_of_blocks(case: Case, order: dict[str, Any]) -> None:
    layer = layer_of(case)
    gpu = Gpu("sm_80", options=order)
    results = both(gpu, layer)
    assert len(gpu.stats) == 2
    expected = [layer.generated(), *layer.gradients(backward_arguments(layer)[0])]
    for result, want in zip(results, expected):
        cases.assert_near(result, want)
    assert all(map(torch.equal, results, both(Gpu("sm_80"), layer)))


@EITHER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_accesses_of_16_bytes_and_no_spills(dtype: torch.dtype, arch: str) -> None:
    layer = layer_of(SLICE, dtype)
    (forward,) = ptx_of(arch, "hyper_weight", *arguments(layer, dtype))
    (backward,) = ptx_of(arch, "hyper_weight_backward", *backward_arguments(layer, dtype))
    together = layers.TILE.value * dtype.itemsize // (16 * 32 * layers.WARPS)  # vectors of a tile that a thread has
    assert len(triton_compiled.wide(forward, "ld")) >= together
    assert len(triton_compiled.wide(backward, "ld")) >= together
    assert len(triton_compiled.wide(backward, "st")) >= together
    for ptx in (forward, backward):
        local, registers = triton_compiled.local_bytes_and_registers(ptx, arch)
        assert local == 0
        assert registers <= layers.REGISTERS


def test_nothing_is_compiled_for_the_widths() -> None:
    kernels = set()
    for widths in ((11, 7), (16, 16), (1, 8), (4, 1), (16, 2)):
        layer = layer_of((SLICE[0], widths, 32))
        for channels_last in (False, True):
            by_tap = channels_last and widths[1] > 1
            found = ptx_of("sm_80", "hyper_weight", *arguments(layer, channels_last=channels_last))
            found += ptx_of("sm_80", "hyper_weight_backward", *backward_arguments(layer, channels_last=channels_last))
            kernels |= {(by_tap, ptx) for ptx in found}
    assert len(kernels) == 4  # forward and backward, in two orders


def test_the_grid_of_a_backward_with_many_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(launchers, "hyper_weight_backward_kernel", Kernel())
    for rows, size in ((1, 2**26), (2**24, 64)):
        grad, hidden, weight = (torch.empty(sizes, device="meta") for sizes in ((rows, 1, 1, 1), size, (rows, size)))
        launchers.hyper_weight_backward(grad, hidden, weight, (rows, 1, 1, 1))
    assert grids == [(2**26 // 512, 1), (1, 512)]  # of 2^31 - 1 and 65,535 at most


# R20's last stage; ResNet-50's largest convolutions, in part.
BYTES: dict[str, Case] = {
    "resnet20": ((64, 64, 3, 3), (41, 37), 32),
    "resnet50 3×3": ((64, 512, 3, 3), (29, 307), 32),
    "resnet50 1×1": ((256, 512, 1, 1), (153, 281), 64),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == "resnet20" else pytest.mark.slow) for name in BYTES]
)
def test_bytes(case: str, channels_last: bool) -> None:
    layer, gpu = layer_of(BYTES[case]), Gpu("sm_90", options=COUNTING)
    generated, *gradients = both(gpu, layer, torch.bfloat16, channels_last)
    forward, backward = gpu.stats
    wanted, biases = (4 * layer.sliced(rows).numel() for rows in (layer.weight, layer.bias))
    least = wanted + biases + layer.hidden.nbytes + generated.nbytes
    assert triton_compiled.bytes_of(forward) / least <= 1.05
    least = wanted + layer.hidden.nbytes + generated.nbytes + sum(gradient.nbytes for gradient in gradients)
    assert triton_compiled.bytes_of(backward) / least <= 1.05
    for stats in (forward, backward):
        assert triton_compiled.sector_efficiency(stats, "global load 16B") >= 0.95
    assert triton_compiled.sector_efficiency(backward, "global store 16B") >= 0.95


FAULTS = {
    "biases past the end": ("oob", "mask=there[:, None] & first, other=0", "mask=first, other=0"),
    "columns past the end": ("oob|race_global", "[:, None] & (column < size)[None, :]", "[:, None]"),
    "weights past the end": ("oob|race_global", "there = element < wanted", "there = element <= wanted"),
    "rows past the end": ("oob|race_global", "inside = (row < rows)[:, None] &", "inside = (row <= rows)[:, None] &"),
    "filters that are not wanted": ("oob", "& (filters < out_channels)", ""),
    "one slot for all programs": ("race_global|uninit_global", "slot = tl.program_id(1) * stride", "slot = 0 * stride"),
    "a slot too many": ("oob|uninit_global", "mask=(slot < programs)", "mask=(slot <= programs)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, old, new = FAULTS[fault]
    with planted("hyper_weight.py", old, new), pytest.raises((PtxError, AssertionError), match=expected):
        both_of([layer_of(SLICE), layer_of(UNALIGNED)])
