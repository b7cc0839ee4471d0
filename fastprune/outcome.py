"""What a run has come to: its network without what is pruned, beside the one it comes of."""

import copy
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import nn

from . import models
from .cost import cost
from .report import Record
from .trainer import Trainer

__all__ = ["format_small", "small_figures"]


def small_figures(trainer: Trainer, small: nn.Module, records: Sequence[Record]) -> dict[str, Any]:
    """Return what the network without its pruned filters is.

    Args:
        trainer: at the end of an epoch.
        small: its network without what is pruned.
        records: of its epochs.

    Returns:
        ``parameters`` and ``macs`` (multiply-accumulates of one image), each of the dense network and of the small one;
        ``test``: the scores of the one that was trained and of the small one; and of a run that went on with the small
        one, ``images_per_s``: the means over the epochs before and after.
    """
    config = trainer.config
    dense = models.create(config.model, len(trainer.images.classes), config.stem)
    example = trainer.example_input().cpu()
    costs = [cost(model, example, masked=False) for model in (dense, copy.deepcopy(small).cpu())]
    figures: dict[str, Any] = {
        "parameters": [each.parameters for each in costs],
        "macs": [each.macs for each in costs],
        "test": [records[-1]["test"], trainer.test(small)],
    }
    speeds = [[r["images_per_s"] for r in records if r.get("compacted", False) is after] for after in (False, True)]
    if all(speeds):
        figures["images_per_s"] = [fmean(each) for each in speeds]
    return figures


def format_small(figures: dict[str, Any], file: str) -> str:
    """Return what :func:`small_figures` found, in lines for people."""
    counts = [
        f"{after:,} of {before:,} {what} ({100 * after / before:.1f} %)"
        for what, (before, after) in (("parameters", figures["parameters"]), ("MACs", figures["macs"]))
    ]
    trained, small = figures["test"]
    lines = [
        f"  without what is pruned ({file}): {', '.join(counts)}",
        f"  its test top-1 {small['top1']:.2f} %, as trained {trained['top1']:.2f} %",
    ]
    if "images_per_s" in figures:
        before, after = figures["images_per_s"]
        lines.append(f"  trained at {after:,.0f} images/s without it, before at {before:,.0f} ({after / before:.2f}×)")
    return "\n".join(lines)
