"""masked_weights: all masked weights in bfloat16, and with the straight-through gradient back to float32."""

from collections.abc import Callable

import baselines
import pytest
import torch
from layers import Measure, Network, Ready, Work
from torch import Tensor

from fastprune import ops


def function_of(rival: str, mask: Tensor) -> Callable[[list[Tensor], list[Tensor], torch.dtype], list[Tensor]]:
    """The masked weights of (weights, masks, dtype); ours take the one mask of all layers instead."""
    if rival == "fastprune":
        return lambda weights, masks, dtype: ops.masked_weights(weights, mask, dtype)
    if rival == "torch.compile":
        return baselines.compiled(baselines.pytorch_masked)
    return {
        "pytorch": baselines.pytorch_masked,
        "pytorch foreach": baselines.pytorch_foreach_masked,
        "original": baselines.original_masked,
    }[rival]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.rivals(
    "fastprune",
    "pytorch",
    "original",
    ops=["masked_weights", "masked_weights_backward"],
    gpu=["pytorch foreach", "torch.compile"],
)
def test_masked_weights(measure: Measure, ready: Ready, network: Network, rival: str, backward: bool) -> None:
    weights = [weight.clone().requires_grad_(backward) for weight in network.weights]
    rows = network.mask.float().split([len(weight) for weight in weights])
    masks = [row.view(-1, 1, 1, 1) for row in rows]
    if rival in ("original", "pytorch foreach"):
        masks = [mask.expand_as(weight).contiguous() for mask, weight in zip(masks, weights)]
    upstream = [torch.randn_like(weight, dtype=torch.bfloat16) for weight in network.weights]

    function = function_of(rival, network.mask)

    def eager() -> tuple[Tensor, ...]:
        results = function(weights, masks, torch.bfloat16)
        return torch.autograd.grad(results, weights, upstream) if backward else tuple(results)

    call = ready(eager)

    if backward:
        expected = [grad.float() for grad in upstream]
    else:
        expected = [(w * row.view(-1, 1, 1, 1)).bfloat16() for w, row in zip(network.weights, rows)]
    assert all(map(torch.equal, call(), expected))
    # Forward reads the kept filters (at most all) and writes 2 bytes each; backward reads 2 and writes 4.
    bytes_moved = network.elements * (6 + 6 * backward)
    op = "masked_weights fwd+bwd" if backward else "masked_weights"
    measure(op, network, call, Work(bytes_moved, network.elements))
