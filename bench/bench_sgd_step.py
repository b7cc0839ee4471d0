"""sgd_step_: a step over convolutions and batch norms, masked weights in bfloat16, norms of filters (and channels)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import baselines
import pytest
import torch
from layers import Measure, Network, Ready, Work
from torch import Tensor

from fastprune import ops
from fastprune.ops import reference

# Small, and the same gradient every time: the weights must stay what they are through hundreds of steps.
SETTINGS: dict[str, Any] = {"lr": 1e-5, "momentum": 0.9, "weight_decay": 1e-4}
FORMS: dict[str, dict[str, Any]] = {
    "pytorch for-loop": {"foreach": False},
    "pytorch foreach": {"foreach": True},
    "pytorch fused": {"fused": True},
}
GPU_FORMS: dict[str, dict[str, Any]] = {"torch.compile": {"foreach": True}}
ORIGINAL: dict[str, dict[str, Any]] = {"original": {"foreach": False}}
State = tuple[list[Tensor], list[Tensor], list[Tensor]]  # params, gradients, momenta
Result = tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]  # params, masked weights, norms, channel norms


def start(network: Network) -> State:
    """Params (the convolutions first, then two vectors for the batch norm behind each), gradients and momenta."""
    norms = [torch.ones(len(weight)) for weight in network.weights for _ in range(2)]
    params = [*(weight.clone() for weight in network.weights), *norms]
    generator = torch.Generator().manual_seed(1)
    grads, momenta = ([torch.randn(p.shape, generator=generator) for p in params] for _ in range(2))
    device = network.mask.device
    params, grads, momenta = ([tensor.to(device) for tensor in tensors] for tensors in (params, grads, momenta))
    return params, grads, momenta


def learning_rate(network: Network) -> Tensor:
    """As a tensor on the device: a graph keeps no number."""
    return torch.full((), SETTINGS["lr"], dtype=torch.float64, device=network.mask.device)


def empty_channel_norms(network: Network, channels: bool) -> Tensor | None:
    """Room for the norms of input channels, if they are measured."""
    count = sum(weight.shape[1] for weight in network.weights)
    return torch.empty(count, device=network.mask.device) if channels else None


def fused_call(network: Network, state: State, channels: bool) -> Callable[[], Result]:
    """The op, which does all of it."""
    params, grads, momenta = state
    norms = torch.empty(network.filters, device=network.mask.device)
    channel_norms = empty_channel_norms(network, channels)
    masked = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in network.weights]
    outputs: dict[str, Any] = {"layers": len(masked), "mask": network.mask, "masked": masked, "norms": norms}
    outputs |= {"channel_norms": channel_norms}
    settings = SETTINGS | {"lr": learning_rate(network)}

    def call() -> Result:
        ops.sgd_step_(params, grads, momenta, **settings, **outputs)
        return params, masked, norms, channel_norms

    return call


def split_call(network: Network, rival: str, state: State, channels: bool) -> Callable[[], Result]:
    """torch.optim.SGD, then the masked weights, then the norms."""
    params, grads, momenta = state
    weights = params[: len(network.weights)]
    optimizer = torch.optim.SGD(params, **SETTINGS, **(FORMS | GPU_FORMS | ORIGINAL)[rival])
    for param, grad, momentum in zip(params, grads, momenta):
        param.grad = grad
        optimizer.state[param]["momentum_buffer"] = momentum
    masks = [rows.view(-1, 1, 1, 1) for rows in network.mask.float().split([len(weight) for weight in weights])]
    expanded = [mask.expand_as(weight).contiguous() for mask, weight in zip(masks, weights)]

    def call() -> Result:
        optimizer.step()
        measured = torch.cat([weight.abs().mean((0, 2, 3)) for weight in weights]) if channels else None
        if rival == "original":
            masked = baselines.original_masked(weights, expanded, torch.bfloat16)
            return params, masked, baselines.original_norms(weights), measured
        masked = baselines.pytorch_masked(weights, masks, torch.bfloat16)
        return params, masked, baselines.pytorch_norms(weights), measured

    return baselines.compiled(call) if rival == "torch.compile" else call


@pytest.mark.parametrize("channels", [False, True], ids=["step", "channels"])
@pytest.mark.rivals("fastprune", *FORMS, ops=["sgd_step_"], gpu=list(GPU_FORMS), host=list(ORIGINAL))
def test_sgd_step(measure: Measure, ready: Ready, network: Network, rival: str, channels: bool) -> None:
    state = start(network)
    ours = rival == "fastprune"
    call = ready(fused_call(network, state, channels) if ours else split_call(network, rival, state, channels))
    params, grads, momenta = start(network)
    for tensors, fresh in zip(state, (params, grads, momenta)):  # capturing a graph has taken steps
        torch._foreach_copy_(tensors, fresh)
    masked = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in network.weights]
    norms, layers = torch.empty_like(network.mask, dtype=torch.float32), len(network.weights)
    _, momentum, decay = SETTINGS.values()
    settings = (learning_rate(network), momentum, 0.0, decay, False, False, False, None, None)
    channel_norms = empty_channel_norms(network, channels)
    outputs = (layers, network.mask, masked, None, norms, channel_norms, 1)
    reference.sgd_step_(params, grads, momenta, *settings, *outputs)
    stepped, their_masked, their_norms, their_channel_norms = call()
    for result, want in zip(stepped, params):
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-7)
    for result, want in zip(their_masked, masked):  # a last bit of float32 may decide the rounding to bfloat16
        torch.testing.assert_close(result, want, rtol=2**-7, atol=0)
    torch.testing.assert_close(their_norms.to(norms.device), norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(their_channel_norms, channel_norms, rtol=1e-5, atol=0)
    # Weight, gradient and momentum are read, weight and momentum written; two bytes of each masked weight.
    elements = sum(param.numel() for param in params)
    op = "sgd_step_ with channels" if channels else "sgd_step_"
    measure(op, network, call, Work(20 * elements + 2 * network.elements, 8 * elements))
