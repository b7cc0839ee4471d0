"""decorrelation: every kind, the penalty of all layers and its gradient, float32."""

import functools

import baselines
import pytest
import torch
from layers import Measure, Network, Work, network
from torch import Tensor

from fastprune import ops
from fastprune.ops import reference

PYTORCH = {
    "covariance": baselines.pytorch_covariance,
    "kernel-covariance": baselines.pytorch_kernel_covariance,
    "correlation": baselines.pytorch_correlation,
    "orthogonality": baselines.pytorch_orthogonality,
}


@functools.cache
def expected(name: str, kind: str) -> tuple[Tensor, list[Tensor]]:
    """The reference's, in float64."""
    weights = network(name).weights
    penalty, coefficients = reference.decorrelation(weights, kind, True, None)
    gradients = reference.decorrelation_backward(torch.ones(()), weights, coefficients, kind, True, None)
    return penalty, gradients


def work_of(network: Network, kind: str) -> Work:
    """Half the Gram matrices forward, all of them backward; weights are read twice, gradients written once."""
    if kind in ("covariance", "correlation"):
        flops = (2 + 4) * network.gram_macs() // 2
    elif kind == "orthogonality":  # four products W x or Wᵀ y forward, eight backward
        flops = 2 * 12 * network.elements
    else:  # Σ kh/2 multiply-adds per element forward, kh backward
        flops = sum(3 * weight.numel() * weight.shape[2] for weight in network.weights if weight.shape[3] > 1)
    return Work(12 * network.elements, flops)


@pytest.mark.parametrize("rival", ["fastprune", "pytorch"])
@pytest.mark.parametrize("kind", PYTORCH)
def test_decorrelation(measure: Measure, network: Network, kind: str, rival: str) -> None:
    weights = [weight.clone().requires_grad_() for weight in network.weights]

    def call() -> tuple[Tensor, tuple[Tensor, ...]]:
        penalty = ops.decorrelation(weights, kind) if rival == "fastprune" else PYTORCH[kind](weights)
        return penalty.detach(), torch.autograd.grad(penalty, weights, materialize_grads=True)

    penalty, gradients = call()
    want, want_gradients = expected(network.name, kind)
    torch.testing.assert_close(penalty, want, rtol=1e-4, atol=0)
    for gradient, want_gradient in zip(gradients, want_gradients):
        # Of the 2 million pairs of a layer's filters, a few have a covariance that is 0 up to rounding. Its sign is
        # anybody's, and each that differs moves the gradient by about a 500th of its norm.
        assert (gradient - want_gradient).norm() <= 0.02 * want_gradient.norm() + 1e-12
    measure(f"{kind} fwd+bwd", network, rival, call, work_of(network, kind), seconds=2)


def test_decorrelation_original(measure: Measure, network: Network) -> None:
    """Beside covariance, but the value only: the original has no gradient."""
    penalty = baselines.original_covariance(network.weights)
    torch.testing.assert_close(penalty, expected(network.name, "covariance")[0], rtol=1e-4, atol=0)
    work = Work(4 * network.elements, 2 * network.gram_macs())
    call = functools.partial(baselines.original_covariance, network.weights)
    measure("covariance fwd+bwd", network, "original (fwd only)", call, work, seconds=2)
