"""What all ops share: registration, compilation, autocast, determinism."""

from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
from cases import Implementation
from torch import Tensor, nn

from fastprune import ops

fastprune = torch.ops.fastprune
SHAPES = [(5, 3, 3, 3), (4, 7), (6, 2, 1, 1)]
N = cases.count_filters(SHAPES)
M = sum(shape[1] for shape in SHAPES)
KINDS = ("covariance", "kernel-covariance", "correlation", "orthogonality")


def weights(dtype: torch.dtype = torch.float32, grad: bool = False, seed: int = 0) -> list[Tensor]:
    made = cases.random_weights(SHAPES, dtype, "channels-last", seed=seed)
    return [weight.requires_grad_(grad) for weight in made]


def coefficients(kind: str, mask: Tensor | None) -> Tensor:
    return fastprune.decorrelation(weights(), kind, True, mask, "highest")[1]


def hyper_layer(grad: bool) -> list[Tensor]:
    """Hidden activations of 5, and the weight and bias of a layer that generates [4, 3, 3, 3]."""
    return [tensor.requires_grad_(grad) for tensor in cases.random_weights([(5,), (108, 5), (108,)])]


# name: (op, its arguments); what is differentiable gets weights that require a gradient.
OPCHECKS: dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]] = {
    "filter_norms": lambda: (fastprune.filter_norms, (weights(), 2)),
    "kth_threshold": lambda: (fastprune.kth_threshold, (torch.randn(9), 4)),
    "filter_mask": lambda: (fastprune.filter_mask, (weights(torch.bfloat16), 0.5, 1)),
    "update_filter_masks_": lambda: (
        fastprune.update_filter_masks_,
        (weights(), 0.5, 1, torch.zeros(N, dtype=torch.bool)),
    ),
    "weight_mask": lambda: (fastprune.weight_mask, (weights(), 0.5, "taylor", weights(seed=1))),
    "masked_weights": lambda: (
        fastprune.masked_weights,
        (weights(grad=True), cases.random_mask(SHAPES), torch.bfloat16, torch.rand(N)),
    ),
    "masked_weights_backward": lambda: (
        fastprune.masked_weights_backward,
        (weights(torch.bfloat16), cases.random_mask(SHAPES), torch.float32, None),
    ),
    "hyper_weight": lambda: (
        fastprune.hyper_weight,
        (*hyper_layer(grad=True), 3, 2, [4, 3, 3, 3], torch.bfloat16, True),
    ),
    "hyper_weight_backward": lambda: (
        fastprune.hyper_weight_backward,
        (torch.randn(3, 2, 3, 3, requires_grad=True), *hyper_layer(grad=True)[:2], [4, 3, 3, 3]),
    ),
    "sgd_step_": lambda: (
        fastprune.sgd_step_,
        (
            *([*weights(grad=True), torch.randn(6, requires_grad=True)], [*weights(seed=1), torch.randn(6)]),
            *([*weights(seed=2), torch.randn(6)], torch.tensor(0.1), 0.9, 0.0, 1e-4, True, False, False),
            *(torch.tensor(2.0), torch.tensor(0.0), 3, cases.random_mask(SHAPES)),
            *(weights(torch.bfloat16), torch.rand(N), torch.zeros(N), torch.zeros(M), 1),
        ),
    ),
    **{
        f"decorrelation-{kind}": lambda kind=kind: (  # type: ignore[misc]
            fastprune.decorrelation,
            (weights(grad=True), kind, True, cases.random_mask(SHAPES), "highest"),
        )
        for kind in KINDS
    },
    **{
        f"decorrelation_backward-{kind}": lambda kind=kind: (  # type: ignore[misc]
            fastprune.decorrelation_backward,
            (torch.tensor(2.0), weights(), coefficients(kind, None), kind, True, None, "highest"),
        )
        for kind in KINDS
    },
}


def test_every_op_is_checked() -> None:
    assert {name.split("-")[0] for name in OPCHECKS} == {entry.op for entry in ops.backends()}


@pytest.mark.parametrize("name", OPCHECKS)
def test_opcheck(registered: Implementation, name: str) -> None:
    op, arguments = OPCHECKS[name]()
    torch.library.opcheck(op, arguments)


