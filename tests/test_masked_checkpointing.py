"""Activation checkpointing of a model that is being pruned, as libraries switch it on: the gradients without it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.utils import checkpoint

from fastprune import FilterPruner, WeightPruner
from fastprune.nn import MaskedConv2d
from fastprune.optim import PrunedSGD

STEPS, EVERY = 4, 2
Forward = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(x)).relu())


class Network(nn.Module):
    """Its layers run in the way that is set; in order, if none is."""

    run: Callable[[nn.Sequential, Tensor], Tensor] | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), Block(), Block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) if self.run is None else self.run(self.layers, x)


def make_timm() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=5)


def make_transformers() -> nn.Module:
    config = transformers.MobileViTConfig(
        image_size=64,
        hidden_sizes=[16, 16, 16],
        neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32],
        num_attention_heads=2,
        num_labels=3,
        hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
    )
    return transformers.MobileViTForImageClassification(config)


def enable(use_reentrant: bool) -> Callable[[Any], None]:
    return lambda model: model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def wrap(implementation: wrappers.CheckpointImpl) -> Callable[[nn.Module], None]:
    """As FSDP's users and Lightning's strategies do."""
    return lambda model: wrappers.apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=functools.partial(wrappers.checkpoint_wrapper, checkpoint_impl=implementation),
        check_fn=lambda module: isinstance(module, Block),
    )


def offload(model: Any) -> None:
    model.layers[1] = wrappers.offload_wrapper(model.layers[1])


def run_as(run: Callable[[nn.Sequential, Tensor], Tensor]) -> Callable[[Any], None]:
    return lambda model: setattr(model, "run", run)


def in_segments(layers: nn.Sequential, x: Tensor, use_reentrant: bool) -> Tensor:
    return checkpoint.checkpoint_sequential(layers, 3, x.requires_grad_(), use_reentrant=use_reentrant)


def selectively(layers: nn.Sequential, x: Tensor, saved: tuple[Any, ...]) -> Tensor:
    """Results of these ops are saved, all others computed again."""

    def policy(_: object, op: object, *arguments: Any, **named: Any) -> checkpoint.CheckpointPolicy:
        policies = checkpoint.CheckpointPolicy
        return policies.MUST_SAVE if op in saved else policies.PREFER_RECOMPUTE

    contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, policy)
    return checkpoint.checkpoint(layers, x, use_reentrant=False, context_fn=contexts)


CONVOLUTION, MASKING = torch.ops.aten.convolution.default, torch.ops.fastprune.masked_weights.default
# name: (what makes the model, what switches checkpointing on)
FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], None]]] = {
    "timm": (make_timm, lambda model: model.set_grad_checkpointing(True)),
    "transformers": (make_transformers, enable(use_reentrant=False)),
    "transformers, reentrant": (make_transformers, enable(use_reentrant=True)),
    "wrapped": (Network, wrap(wrappers.CheckpointImpl.NO_REENTRANT)),
    "wrapped, reentrant": (Network, wrap(wrappers.CheckpointImpl.REENTRANT)),
    "offloaded": (Network, offload),
    "segments": (Network, run_as(functools.partial(in_segments, use_reentrant=False))),
    "segments, reentrant": (Network, run_as(functools.partial(in_segments, use_reentrant=True))),
    "convolutions saved": (Network, run_as(functools.partial(selectively, saved=(CONVOLUTION,)))),
    "masked weights saved": (Network, run_as(functools.partial(selectively, saved=(MASKING,)))),
}


def train(model: nn.Module, pruner: FilterPruner | WeightPruner, dtype: torch.dtype | None, amp: bool) -> list[Tensor]:
    """The gradients of all steps. The masked weights change with each, and the masks with some."""
    if isinstance(pruner, FilterPruner):
        optimizer: Any = PrunedSGD(model.parameters(), lr=0.01, momentum=0.9, pruner=pruner, masked_dtype=dtype)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, gradients = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            output = model(torch.randn(2, 3, 64, 64, generator=images))
        getattr(output, "logits", output).float().square().sum().backward()
        gradients += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        optimizer.step()
        pruner.step()
    return gradients


def filters(model: nn.Module) -> FilterPruner:
    return FilterPruner(model, 0.5, every=EVERY)


def single_weights(model: nn.Module) -> WeightPruner:
    return WeightPruner(model, 0.5, every=EVERY)


@pytest.mark.parametrize(
    ("prune", "dtype", "amp"),
    [
        (filters, None, False),
        (filters, torch.float32, False),
        (filters, torch.bfloat16, True),
        (single_weights, None, False),
    ],
    ids=["filters", "filters-kept", "filters-kept-amp", "weights"],
)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_without(form: str, prune: Callable[[nn.Module], Any], dtype: Any, amp: bool) -> None:
    make, switch_on = FORMS[form]
    torch.manual_seed(0)
    model = make().train()
    checkpointed = copy.deepcopy(model)
    switch_on(checkpointed)
    expected = train(model, prune(model), dtype, amp)
    forwards: list[MaskedConv2d] = []
    pruner = prune(checkpointed)
    for layer in pruner.layers.values():
        layer.register_forward_pre_hook(lambda module, _: forwards.append(module))
    gradients = train(checkpointed, pruner, dtype, amp)
    if form != "offloaded":  # which computes nothing again
        assert len(forwards) > STEPS * len(pruner.layers)
    assert len(gradients) == len(expected) > 0
    for gradient, other in zip(gradients, expected):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)
