"""Between encodings and filter pruning: kept filters as an encoding, and an encoding as rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .. import models, recipes, report
from .description import Description
from .encoding import Encoding, check_encoding, nearest_choice
from .networks import describe


def encoding_of_kept(network: str | Description, kept: Mapping[str, int]) -> Encoding:
    """The encoding nearest to what a :class:`fastprune.FilterPruner` keeps.

    A gene is the choice nearest to the share of filters that is kept. Where several convolutions make the same channels
    (a stage's residual stream), the one that keeps most counts. Depthwise convolutions do not count.

    Args:
        network: a name, see :func:`fastprune.metapruning.describe`, or a description.
        kept: of each convolution by name, as ``pruner.kept()`` gives it.

    Raises:
        ValueError: if a convolution is missing, or more is kept than there is.
    """
    description = describe(network) if isinstance(network, str) else network
    shares = dict.fromkeys(range(len(description.genes)), 0.0)
    for layer in description.layers():
        width = layer.conv.outputs
        if layer.name not in kept:
            raise ValueError(f"kept filters of {description.name}: none are given for {layer.name}")
        if not 0 <= kept[layer.name] <= width.maximum:
            raise ValueError(f"{layer.name} has {width.maximum} filters, and {kept[layer.name]} are said to be kept")
        if width.gene is not None and not layer.conv.depthwise:
            shares[width.gene] = max(shares[width.gene], kept[layer.name] / width.maximum)
    return tuple(nearest_choice(share) for share in shares.values())


def rates_of_encoding(network: str | Description, encoding: Sequence[int]) -> dict[str, float]:
    """The share of filters to prune of each convolution, by name, so that an encoding's widths are left.

    Raises:
        ValueError: as :func:`fastprune.metapruning.cost`.
    """
    description = describe(network) if isinstance(network, str) else network
    chosen = check_encoding(encoding, len(description.genes), description.name)
    return {
        layer.name: 1 - layer.conv.outputs.channels(chosen) / layer.conv.outputs.maximum
        for layer in description.layers()
    }


def encoding_of_run(run: Path, network: str) -> Encoding:
    """The encoding nearest to what is kept at the end of a run of ``fastprune.train``.

    Args:
        run: its folder.
        network: the network it has to be of.

    Raises:
        ValueError: if it is not the folder of a run, has no finished epoch, or trained another network.
    """
    config = recipes.read_config(run)
    trained = models.described(config.model, config.stem)
    if trained != network:
        raise ValueError(f"{run} trained {trained}, and the search is of {network}")
    try:
        last = report.read_metrics(run)[-1]
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    return encoding_of_kept(network, dict(zip(last["layers"], last["kept_per_layer"])))
