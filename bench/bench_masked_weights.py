"""masked_weights: all masked weights in bfloat16, and with the straight-through gradient back to float32."""

import baselines
import pytest
import torch
from layers import Measure, Network, Work
from torch import Tensor

from fastprune import ops


def masked(network: Network, rival: str, weights: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
    if rival == "fastprune":
        return ops.masked_weights(weights, network.mask, torch.bfloat16)
    baseline = baselines.pytorch_masked if rival == "pytorch" else baselines.original_masked
    return baseline(weights, masks, torch.bfloat16)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("rival", ["fastprune", "pytorch", "original"])
def test_masked_weights(measure: Measure, network: Network, rival: str, backward: bool) -> None:
    weights = [weight.clone().requires_grad_(backward) for weight in network.weights]
    rows = network.mask.float().split([len(weight) for weight in weights])
    masks = [row.view(-1, 1, 1, 1) for row in rows]
    if rival == "original":
        masks = [mask.expand_as(weight).contiguous() for mask, weight in zip(masks, weights)]
    upstream = [torch.randn_like(weight, dtype=torch.bfloat16) for weight in network.weights]

    def call() -> tuple[Tensor, ...]:
        results = masked(network, rival, weights, masks)
        return torch.autograd.grad(results, weights, upstream) if backward else tuple(results)

    if backward:
        expected = [grad.float() for grad in upstream]
    else:
        expected = [(w * row.view(-1, 1, 1, 1)).bfloat16() for w, row in zip(network.weights, rows)]
    assert all(map(torch.equal, call(), expected))
    # Forward reads the kept filters (at most all) and writes 2 bytes each; backward reads 2 and writes 4.
    bytes_moved = network.elements * (6 + 6 * backward)
    op = "masked_weights fwd+bwd" if backward else "masked_weights"
    measure(op, network, rival, call, Work(bytes_moved, network.elements))
