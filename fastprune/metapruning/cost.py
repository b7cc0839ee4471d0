"""What encodings cost, by arithmetic: no network is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .description import Description, Layer, pooled_side
from .encoding import check_encoding, check_population
from .networks import describe

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Cost:
    """What one forward pass of one image costs.

    Attributes:
        flops: as the original system counts them: the multiply-accumulates, one for each bias of the classifier and
            each element that enters a batch norm, ``k·k`` for each element that leaves a pooling of ``k × k``. In the
            ResNets also one for each element that enters an activation, but none for the average pool.
        macs: multiply-accumulates of convolutions and the classifier alone.
        parameters: weights and biases of the plain network, batch norms with theirs.
    """

    flops: int
    macs: int
    parameters: int


@dataclass(frozen=True)
class Costs:
    """The same of ``P`` encodings: int64 ``[P]`` each."""

    flops: Counts
    macs: Counts
    parameters: Counts


def cost(
    network: str | Description, encoding: Sequence[int], resolution: int | None = None, num_classes: int | None = None
) -> Cost:
    """What the network of an encoding costs.

    Args:
        network: a name, see :func:`fastprune.metapruning.describe`, or a description.
        encoding: the choice of every gene, 0 to 30.
        resolution: side of the images in pixels; 224 or 32 by default, as the network is made for.
        num_classes: 1000 or 10 by default.

    Raises:
        ValueError: for an unknown network, another number of genes, genes out of range, or no pixel or class.
    """
    description = describe(network) if isinstance(network, str) else network
    checked = check_encoding(encoding, len(description.genes), description.name)
    all_of_it = costs(description, np.array([checked]), resolution, num_classes)
    return Cost(int(all_of_it.flops[0]), int(all_of_it.macs[0]), int(all_of_it.parameters[0]))


def costs(
    network: str | Description, population: ArrayLike, resolution: int | None = None, num_classes: int | None = None
) -> Costs:
    """What the networks of a whole population ``[P, genes]`` cost; otherwise as :func:`cost`."""
    description = describe(network) if isinstance(network, str) else network
    rows = check_population(population, len(description.genes), description.name)
    classes = description.num_classes if num_classes is None else num_classes
    if classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {classes}")
    macs, extra, parameters = (np.zeros(len(rows), dtype=np.int64) for _ in range(3))
    side = 0
    for layer in description.layers(resolution):
        _add_convolution(layer, rows, description.counts_activations, macs, extra, parameters)
        side = layer.output_side
    features = description.features.channels_of_all(rows)
    macs += features * classes
    extra += classes
    parameters += features * classes + classes
    if description.counts_average_pool:
        extra += features * side**2
    return Costs(macs + extra, macs, parameters)


def _add_convolution(
    layer: Layer, rows: Counts, activations: bool, macs: Counts, extra: Counts, parameters: Counts
) -> None:
    """Add a convolution, its batch norm, its activation and, behind the last of a block, what follows."""
    conv, block = layer.conv, layer.block
    outputs = conv.outputs.channels_of_all(rows)
    weights = outputs * conv.kernel**2
    if not conv.depthwise:
        weights = weights * conv.inputs.channels_of_all(rows)
    elements = outputs * layer.output_side**2
    macs += weights * layer.output_side**2
    parameters += weights + 2 * outputs
    extra += elements
    last = conv is block.convs[-1]
    if activations and (conv.activated or (last and block.activated)):
        extra += elements
    if last and block.pooled:
        extra += outputs * 9 * pooled_side(layer.output_side) ** 2
