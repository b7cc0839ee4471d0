"""The networks that are pruned: `create(name)` builds one, `NAMES` lists them."""

from __future__ import annotations

from typing import Literal

from torch import nn

from .resnet import cifar_resnet, torchvision_resnet

__all__ = ["NAMES", "Stem", "create"]

Stem = Literal["cifar", "imagenet"]

_CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")

NAMES: tuple[str, ...] = (*_CIFAR_DEPTHS, *_TORCHVISION)


def create(name: str, num_classes: int = 10, stem: Stem = "cifar") -> nn.Module:
    """Return a freshly initialised network, in training mode, float32, on the default device.

    It maps images `[B, 3, H, W]` to logits `[B, num_classes]`, for any `H, W`. Equal seeds of torch's global
    generator give equal weights.

    Args:
        name: one of `NAMES`. resnet20 to resnet110 are the CIFAR networks of He et al. (2015), section 4.2;
            the others are torchvision's.
        num_classes: number of logits, at least 1.
        stem: how the image enters: "cifar" is a 3×3 convolution with stride 1 and no pooling, "imagenet"
            the 7×7 convolution with stride 2 and the max-pool behind it.

    Raises:
        ValueError: for an unknown name or stem, no class, or the ImageNet stem with a CIFAR network.
    """
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(NAMES)}")
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"unknown stem {stem!r}: choose 'cifar' or 'imagenet'")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    if name in _TORCHVISION:
        return torchvision_resnet(name, num_classes, cifar_stem=stem == "cifar")
    if stem == "imagenet":
        raise ValueError(
            f"{name} is a network for small images and has no ImageNet stem: "
            f"use stem='cifar', or for large images one of {', '.join(_TORCHVISION)}"
        )
    return cifar_resnet(_CIFAR_DEPTHS[name], num_classes)
