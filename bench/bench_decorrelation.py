"""decorrelation: every kind, the penalty of all layers and its gradient, float32."""

import functools
from collections.abc import Callable

import baselines
import pytest
import torch
from layers import Measure, Network, Ready, Work, network
from peaks import float32_products
from torch import Tensor

from fastprune import ops
from fastprune.ops import reference

PYTORCH = {
    "covariance": baselines.pytorch_covariance,
    "kernel-covariance": baselines.pytorch_kernel_covariance,
    "correlation": baselines.pytorch_correlation,
    "orthogonality": baselines.pytorch_orthogonality,
}
PYTORCH_COV = {"covariance": baselines.pytorch_cov, "correlation": baselines.pytorch_corrcoef}
OPS = ["decorrelation", "decorrelation_backward"]
Penalty = Callable[[list[Tensor]], Tensor]


@functools.cache
def expected(name: str, kind: str) -> tuple[Tensor, list[Tensor]]:
    """The reference's, in float64."""
    weights = network(name).weights
    penalty, coefficients = reference.decorrelation(weights, kind, True, None, "highest")
    gradients = reference.decorrelation_backward(torch.ones(()), weights, coefficients, kind, True, None, "highest")
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


# How near penalty and gradient must come. Of the 2 million pairs of a layer's filters, a few have a covariance that is
# 0 up to rounding. Its sign is anybody's, and each that differs moves the gradient by about a 500th of its norm; the
# coarser the rounding, the more of them.
TOLERANCES = {"highest": (1e-4, 0.02), "high": (1e-3, 0.06), "medium": (8e-3, 0.2)}


def check(
    measure: Measure, ready: Ready, network: Network, kind: str, function: Penalty, precision: str = "highest"
) -> None:
    """Compare one rival with the reference, then time it."""
    weights = [weight.clone().requires_grad_() for weight in network.weights]

    def eager() -> tuple[Tensor, tuple[Tensor, ...]]:
        penalty = function(weights)
        return penalty.detach(), torch.autograd.grad(penalty, weights, materialize_grads=True)

    with float32_products(precision):
        call = ready(eager)
        penalty, gradients = call()
        want, want_gradients = expected(network.name, kind)
        of_penalty, of_gradient = TOLERANCES[precision]
        torch.testing.assert_close(penalty.cpu(), want, rtol=of_penalty, atol=0)
        for gradient, want_gradient in zip(gradients, want_gradients):
            assert (gradient.cpu() - want_gradient).norm() <= of_gradient * want_gradient.norm() + 1e-12
        op = kind if precision == "highest" else f"{kind} {precision}"
        measure(f"{op} fwd+bwd", network, call, work_of(network, kind), seconds=2)


def function_of(rival: str, kind: str, precision: str = "highest") -> Penalty:
    """The penalty as a function of the weights."""
    if rival == "fastprune":
        return lambda weights: ops.decorrelation(weights, kind, precision=precision)
    return baselines.compiled(PYTORCH[kind]) if rival == "torch.compile" else PYTORCH[kind]


@pytest.mark.rivals("fastprune", "pytorch", ops=OPS, gpu=["torch.compile"])
@pytest.mark.parametrize("kind", PYTORCH)
def test_decorrelation(measure: Measure, ready: Ready, network: Network, kind: str, rival: str) -> None:
    check(measure, ready, network, kind, function_of(rival, kind))


@pytest.mark.rivals(gpu=["pytorch cov"])
@pytest.mark.parametrize("kind", PYTORCH_COV)
def test_decorrelation_cov(measure: Measure, ready: Ready, network: Network, kind: str) -> None:
    """Beside the same kinds: PyTorch's own covariance and correlation."""
    check(measure, ready, network, kind, PYTORCH_COV[kind])


@pytest.mark.rivals(gpu=["fastprune", "pytorch", "torch.compile"], ops=OPS)
@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("kind", PYTORCH_COV)
def test_decorrelation_coarse(
    measure: Measure, ready: Ready, network: Network, kind: str, precision: str, rival: str
) -> None:
    """The kinds with products of matrices, these in TF32 or in bfloat16."""
    check(measure, ready, network, kind, function_of(rival, kind, precision), precision)


@pytest.mark.rivals(host=["original (fwd only)"])
def test_decorrelation_original(measure: Measure, network: Network) -> None:
    """Beside covariance, but the value only: the original has no gradient."""
    penalty = baselines.original_covariance(network.weights)
    torch.testing.assert_close(penalty, expected(network.name, "covariance")[0], rtol=1e-4, atol=0)
    work = Work(4 * network.elements, 2 * network.gram_macs())
    call = functools.partial(baselines.original_covariance, network.weights)
    measure("covariance fwd+bwd", network, call, work, seconds=2)
