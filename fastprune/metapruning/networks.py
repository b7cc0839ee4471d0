"""The networks whose widths can be searched, described."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

from .description import Block, Conv, Description
from .encoding import Width

_CIFAR_DEPTHS = {f"resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}
_CIFAR_PIXELS, _CIFAR_CLASSES = 32, 10
_IMAGENET_PIXELS, _IMAGENET_CLASSES = 224, 1000


def _shortcut(inputs: Width, outputs: Width, stride: int) -> Literal["identity"] | Conv:
    return "identity" if inputs == outputs else Conv(inputs, outputs, 1, stride, activated=False)


def _basic_block(name: str, inputs: Width, middle: Width, outputs: Width, stride: int) -> Block:
    convs = (Conv(inputs, middle, 3, stride), Conv(middle, outputs, 3, activated=False))
    shortcut = _shortcut(inputs, outputs, stride)
    return Block(name, convs, (middle, inputs, outputs), shortcut, activated=True)


def _bottleneck(name: str, inputs: Width, middle: Width, outputs: Width, stride: int) -> Block:
    convs = (
        Conv(inputs, middle, 1),
        Conv(middle, middle, 3, stride),
        Conv(middle, outputs, 1, activated=False),
    )
    shortcut = _shortcut(inputs, outputs, stride)
    return Block(name, convs, (middle, inputs, outputs), shortcut, activated=True)


def _separable(name: str, inputs: Width, outputs: Width, stride: int) -> Block:
    return Block(name, (Conv(inputs, inputs, 3, stride, depthwise=True), Conv(inputs, outputs, 1)), (inputs, outputs))


def _inverted(name: str, inputs: Width, middle: Width, outputs: Width, stride: int) -> Block:
    convs = (
        Conv(inputs, middle, 1),
        Conv(middle, middle, 3, stride, depthwise=True),
        Conv(middle, outputs, 1, activated=False),
    )
    return Block(name, convs, (middle, inputs, outputs), "identity" if inputs == outputs else "none")


def _cifar_resnet(name: str, depth: int) -> Description:
    """He et al. (2015), section 4.2: genes for the stages' outputs (stage 1 has the stem's), then for the middles."""
    blocks = (depth - 2) // 6
    stages = [Width(channels, gene) for gene, channels in enumerate((16, 32, 64))]
    inputs = stages[0]
    described = [Block("", (Conv(Width(3), inputs, 3),), (inputs,))]
    genes = [f"stage{i}" for i in (1, 2, 3)]
    for i, outputs in enumerate(stages, start=1):
        for j in range(blocks):
            middle = Width(outputs.maximum, len(genes))
            genes.append(f"layer{i}.{j}.middle")
            described.append(_basic_block(f"layer{i}.{j}", inputs, middle, outputs, 2 if i > 1 and j == 0 else 1))
            inputs = outputs
    return Description(
        name,
        tuple(genes),
        tuple(described),
        _CIFAR_PIXELS,
        _CIFAR_CLASSES,
        shortcut_name="shortcut",
        counts_activations=True,
    )


def _resnet50(name: str, cifar: bool) -> Description:
    """He et al. (2015), its stride in the 3×3: genes for stem and stages 1 to 3 (stage 4 stays), then the middles."""
    stem = Width(64, 0)
    stages = [Width(256, 1), Width(512, 2), Width(1024, 3), Width(2048)]
    kernel, stride = (3, 1) if cifar else (7, 2)
    described = [Block("", (Conv(Width(3), stem, kernel, stride),), (stem,), pooled=not cifar)]
    genes = ["stem", "stage1", "stage2", "stage3"]
    inputs = stem
    for i, (outputs, count) in enumerate(zip(stages, (3, 4, 6, 3)), start=1):
        for j in range(count):
            middle = Width(outputs.maximum // 4, len(genes))
            genes.append(f"layer{i}.{j}.middle")
            described.append(_bottleneck(f"layer{i}.{j}", inputs, middle, outputs, 2 if i > 1 and j == 0 else 1))
            inputs = outputs
    return Description(
        name,
        tuple(genes),
        tuple(described),
        *_images(cifar),
        counts_activations=True,
        flops=None if cifar else (1950e6, 2050e6),
    )


def _mobilenet_v1(name: str, cifar: bool) -> Description:
    """Howard et al. (2017): genes for the outputs of stem and blocks, but the last. CIFAR: stem of stride 1."""
    channels = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024)
    strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
    inputs = Width(32, 0)
    described = [Block("", (Conv(Width(3), inputs, 3, 1 if cifar else 2),), (inputs,))]
    outputs = [*(Width(maximum, gene) for gene, maximum in enumerate(channels, start=1)), Width(1024)]
    for j, (width, stride) in enumerate(zip(outputs, strides)):
        described.append(_separable(f"blocks.{j}", inputs, width, stride))
        inputs = width
    return Description(
        name,
        ("stem", *(f"blocks.{j}" for j in range(len(channels)))),
        tuple(described),
        *_images(cifar),
        counts_average_pool=True,
        flops=None if cifar else (None, 330e6),
    )


def _mobilenet_v2(name: str, cifar: bool) -> Description:
    """Sandler et al. (2018), 1.4 times as wide: genes for the outputs of the stem and of each stage, then the middles.

    CIFAR: stem and second stage of stride 1. The original system's vector repeats a stage's gene for each of its
    blocks, and has places that nothing reads.
    """
    stages = [Width(channels, gene) for gene, channels in enumerate((44, 22, 33, 44, 88, 132, 224, 448))]
    strides = (1 if cifar else 2, 1, 1 if cifar else 2, 2, 2, 1, 2, 1)
    genes = ["stem", *(f"stage{i}" for i in range(1, len(stages)))]
    inputs = stages[0]
    described = [Block("", (Conv(Width(3), inputs, 3, strides[0]),), (inputs,))]
    for i, (outputs, count) in enumerate(zip(stages[1:], (1, 2, 3, 4, 3, 3, 1)), start=1):
        for j in range(count):
            middle = Width(inputs.maximum * (1 if i == 1 else 6), len(genes))
            block = len(described) - 1
            genes.append(f"blocks.{block}.middle")
            described.append(_inverted(f"blocks.{block}", inputs, middle, outputs, strides[i] if j == 0 else 1))
            inputs = outputs
    described.append(Block("", (Conv(inputs, Width(1280), 1),), (inputs,), first=2))
    return Description(
        name,
        tuple(genes),
        tuple(described),
        *_images(cifar),
        activation="relu6",
        hidden=64,
        counts_average_pool=True,
        flops=None if cifar else (None, 330e6),
    )


def _images(cifar: bool) -> tuple[int, int]:
    return (_CIFAR_PIXELS, _CIFAR_CLASSES) if cifar else (_IMAGENET_PIXELS, _IMAGENET_CLASSES)


_WITH_TWO_STEMS: dict[str, Callable[[str, bool], Description]] = {
    "resnet50": _resnet50,
    "mobilenet_v1": _mobilenet_v1,
    "mobilenet_v2": _mobilenet_v2,
}

NAMES: tuple[str, ...] = (*_CIFAR_DEPTHS, *_WITH_TWO_STEMS, *(f"{name}_cifar" for name in _WITH_TWO_STEMS))


@cache
def describe(name: str) -> Description:
    """The description of a network.

    Args:
        name: one of ``NAMES``. ``resnet20`` to ``resnet110`` are for CIFAR; the others for images of 224 pixels, and
            with ``_cifar`` behind their name for those of 32.

    Raises:
        ValueError: for any other name.
    """
    if name in _CIFAR_DEPTHS:
        return _cifar_resnet(name, _CIFAR_DEPTHS[name])
    make = _WITH_TWO_STEMS.get(name.removesuffix("_cifar"))
    if make is None:
        raise ValueError(f"there are no encodings of {name!r}: choose one of {', '.join(NAMES)}")
    return make(name, name.endswith("_cifar"))
