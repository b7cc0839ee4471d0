"""The networks that are pruned: `create(name)` builds one, `NAMES` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from ..metapruning import encoding as encodings
from ..metapruning.network import PlainNetwork
from .resnet import cifar_resnet, torchvision_resnet

__all__ = ["NAMES", "Stem", "create", "described", "exists"]

Stem = Literal["cifar", "imagenet"]

_CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
_TORCHVISION = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_MOBILENETS = ("mobilenet_v1", "mobilenet_v2")
_WITH_ENCODINGS = (*_CIFAR_DEPTHS, "resnet50", *_MOBILENETS)


NAMES: tuple[str, ...] = (*_CIFAR_DEPTHS, *_TORCHVISION, *_MOBILENETS)


def exists(name: str) -> bool:
    """Whether :func:`create` knows it: one of ``NAMES``, or a name with an encoding behind an @."""
    try:
        return (_split(name)[0] if "@" in name else name) in NAMES
    except ValueError:
        return False


def create(name: str, num_classes: int = 10, stem: Stem = "cifar", encoding: Sequence[int] | None = None) -> nn.Module:
    """Return a freshly initialised network, in training mode, float32, on the default device.

    It maps images `[B, 3, H, W]` to logits `[B, num_classes]`, for any `H, W`. Equal seeds of torch's global
    generator give equal weights.

    Args:
        name: one of `NAMES`. resnet20 to resnet110 are the CIFAR networks of He et al. (2015), section 4.2; the other
            ResNets are torchvision's; the MobileNets those of MetaPruning, V2 1.4 times as wide. An encoding may
            stand behind the name: `resnet20@12-30-…`.
        num_classes: number of logits, at least 1.
        stem: how the image enters: "cifar" is a 3×3 convolution with stride 1 and no pooling, "imagenet"
            the 7×7 convolution with stride 2 and the max-pool behind it. In the MobileNets it is the strides: with
            "cifar" the first is 1 instead of 2, in V2 also that of the second stage.
        encoding: the choice of every gene of the network's widths, 0 to 30; see `fastprune.metapruning`. The widest
            network without it.

    Raises:
        ValueError: for an unknown name or stem, no class, the ImageNet stem with a CIFAR network, or an encoding of
            another network.
    """
    if stem not in ("cifar", "imagenet"):
        raise ValueError(f"unknown stem {stem!r}: choose 'cifar' or 'imagenet'")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, not {num_classes}")
    if "@" in name:
        if encoding is not None:
            raise ValueError(f"{name} has an encoding, and another one was given")
        name, encoding = _split(name)
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(NAMES)}")
    if name in _CIFAR_DEPTHS and stem == "imagenet":
        raise ValueError(
            f"{name} is a network for small images and has no ImageNet stem: "
            f"use stem='cifar', or for large images one of {', '.join((*_TORCHVISION, *_MOBILENETS))}"
        )
    if encoding is not None or name in _MOBILENETS:
        return PlainNetwork(described(name, stem), encoding, num_classes)
    if name in _TORCHVISION:
        return torchvision_resnet(name, num_classes, cifar_stem=stem == "cifar")
    return cifar_resnet(_CIFAR_DEPTHS[name], num_classes)


def described(name: str, stem: Stem) -> str:
    """The name by which `fastprune.metapruning.describe` knows a network.

    Raises:
        ValueError: for one whose widths have no encoding.
    """
    if name not in _WITH_ENCODINGS:
        raise ValueError(f"there are no encodings of {name!r}: choose one of {', '.join(_WITH_ENCODINGS)}")
    return name if name in _CIFAR_DEPTHS or stem == "imagenet" else f"{name}_cifar"


def _split(name: str) -> tuple[str, encodings.Encoding]:
    """Name and encoding of `name@encoding`."""
    base, _, text = name.partition("@")
    if base not in _WITH_ENCODINGS:
        raise ValueError(f"there are no encodings of {base!r}: choose one of {', '.join(_WITH_ENCODINGS)}")
    return base, encodings.from_text(text)
