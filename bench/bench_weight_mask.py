"""weight_mask: masks of single weights under one threshold."""

import functools

import baselines
import pytest
import torch
from layers import PRUNE_RATE, Measure, Network, Work, network
from torch import Tensor

from fastprune import ops
from fastprune.ops import reference

RIVALS = {
    "fastprune": ops.weight_mask,
    "pytorch": baselines.pytorch_weight_masks,
    "original": baselines.original_weight_masks,
}


@functools.cache
def expected(name: str) -> list[Tensor]:
    return reference.weight_mask(network(name).weights, PRUNE_RATE, "l1", [])


@pytest.mark.parametrize("rival", RIVALS)
def test_weight_mask(measure: Measure, network: Network, rival: str) -> None:
    call = functools.partial(RIVALS[rival], network.weights, PRUNE_RATE)
    for result, mask in zip(call(), expected(network.name)):
        assert torch.equal(result.bool(), mask)
    work = Work(5 * network.elements, network.elements)  # weights read once, a byte written
    measure("weight_mask", network, rival, call, work, seconds=1.5)
