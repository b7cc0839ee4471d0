"""weight_mask: masks of single weights under one threshold."""

import functools

import baselines
import pytest
import torch
from layers import PRUNE_RATE, Measure, Network, Ready, Work, network
from torch import Tensor

from fastprune import ops
from fastprune.ops import reference

RIVALS = {
    "fastprune": ops.weight_mask,
    "pytorch": baselines.pytorch_weight_masks,
    "pytorch topk": baselines.pytorch_topk_weight_masks,
    "pytorch foreach": baselines.pytorch_foreach_weight_masks,
    "torch.compile": baselines.pytorch_weight_masks,
    "original": baselines.original_weight_masks,
}


@functools.cache
def expected(name: str) -> list[Tensor]:
    return reference.weight_mask(network(name).weights, PRUNE_RATE, "l1", [])


@pytest.mark.rivals(
    "fastprune",
    "pytorch",
    ops=["weight_mask"],
    gpu=["pytorch topk", "pytorch foreach", "torch.compile"],
    host=["original"],
)
def test_weight_mask(measure: Measure, ready: Ready, network: Network, rival: str) -> None:
    function = baselines.compiled(RIVALS[rival]) if rival == "torch.compile" else RIVALS[rival]
    call = ready(functools.partial(function, network.weights, PRUNE_RATE))
    for result, mask in zip(call(), expected(network.name)):
        assert torch.equal(result.bool().cpu(), mask)
    work = Work(5 * network.elements, network.elements)  # weights read once, a byte written
    measure("weight_mask", network, call, work, seconds=1.5)
