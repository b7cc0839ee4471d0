"""sgd_step_: a step over convolutions and batch norms, the masked weights in bfloat16, and the filter norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import baselines
import pytest
import torch
from layers import Measure, Network, Work
from torch import Tensor

from fastprune import ops
from fastprune.ops import reference

# Small, and the same gradient every time: the weights must stay what they are through hundreds of steps.
SETTINGS: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 1e-4}
FORMS: dict[str, dict[str, Any]] = {
    "pytorch for-loop": {"foreach": False},
    "pytorch foreach": {"foreach": True},
    "pytorch fused": {"fused": True},
    "original": {"foreach": False},
}
Result = tuple[list[Tensor], list[Tensor], Tensor]  # params, masked weights, norms


def start(network: Network) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Params (the convolutions first, then two vectors for the batch norm behind each), gradients and momenta."""
    norms = [torch.ones(len(weight)) for weight in network.weights for _ in range(2)]
    params = [*(weight.clone() for weight in network.weights), *norms]
    generator = torch.Generator().manual_seed(1)
    grads, momenta = ([torch.randn(p.shape, generator=generator) for p in params] for _ in range(2))
    return params, grads, momenta


def fused_call(network: Network) -> Callable[[], Result]:
    """The op, which does all of it."""
    params, grads, momenta = start(network)
    norms = torch.empty(network.filters)
    masked = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in network.weights]
    outputs: dict[str, Any] = {"layers": len(masked), "mask": network.mask, "masked": masked, "norms": norms}

    def call() -> Result:
        ops.sgd_step_(params, grads, momenta, **SETTINGS, **outputs)
        return params, masked, norms

    return call


def split_call(network: Network, rival: str) -> Callable[[], Result]:
    """torch.optim.SGD, then the masked weights, then the norms."""
    params, grads, momenta = start(network)
    weights = params[: len(network.weights)]
    optimizer = torch.optim.SGD(params, **SETTINGS, **FORMS[rival])
    for param, grad, momentum in zip(params, grads, momenta):
        param.grad = grad
        optimizer.state[param]["momentum_buffer"] = momentum
    masks = [rows.view(-1, 1, 1, 1) for rows in network.mask.float().split([len(weight) for weight in weights])]
    if rival == "original":
        masks = [mask.expand_as(weight).contiguous() for mask, weight in zip(masks, weights)]

    def call() -> Result:
        optimizer.step()
        if rival == "original":
            masked = baselines.original_masked(weights, masks, torch.bfloat16)
            return params, masked, baselines.original_norms(weights)
        return params, baselines.pytorch_masked(weights, masks, torch.bfloat16), baselines.pytorch_norms(weights)

    return call


@pytest.mark.parametrize("rival", ["fastprune", *FORMS])
def test_sgd_step(measure: Measure, network: Network, rival: str) -> None:
    call = fused_call(network) if rival == "fastprune" else split_call(network, rival)
    params, grads, momenta = start(network)
    masked = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in network.weights]
    norms, layers = torch.empty(network.filters), len(network.weights)
    lr, momentum, decay = SETTINGS.values()
    settings = (lr, momentum, 0.0, decay, False, False, False, None, None)
    reference.sgd_step_(params, grads, momenta, *settings, layers, network.mask, masked, norms, 1)
    stepped, their_masked, their_norms = call()
    for result, want in zip(stepped, params):
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-7)
    for result, want in zip(their_masked, masked):  # a last bit of float32 may decide the rounding to bfloat16
        torch.testing.assert_close(result, want, rtol=2**-7, atol=0)
    torch.testing.assert_close(their_norms, norms, rtol=1e-5, atol=0)
    # Weight, gradient and momentum are read, weight and momentum written; two bytes of each masked weight.
    elements = sum(param.numel() for param in params)
    measure("sgd_step_", network, rival, call, Work(20 * elements + 2 * network.elements, 8 * elements))
