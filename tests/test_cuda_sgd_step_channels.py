"""csrc/cuda/sgd_step_channels.cu, its PTX executed on the CPU: launches, orders, bytes, budget, planted faults."""

from __future__ import annotations

from typing import Any

import cases
import cuda_kernels as cuda
import pytest
import torch
from cuda_kernels import EITHER, ORDERS
from ptxrun import PtxError
from simulated import Gpu
from simulated.cuda_sgd_step import channel_grids, launch_channels
from torch import Tensor

from fastprune import models
from fastprune.ops.reference import SgdStep

# Several groups of channels, the last one smaller; fewer channels than slots; a channel wider than all slots; one row.
SHAPES: cases.Shapes = [(5, 9, 3, 3), (40, 3, 2, 2), (3, 2, 11, 7), (1, 130)]


def measure(gpu: Gpu, weights: list[Tensor], ord: int = 1) -> Tensor:
    """The norms of the input channels of the weights, as they are."""
    norms = torch.empty(sum(weight.shape[1] for weight in weights))
    nothing: dict[str, Any] = dict.fromkeys(("grad_scale", "found_inf", "mask", "filter_decay", "norms"))
    numbers = {"lr": torch.tensor(0.1), "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    switches = {"nesterov": False, "maximize": False, "first": False}
    lists = {"params": weights, "grads": weights, "momenta": [], "masked": [], "layers": len(weights)}
    launch_channels(gpu, SgdStep(**lists, **numbers, **switches, **nothing, channel_norms=norms, ord=ord), norms)
    return norms


def exact(weights: list[Tensor], ord: int = 1) -> Tensor:
    return torch.cat([weight.double().transpose(0, 1).flatten(1).abs().pow(ord).mean(1) for weight in weights])


@EITHER
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_values(dtype: torch.dtype, layout: str, arch: str) -> None:
    weights, gpu = cases.random_weights(SHAPES, dtype, layout), Gpu(arch)
    for ord in (1, 2):
        cases.assert_near(measure(gpu, weights, ord), exact(weights, ord), "channel_norms", torch.float32)
    assert len(gpu.stats) == 2


def test_bits_do_not_depend_on_the_order_of_blocks() -> None:
    weights = cases.random_weights(SHAPES)
    first, *others = [measure(Gpu("sm_80", options=order), weights) for order in ORDERS]
    assert all(torch.equal(first, other) for other in others)


def test_weights_beyond_a_table_take_another_launch() -> None:
    weights, gpu = cases.random_weights(SHAPES), Gpu("sm_80", capacity=3)
    assert torch.equal(measure(gpu, weights), measure(Gpu("sm_80"), weights))
    assert len(gpu.stats) == 2


@pytest.mark.parametrize("name", ["resnet50", "resnet152"])
def test_one_launch_whatever_the_network(name: str) -> None:
    weights = [p for p in models.create(name).parameters() if p.dim() == 4]
    (grid,) = channel_grids(weights, [0] * len(weights))
    # 64 channels of a 1×1 to a block, 7 of a 3×3: enough blocks for all multiprocessors.
    assert grid.blocks > 500


@pytest.mark.parametrize(("layout", "least"), [("contiguous", 0.85), ("channels-last", 0.99)])
def test_every_byte_is_read_once(layout: str, least: float) -> None:
    gpu, weights = Gpu("sm_80"), cases.random_weights([(16, 64, 3, 3), (16, 128, 1, 1)], layout=layout)
    norms = measure(gpu, weights)
    (stats,) = gpu.stats
    nbytes = sum(weight.nbytes for weight in weights)
    assert (stats.unique_load_bytes, stats.unique_store_bytes) == (nbytes, norms.nbytes)
    assert stats.traffic_ratio(nbytes + norms.nbytes) <= 1.001
    assert stats.load_efficiency >= least  # 7 channels of 3×3 are 252 bytes, which begin within a sector


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
def test_budget(arch: str) -> None:
    budget = cuda.budget("sgd_step_channels", arch)
    assert len(budget) == len(cases.DTYPES)
    for kernel in budget.values():
        assert kernel.local_bytes == 0
        assert kernel.registers <= 64  # two blocks of 512 threads on a multiprocessor
        assert kernel.shared_bytes == 4096


# name: (what must be reported, text, what it becomes)
FAULTS = {
    "no barrier between halves": ("race_shared", "__syncthreads();\n    if (thread < half)", "if (thread < half)"),
    "no barrier before the totals": (
        "race_shared",
        "__syncthreads();\n  if (thread >= channels)",
        "if (thread >= channels)",
    ),
    "a row too many": ("oob", "r < layer.rows", "r <= layer.rows"),
    "a column too many": ("oob", "column < columns", "column <= columns"),
    "a norm too many": ("oob|race_global", "if (thread >= channels) return;", "if (thread > channels) return;"),
    "whole groups only": ("oob|race_global", "min(layer.group, layer.channels - begin)", "layer.group"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_reported(fault: str) -> None:
    expected, old, new = FAULTS[fault]
    with pytest.raises((PtxError, AssertionError), match=expected):
        measure(Gpu("sm_80", fault=("sgd_step_channels.cu", old, new)), cases.random_weights(SHAPES))
