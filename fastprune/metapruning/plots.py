"""A search drawn: what its generations found, what that costs, and how wide the best network is."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..checkpoint import write_atomically
from .description import Description
from .encoding import SCALES, Encoding
from .fitness import Score

_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#D9DDE1"


def plot_search(
    folder: Path,
    description: Description,
    evaluated: Mapping[Encoding, Score],
    best: Encoding,
    cost: Mapping[str, np.ndarray],
    metric: str,
    front: Sequence[Encoding] = (),
) -> list[Path]:
    """Draw ``search.png`` and ``widths.png`` into a folder; return both.

    Args:
        description: of the network.
        evaluated: the score of every encoding, in the order of evaluation.
        best: the one to point out.
        cost: each metric of all of them, ``[P]``.
        metric: the one to draw.
        front: those of a Pareto front, to connect.
    """
    search, widths = folder / "search.png", folder / "widths.png"
    _write(_search_figure(description.name, evaluated, best, cost[metric], metric, front), search)
    _write(widths_figure(description, best), widths)
    return [search, widths]


def _search_figure(
    name: str,
    evaluated: Mapping[Encoding, Score],
    best: Encoding,
    cost: np.ndarray,
    metric: str,
    front: Sequence[Encoding],
) -> Figure:
    top1 = np.array([score.top1 for score in evaluated.values()])
    places = {encoding: i for i, encoding in enumerate(evaluated)}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    figure.suptitle(f"{name}: {len(top1):,} encodings evaluated with generated weights", fontsize=11)
    left, right = figure.subplots(1, 2)
    left.plot(top1, ".", color=_BLUE, markersize=4, label="one encoding")
    left.plot(np.maximum.accumulate(top1), color=_RED, linewidth=1.6, label=f"best so far (last {top1.max():.2f} %)")
    _finish(left, "Fitness", "encodings evaluated")
    unit, factor = ("ms", 1.0) if metric == "latency_ms" else (f"M {metric}", 1e-6)
    values = cost * factor
    right.plot(values, top1, ".", color=_BLUE, markersize=4)
    if front:
        order = sorted(places[encoding] for encoding in front)
        order.sort(key=lambda i: values[i])
        right.plot(values[order], top1[order], "o-", color=_RED, markersize=4, linewidth=1.4, label="Pareto front")
    chosen = places[best]
    right.plot(values[chosen], top1[chosen], "*", color=_RED, markersize=13, label="best")
    _finish(right, "Fitness against cost", unit)
    return figure


def widths_figure(description: Description, encoding: Encoding) -> Figure:
    """Return a bar per gene, the first one on top, for the share of its channels that the encoding keeps."""
    rows = range(len(description.genes))
    shares = [100 * SCALES[choice] for choice in encoding]
    maxima = {
        width.gene: width
        for block in description.blocks
        for conv in block.convs
        for width in (conv.inputs, conv.outputs)
        if width.gene is not None
    }
    figure = Figure(figsize=(8, 1.4 + 0.19 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(rows, [100] * len(shares), color=_GREY, height=0.78)
    axes.barh(rows, shares, color=_BLUE, height=0.78)
    for row in rows:
        width = maxima[row]
        axes.text(101, row, f"{width.channels(encoding)} / {width.maximum}", va="center", fontsize=7.5)
    axes.set_yticks(rows, description.genes, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 114), ylim=(len(rows) - 0.4, -0.6), xticks=range(0, 101, 20))
    axes.set_xlabel("channels (%), and channels / all")
    axes.set_title(f"{description.name}: the best encoding", fontsize=10, loc="left")
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    return figure


def _finish(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set(xlabel=x, ylabel="validation top-1 (%)")
    axes.grid(color="#E6E8EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _write(figure: Figure, path: Path) -> None:
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(png, format="png", dpi=130)
    write_atomically(path, [png.getbuffer()], what="a picture")
