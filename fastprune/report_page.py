"""The command ``python -m fastprune.report``: one run drawn, or several compared, as pictures and as one HTML page."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor, nn

from . import html, plots, recipes, report, run_folder
from .checkpoint import write_atomically
from .compact import compact
from .cost import Cost, cost
from .formats import MissingPackageError
from .latency import latency
from .report import Record
from .run_folder import RunError
from .runlog import duration

__all__ = ["Options", "Run", "compare", "draw", "main"]


@dataclass(frozen=True)
class Options:
    """Draw a run, or compare several: pictures, and one HTML page that holds all of it."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of runs."""
    html: Path | None = None
    """The page; report.html in the run's folder, or comparison.html here for several runs, if not given."""
    latency: bool = False
    """Measure each run's network, as large as at first and compact (a minute or more for each run)."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("give at least one folder of a run")

    @property
    def page(self) -> Path:
        """The page to write."""
        return self.html or (self.runs[0] / "report.html" if len(self.runs) == 1 else Path("comparison.html"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 1 for folders that are none of a run."""
    words = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(Options, args=words, prog="python -m fastprune.report")
    try:
        for path in draw(options):
            print(path)
    except (FileNotFoundError, RunError, MissingPackageError, ValueError, OSError) as error:
        print(f"fastprune.report: error: {error}", file=sys.stderr)
        return 1
    return 0


def draw(options: Options) -> list[Path]:
    """Write the pictures and the page, and return their paths.

    Raises:
        FileNotFoundError, ValueError: for a folder without the metrics of a run, or damaged ones.
        MissingPackageError: if latencies are asked for, and ONNX Runtime is missing.
        OSError: where a file cannot be written.
    """
    names = plots.run_names(options.runs)
    runs = [Run(folder, name) for folder, name in zip(options.runs, names)]
    if len(runs) == 1:
        pictures = plots.plot_run(options.runs[0])
        title, parts = runs[0].name, _of_one(runs[0])
    else:
        pictures = [options.page.with_suffix(".png")]
        plots.compare_runs(options.runs, pictures[0])
        title, parts = f"{len(runs)} runs", compare(runs)
    if options.latency:
        parts += [part for run in runs for part in _latency(run, several=len(runs) > 1)]
    write_atomically(options.page, [html.page(title, parts).encode()], what="the report")
    return [*pictures, options.page]


