"""What the ops are timed on: the real layer lists, and the work that a call is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastprune import models

SEED = 777
PRUNE_RATE = 0.6


@dataclass(frozen=True)
class Work:
    """What a call must do at least: bytes moved to and from memory, floating-point operations."""

    bytes: int
    flops: int = 0


Measure = Callable[..., None]  # (op, network, call, work, seconds); the fixture of that name
Ready = Callable[[Callable[[], Any]], Callable[[], Any]]  # the fixture of that name


@dataclass(frozen=True)
class Network:
    """A network's convolution weights in model order, as it initialises them."""

    name: str
    weights: list[Tensor]  # each [F, C, kh, kw], float32
    mask: Tensor  # [N] bool, True for the filters that PRUNE_RATE keeps

    @property
    def filters(self) -> int:
        """N."""
        return sum(len(weight) for weight in self.weights)

    @property
    def elements(self) -> int:
        """P, all single weights."""
        return sum(weight.numel() for weight in self.weights)

    def to(self, device: torch.device) -> Network:
        """The same on a device."""
        if device.type == "cpu":
            return self
        return Network(self.name, [weight.to(device) for weight in self.weights], self.mask.to(device))

    def gram_macs(self) -> int:
        """Multiply-adds of all layers' full Gram matrices, Σ F²·K."""
        return sum(len(weight) * weight.numel() for weight in self.weights)


# name: (stem, convolutions, filters)
_NETWORKS = {"resnet56": ("cifar", 57, 2_128), "resnet50": ("imagenet", 53, 26_560)}
NAMES = tuple(_NETWORKS)


@functools.cache
def network(name: str) -> Network:
    """Build it from the seed: `resnet56` of CIFAR, `resnet50` of torchvision."""
    stem, convolutions, filters = _NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = models.create(name, 10 if stem == "cifar" else 1000, "cifar" if stem == "cifar" else "imagenet")
    weights = [module.weight.detach() for module in model.modules() if isinstance(module, nn.Conv2d)]
    scores = torch.cat([weight.abs().mean((1, 2, 3)) for weight in weights])
    mask = scores > scores.sort().values[int(len(scores) * PRUNE_RATE)]
    built = Network(name, weights, mask)
    assert (len(weights), built.filters) == (convolutions, filters), (len(weights), built.filters)
    return built
