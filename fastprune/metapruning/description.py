"""What a network whose widths are chosen consists of: plain data that costs, networks and PruningNets are made from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .encoding import Width


@dataclass(frozen=True)
class Conv:
    """A convolution without bias, and the batch norm behind it. Its padding is ``kernel // 2``.

    Attributes:
        inputs, outputs: channels.
        kernel, stride: of both sides.
        depthwise: each channel has a kernel of its own; ``inputs`` are ``outputs``.
        activated: whether the activation follows.
    """

    inputs: Width
    outputs: Width
    kernel: int
    stride: int = 1
    depthwise: bool = False
    activated: bool = True

    def side(self, side: int) -> int:
        """Height or width of the output."""
        return (side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Block:
    """Convolutions in a row, and what is added to them.

    Attributes:
        name: that of its module; the convolutions are ``conv1``, ``conv2``, … in it. Empty for the network itself.
        convs: one after the other.
        scales: the widths whose scales a PruningNet generates the weights of the block from.
        shortcut: what is added behind the last convolution: nothing, the input, or a projection of it.
        activated: whether the activation follows that sum.
        pooled: whether a 3×3 max-pool of stride 2 follows.
        first: the number of the first convolution in its name.
    """

    name: str
    convs: tuple[Conv, ...]
    scales: tuple[Width, ...]
    shortcut: Literal["none", "identity"] | Conv = "none"
    activated: bool = False
    pooled: bool = False
    first: int = 1


@dataclass(frozen=True)
class Layer:
    """A convolution of a network, by the name of its module, with the sides of its input and output in pixels."""

    name: str
    conv: Conv
    block: Block
    input_side: int
    output_side: int


@dataclass(frozen=True)
class Description:
    """A network.

    Attributes:
        name: as ``describe`` takes it.
        genes: the names of the genes, in order.
        blocks: from the image to the last features, one after the other.
        resolution: side of the images in pixels, where none is given.
        num_classes: logits, where no number is given.
        activation: of the whole network.
        shortcut_name: of the projections' modules.
        hidden: units of the fully connected layer from scales to generated weights.
        counts_activations, counts_average_pool: whether the original system's FLOPs count these. Its counter saw
            modules, and the calls of functions in some of its networks escaped it.
        flops: the budget of the original search for this network, lowest and highest.
    """

    name: str
    genes: tuple[str, ...]
    blocks: tuple[Block, ...]
    resolution: int
    num_classes: int
    activation: Literal["relu", "relu6"] = "relu"
    shortcut_name: str = "downsample"
    hidden: int = 32
    counts_activations: bool = False
    counts_average_pool: bool = False
    flops: tuple[float | None, float] | None = None

    @property
    def features(self) -> Width:
        """What the classifier reads."""
        return self.blocks[-1].convs[-1].outputs

    def layers(self, resolution: int | None = None) -> Iterator[Layer]:
        """Every convolution, a block's projection behind its others.

        Raises:
            ValueError: for images of no pixel.
        """
        side = self.resolution if resolution is None else resolution
        if side < 1:
            raise ValueError(f"the resolution must be at least 1 pixel, got {side}")
        for block in self.blocks:
            prefix = f"{block.name}." if block.name else ""
            before = side
            for number, conv in enumerate(block.convs, start=block.first):
                after = conv.side(side)
                yield Layer(f"{prefix}conv{number}", conv, block, side, after)
                side = after
            if isinstance(block.shortcut, Conv):
                yield Layer(f"{prefix}{self.shortcut_name}.0", block.shortcut, block, before, side)
            side = pooled_side(side) if block.pooled else side

    def final_side(self, resolution: int | None = None) -> int:
        """Side of the features before the average pool."""
        return list(self.layers(resolution))[-1].output_side


def pooled_side(side: int) -> int:
    """Side of what a 3×3 max-pool of stride 2 and padding 1 makes of ``side``."""
    return (side - 1) // 2 + 1