@dataclass(frozen=True)
class Run:
    """A run folder, read when it is asked for."""

    folder: Path
    name: str

    @cached_property
    def config(self) -> dict[str, Any]:
        """What its config.json says."""
        return plots.read_config(self.folder)

    @cached_property
    def metrics(self) -> list[Record]:
        """Its records, one for each epoch."""
        return report.read_metrics(self.folder)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What summary.json says of a finished run."""
        return report.summary(self.config, self.metrics)

    @cached_property
    def network(self) -> tuple[nn.Module, Tensor] | str:
        """Its network and an input for it, or why they cannot be had."""
        try:
            config, model = run_folder.load_network(self.folder)
            return model, torch.zeros(1, *run_folder.image_shape(self.folder, config))
        except RunError as error:
            return str(error)

    @cached_property
    def dense(self) -> nn.Module:
        """Its network as large as it was at first; of random weights."""
        assert not isinstance(self.network, str)
        return run_folder.dense_network(recipes.read_config(self.folder), self.network[0])

    @cached_property
    def costs(self) -> tuple[Cost, Cost] | None:
        """What an image costs with the dense network, and with what is left of it; None where it cannot be said."""
        if isinstance(self.network, str):
            return None
        model, example = self.network
        return cost(self.dense, example), cost(model, example)


def _of_one(run: Run) -> list[str]:
    last, config = run.summary["last"], run.config
    parts = [
        _facts(run),
        html.paragraph(_beside_authors(run.summary["comparison"]), soft=True),
        html.heading("Accuracy and pruning"),
        html.picture(plots.png(plots.curves_figure(run.metrics, "")), "Curves of accuracy and sparsity over epochs"),
        html.heading("Epochs"),
        html.table(_epoch_rows(run.metrics)),
        html.heading("Filters"),
        html.picture(plots.png(plots.filters_figure(run.metrics[-1], "")), "A bar for the filters kept of each layer"),
        html.heading("Cost of an image, layer by layer"),
        *_layers(run),
        html.heading("Settings"),
        html.table([("setting", "value"), *_settings(config)], left=(0, 1), wrap=True),
    ]
    return [html.paragraph(f"{last['epoch']} epochs finished; folder {run.folder.resolve().name}", soft=True), *parts]


def _facts(run: Run) -> str:
    last, best = run.summary["last"], run.summary["best"]
    entries = [
        ("test top-1, last epoch", f"{last['test']['top1']:.2f} %", f"top-5 {last['test']['top5']:.2f} %"),
        ("best epoch", f"{best['test']['top1']:.2f} %", f"epoch {best['epoch']}"),
        ("sparsity", f"{last['sparsity']:.2f} %", "of all parameters are zero"),
        ("filters kept", f"{last['kept_filters']:,}", f"of {last['filters']:,}"),
    ]
    if run.costs:
        dense, left = run.costs
        entries += [
            ("MACs left", f"{left.macs / dense.macs:.1%}", f"{left.macs / 1e6:,.1f} of {_millions(dense.macs)}"),
            ("parameters left", f"{left.parameters / dense.parameters:.1%}", f"{left.parameters:,}"),
        ]
    per_second = f"{run.summary['images_per_s']:,.0f} images/s"
    return html.facts([*entries, ("training", duration(run.summary["seconds"]), per_second)])


def _millions(number: int) -> str:
    return f"{number / 1e6:,.1f} M"


def _beside_authors(comparison: dict[str, Any]) -> str:
    if not comparison["comparable"]:
        return f"Not comparable with the authors' table: {comparison['why']}."
    authors, difference = comparison["authors"], comparison["difference_top1"]
    return (
        f"The authors' “{authors['run']}”: best epoch of 300 {authors['best_top1']:.2f} %. Ours against it: last "
        f"{difference['last']:+.2f}, best {difference['best']:+.2f} points. {comparison['note']}"
    )


def _epoch_rows(metrics: Sequence[Record]) -> list[tuple[str, ...]]:
    """At most about 30 of them, the last one always."""
    step = -(-len(metrics) // 30)
    chosen = [m for i, m in enumerate(metrics) if (len(metrics) - 1 - i) % step == 0]
    heading = ("epoch", "train loss", "train top-1", "test loss", "test top-1", "sparsity", "kept", "lr", "images/s")
    return [heading, *(_epoch_row(m) for m in chosen)]


def _epoch_row(m: Record) -> tuple[str, ...]:
    train, test = m["train"], m["test"]
    accuracies = (f"{train['loss']:.3f}", f"{train['top1']:.2f} %", f"{test['loss']:.3f}", f"{test['top1']:.2f} %")
    others = (f"{m['sparsity']:.2f} %", f"{m['kept_filters']:,}", f"{m['lr']:.4g}", f"{m['images_per_s']:,.0f}")
    return (str(m["epoch"]), *accuracies, *others)


def _layers(run: Run) -> list[str]:
    if run.costs is None:
        return [html.paragraph(f"Not known: {run.network}.", soft=True)]
    dense, left = run.costs
    kept = {layer.name: layer for layer in left.layers}
    heading = ("layer", "kind", "MACs", "MACs left", "parameters", "parameters left")
    rows = [heading]
    for layer in dense.layers:
        if layer.macs:
            own = kept.get(layer.name)
            macs, parameters = (own.macs, own.parameters) if own else (0, 0)
            shares = (f"{layer.macs:,}", f"{macs / layer.macs:.0%}", f"{layer.parameters:,}")
            rows.append((layer.name, layer.kind, *shares, f"{parameters / max(layer.parameters, 1):.0%}"))
    convention = (
        "For an input of " + "×".join(map(str, dense.input_shapes[0])) + ". MACs are the multiply-accumulates of "
        "convolutions and linear layers; what is left counts neither pruned filters, nor channels that they leave "
        "constant, nor what no kept filter reads."
    )
    return [html.paragraph(convention, soft=True), html.table(rows, left=(0, 1))]


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    decided = {name: f" (asked for: {_shown(d['asked'])}; {d['why']})" for name, d in config.get("decided", {}).items()}
    shown = {name: _shown(value) for name, value in config.items() if name not in ("config", "decided")}
    return [(name, value + decided.get(name, "")) for name, value in shown.items()]


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def compare(runs: Sequence[Run]) -> list[str]:
    """Return the parts of a page that sets several runs side by side."""
    heading = (
        *("run", "test top-1, last", "best (epoch)", "sparsity", "filters kept", "MACs left", "parameters left"),
        *("images/s", "time"),
    )
    parts = [
        html.table([heading, *(_compared(run) for run in runs)]),
        html.heading("Test accuracy and sparsity"),
        html.picture(plots.png(plots.comparison_figure([r.folder for r in runs])), "Accuracy and sparsity over epochs"),
        html.heading("Settings that differ"),
    ]
    known = ("config", "decided", "out", "resume")
    names = dict.fromkeys(name for run in runs for name in run.config if name not in known)
    differing = [name for name in names if len({_shown(run.config.get(name)) for run in runs}) > 1]
    if differing:
        rows = [[name, *(_shown(run.config.get(name)) for run in runs)] for name in differing]
        columns = range(len(runs) + 1)
        parts.append(html.table([["setting", *(run.name for run in runs)], *rows], left=columns, wrap=True))
    else:
        parts.append(html.paragraph("None."))
    for run in runs:
        bars = plots.png(plots.filters_figure(run.metrics[-1], ""))
        parts += [html.heading(run.name), html.picture(bars, f"Filters kept of each layer, {run.name}")]
    return parts


def _compared(run: Run) -> tuple[str, ...]:
    last, best = run.summary["last"], run.summary["best"]
    macs = parameters = "–"
    if run.costs:
        dense, left = run.costs
        macs = f"{_millions(left.macs)} ({left.macs / dense.macs:.0%})"
        parameters = f"{left.parameters:,} ({left.parameters / dense.parameters:.0%})"
    return (
        run.name,
        f"{last['test']['top1']:.2f} %",
        f"{best['test']['top1']:.2f} % ({best['epoch']})",
        f"{last['sparsity']:.2f} %",
        f"{last['kept_filters']:,} of {last['filters']:,}",
        macs,
        parameters,
        f"{run.summary['images_per_s']:,.0f}",
        duration(run.summary["seconds"]),
    )


def _latency(run: Run, several: bool) -> list[str]:
    title = html.heading(f"Latency: {run.name}" if several else "Latency")
    if isinstance(run.network, str):
        return [title, html.paragraph(f"Not known: {run.network}.", soft=True)]
    model, example = run.network
    found = latency({"dense": run.dense, "compact": compact(model, example)}, example)
    told = (
        f"{found.device}, {found.threads} threads. Medians of calls that took turns, and half the distance of the "
        "quartiles; speed-ups are against the network as large as it was at first."
    )
    return [title, html.paragraph(told, soft=True), html.table(found.rows(), left=(0, 2))]
