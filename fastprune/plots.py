"""A run's metrics drawn: curves over epochs, filters kept per layer, several runs side by side."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from .checkpoint import write_atomically
from .report import Record, best_epoch, read_metrics, run_title

__all__ = [
    *("compare_runs", "comparison_figure", "curves_figure", "filters_figure", "kept_shares", "plot_run", "png"),
    *("read_config", "run_names"),
]

# Colours that colour-blind readers can tell apart (Okabe and Ito).
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#D9DDE1"
_CYCLE = (_BLUE, _RED, _GREEN, "#CC79A7", _ORANGE, "#56B4E9", "#000000", "#B8A900")


def plot_run(run: Path) -> list[Path]:
    """Draw `run/curves.png` and `run/filters.png` from its metrics (and its config if there); return both.

    Raises:
        FileNotFoundError, ValueError: as `read_metrics`, and for a config.json that is not a JSON object.
        OSError: where a picture cannot be written; an older one stays.
    """
    metrics = read_metrics(run)
    title = run_title(read_config(run), fallback=run.resolve().name)
    curves, filters = run / "curves.png", run / "filters.png"
    _write(curves_figure(metrics, title), curves)
    _write(filters_figure(metrics[-1], title), filters)
    return [curves, filters]


def compare_runs(runs: Sequence[Path], out: Path) -> None:
    """Draw `comparison_figure` into the PNG file `out`.

    Raises:
        ValueError: for no run, and as `read_metrics` does.
    """
    _write(comparison_figure(runs), out)


def run_names(runs: Sequence[Path]) -> list[str]:
    """Return what runs are called side by side: by their settings, and by their folder where settings are equal."""
    titles = [run_title(read_config(run), fallback=run.resolve().name) for run in runs]
    shared = Counter(titles)
    return [t if shared[t] == 1 else f"{t} ({run.resolve().name})" for run, t in zip(runs, titles, strict=True)]


def comparison_figure(runs: Sequence[Path]) -> Figure:
    """Return test accuracy and sparsity of several runs over epochs, labelled by their settings.

    Raises:
        ValueError: for no run, and as `read_metrics` does.
    """
    if not runs:
        raise ValueError("no runs to compare: give at least one run folder")
    figure, (left, right) = _two_panels("", height=4.6 + 0.22 * len(runs))
    for index, (run, name) in enumerate(zip(runs, run_names(runs), strict=True)):
        metrics = read_metrics(run)
        label = f"{name}: last {metrics[-1]['test']['top1']:.2f} %"
        epochs, colour = [m["epoch"] for m in metrics], _CYCLE[index % len(_CYCLE)]
        style = ("-", "--", ":")[index // len(_CYCLE) % 3]
        _curve(left, epochs, _top1(metrics, "test"), label, colour, style)
        _curve(right, epochs, [m["sparsity"] for m in metrics], None, colour, style)
    _finish(left, "Test accuracy", "top-1 (%)")
    _finish(right, "Sparsity", "zeros of all weights and biases (%)", full=True)
    figure.legend(loc="outside lower left", frameon=False)
    return figure


def curves_figure(metrics: Sequence[Record], title: str) -> Figure:
    """Return train and test top-1 over epochs, and beside it sparsity and the share of filters kept."""
    last, best = metrics[-1], best_epoch(metrics)
    epochs = [m["epoch"] for m in metrics]
    figure, (left, right) = _two_panels(title, height=4.4)
    test = f"test (last {last['test']['top1']:.2f}, best {best['test']['top1']:.2f} at epoch {best['epoch']})"
    _curve(left, epochs, _top1(metrics, "train"), f"train (last {last['train']['top1']:.2f})", _ORANGE, "--")
    _curve(left, epochs, _top1(metrics, "test"), test, _BLUE)
    _finish(left, "Accuracy", "top-1 (%)")
    kept = [100 * m["kept_filters"] / m["filters"] for m in metrics]
    filters = f"filters kept of all filters (last {last['kept_filters']:,} of {last['filters']:,})"
    zeros = f"sparsity: zeros of all weights and biases (last {last['sparsity']:.2f})"
    _curve(right, epochs, kept, filters, _GREEN, "--")
    _curve(right, epochs, [m["sparsity"] for m in metrics], zeros, _RED)
    _finish(right, "Pruning", "share (%)", full=True)
    for axes in (left, right):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    return figure


def kept_shares(record: Record) -> list[float]:
    """Return the percentage of its filters that each layer keeps, in model order."""
    pairs = zip(record["kept_per_layer"], record["filters_per_layer"], strict=True)
    return [100 * kept / filters for kept, filters in pairs]


def filters_figure(record: Record, title: str) -> Figure:
    """Return a bar per layer, the first one on top, for the share of its filters that are kept."""
    names, shares = record["layers"], kept_shares(record)
    rows = range(len(names))
    figure = Figure(figsize=(8, 1.5 + 0.19 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(rows, [100] * len(names), color=_GREY, height=0.78)
    axes.barh(rows, shares, color=_BLUE, height=0.78)
    for row, kept, filters in zip(rows, record["kept_per_layer"], record["filters_per_layer"], strict=True):
        colour, weight = ("#222222", "normal") if kept else (_RED, "bold")  # a layer without filters stands out
        axes.text(101, row, f"{kept} / {filters}", va="center", fontsize=7.5, color=colour, weight=weight)
    axes.set_yticks(rows, names, fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set(xlim=(0, 112), ylim=(len(names) - 0.4, -0.6), xticks=range(0, 101, 20))
    axes.set_xlabel("filters kept (%), and kept / all")
    axes.grid(axis="x", color="white", linewidth=0.7, alpha=0.8)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    total = f"{record['kept_filters']:,} of {record['filters']:,} filters kept after epoch {record['epoch']}"
    axes.set_title("\n".join(filter(None, (title, total))), fontsize=10, loc="left")
    return figure


def _top1(metrics: Sequence[Record], split: str) -> list[float]:
    return [m[split]["top1"] for m in metrics]


def read_config(run: Path) -> dict[str, Any]:
    """Return what `run/config.json` says, `{}` without one; a ValueError names one that is not a JSON object."""
    path = run / "config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a JSON object ({error})") from error


def _two_panels(title: str, height: float) -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=(11, height), layout=ConstrainedLayoutEngine(w_pad=0.12))
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=11)
    return figure, (left, right)


def _curve(
    axes: Axes, epochs: list[int], values: list[float], label: str | None, colour: str, style: str = "-"
) -> None:
    marker = "o" if len(epochs) <= 30 else ""  # so that few epochs, or one, can be seen
    axes.plot(epochs, values, style, color=colour, label=label, marker=marker, markersize=4, linewidth=1.8)


def _finish(axes: Axes, title: str, unit: str, full: bool = False) -> None:
    axes.set_title(title, fontsize=11)
    axes.set(xlabel="epochs finished", ylabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if full:
        axes.set_ylim(-2, 102)
    axes.grid(color="#E6E8EB", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(file, format="png", dpi=130)
    return file.getvalue()


def _write(figure: Figure, path: Path) -> None:
    write_atomically(path, [png(figure)], what="a picture")