def step(weights: list[Tensor], mask: Tensor) -> tuple[Tensor, ...]:
    """Every op in one function, as a training step calls them."""
    ops.update_filter_masks_(weights, 0.5, mask)
    masked = ops.masked_weights(weights, mask.clone(), torch.bfloat16, torch.full((N,), 0.25))
    penalty = sum((ops.decorrelation(weights, kind, False, mask) for kind in KINDS), torch.zeros(()))
    single = ops.weight_mask(weights, 0.9)
    threshold = ops.kth_threshold(ops.filter_norms(weights), 3)
    fit = torch.stack([(m.float() * s).square().sum() for m, s in zip(masked, single)]).sum()
    return fit + penalty, threshold, ops.filter_mask(weights, 0.5)


def run_step(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
    leaves, mask = weights(grad=True), torch.zeros(N, dtype=torch.bool)
    results = function(leaves, mask)
    results[0].backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == len(leaves)
    return [*(result.detach() for result in results), mask, *gradients]


def check_compiled(compiler: str) -> None:
    torch.compiler.reset()
    eager = run_step(step)
    compiled = run_step(torch.compile(step, fullgraph=True, backend=compiler))
    for result, expected in zip(compiled, eager, strict=True):
        assert result.dtype == expected.dtype
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_compiles_without_a_break(registered: Implementation) -> None:
    check_compiled("aot_eager")


@pytest.mark.slow
def test_compiles_with_inductor(registered: Implementation) -> None:
    check_compiled("inductor")


def test_a_compiled_function_follows_the_backend() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda w: ops.filter_mask(w, 0.5), fullgraph=True, backend="aot_eager")
    given = weights()
    compiled(given)
    with (
        cases.active(cases.REFERENCE),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        compiled(given)
    assert "aten::sort" in {event.name for event in profile.events()}


def test_autocast(registered: Implementation) -> None:
    # As in a layer: dense float32 weights, masked ones in autocast's dtype, gradients back in float32.
    conv = nn.Conv2d(3, 8, 3)
    images, expected_mask = torch.randn(2, 3, 9, 9), ops.filter_mask([conv.weight], 0.4)
    expected_penalty = ops.decorrelation([conv.weight])
    with torch.autocast("cpu", torch.bfloat16):
        mask = ops.filter_mask([conv.weight], 0.4)
        (masked,) = ops.masked_weights([conv.weight], mask, torch.get_autocast_dtype("cpu"))
        output = nn.functional.conv2d(images, masked)
        penalty = ops.decorrelation([conv.weight], mask=None)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(penalty, expected_penalty)
    assert masked.dtype == output.dtype == torch.bfloat16
    (output.float().square().mean() + penalty).backward()
    gradient = conv.weight.grad
    assert gradient is not None
    assert gradient.dtype == torch.float32
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


def everything(weights: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """The results of all ops, gradients included."""
    mask = ops.filter_mask(weights, 0.6)
    results = [mask, ops.filter_norms(weights, 2), *ops.weight_mask(weights, 0.6, "taylor", grads)]
    leaves = [weight.detach().requires_grad_() for weight in weights]
    masked = ops.masked_weights(leaves, mask, torch.bfloat16, torch.linspace(0, 1, len(mask)))
    results += torch.autograd.grad(masked, leaves, [grad.bfloat16() for grad in grads])
    for kind in KINDS:
        penalty = ops.decorrelation(leaves, kind)
        results += [penalty.detach(), *torch.autograd.grad(penalty, leaves)]
    return [*results, *(result.detach() for result in masked)]


def same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8))


def test_same_bits_in_every_run_and_for_every_number_of_threads(implementation: Implementation) -> None:
    shapes = [*cases.RESNET56[::9], (300, 150), (64, 64, 3, 3)]  # large enough to be split among threads
    if implementation not in cases.FAST:
        shapes = [*cases.RESNET56[::18], (70, 150)]
    made, grads = cases.random_weights(shapes), cases.random_weights(shapes, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        runs = [everything(made, grads), everything(made, grads)]
        torch.set_num_threads(1)
        if implementation in cases.COMPILED:  # the reference's sums are PyTorch's, which promise less
            runs.append(everything(made, grads))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(map(same_bits, runs[0], run))
