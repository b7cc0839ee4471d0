"""update_filter_masks_: norms of all filters, the global threshold, the mask."""

from collections.abc import Callable
from typing import Any

import baselines
import pytest
import torch
from layers import PRUNE_RATE, Measure, Network, Ready, Work

from fastprune import ops


@pytest.mark.rivals(
    "fastprune",
    "pytorch",
    "pytorch vector_norm",
    ops=["update_filter_masks_"],
    gpu=["pytorch topk", "torch.compile"],
    host=["original"],
)
def test_filter_mask(measure: Measure, ready: Ready, network: Network, rival: str) -> None:
    weights, mask = network.weights, torch.zeros_like(network.mask)
    expanded = [torch.ones_like(weight) for weight in weights] if rival == "original" else []
    calls: dict[str, Callable[[], Any]] = {
        "fastprune": lambda: ops.update_filter_masks_(weights, PRUNE_RATE, mask),
        "pytorch": lambda: baselines.pytorch_masks(weights, PRUNE_RATE),
        "pytorch vector_norm": lambda: baselines.pytorch_vector_norm_masks(weights, PRUNE_RATE),
        "pytorch topk": lambda: baselines.pytorch_topk_masks(weights, PRUNE_RATE),
        "original": lambda: baselines.original_masks(weights, PRUNE_RATE, expanded),
    }
    call = ready(baselines.compiled(calls["pytorch"]) if rival == "torch.compile" else calls[rival])
    result = call()
    if rival == "original":
        result = torch.cat([layer.flatten(1)[:, 0] > 0 for layer in expanded])
        assert all((layer.flatten(1) == layer.flatten(1)[:, :1]).all() for layer in expanded)
    # Scores differ in their last bits, so filters at the threshold may change places.
    assert torch.count_nonzero(result ^ network.mask) <= 2
    flops = 2 * network.elements
    measure("update_filter_masks_", network, call, Work(4 * network.elements, flops))


@pytest.mark.rivals("(bare read)")
def test_floor(measure: Measure, ready: Ready, network: Network) -> None:
    """As many bytes read once, from one tensor: no mask can be had in less time from weights that are in memory."""
    flat = torch.cat([weight.flatten() for weight in network.weights])
    assert flat.numel() == network.elements
    measure("update_filter_masks_", network, ready(flat.sum), Work(4 * network.elements, network.elements))
