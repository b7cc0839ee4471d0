"""What a run folder says: its metrics read back, summed up, and put beside the authors' table.

``python -m fastprune.report run/ [run/ ...]`` draws one run, or compares several (see report_page).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

__all__ = [
    *("AUTHORS_RESULTS", "LAYER_FIELDS", "AuthorsResult", "Record", "best_epoch", "comparison", "format_summary"),
    *("main", "read_metrics", "run_title", "summary"),
]

Record = dict[str, Any]

_CIFAR10_TRAIN_IMAGES = 50_000

_EVERY_LINE = {
    *("epoch", "step", "train", "test", "penalty", "sparsity", "kept_filters", "filters"),
    *("kept_per_layer", "lr", "images_per_s", "seconds"),
}
_SCORES = {"loss", "top1", "top5"}  # of "train" and of "test"
LAYER_FIELDS = ("layers", "filters_per_layer")  # on the first line, and valid for those that lack them


@dataclass(frozen=True)
class AuthorsResult:
    """One run of the original system: ResNet-56, CIFAR-10, 300 epochs. Its regulariser was always zero."""

    run: str
    prune_rate: float
    alpha: float | None  # of the regulariser; None: not regularised
    best_top1: float  # percent, test, of the best epoch of 300
    sparsity: float | tuple[float, float]  # percent; a pair is the range over the three collapsed runs
    last50: tuple[float, float] | None = None  # percent, test top-1: mean and deviation of the last 50 epochs


AUTHORS_RESULTS = (
    AuthorsResult("dense", 0.0, None, 88.57, 0.0),
    AuthorsResult("pruned, rate 0.5", 0.5, None, 82.88, 52.05),
    AuthorsResult("pruned, rate 0.6", 0.6, None, 80.81, 70.26, (74.7, 3.9)),
    AuthorsResult("pruned, rate 0.7 (collapsed)", 0.7, None, 10.00, (82.0, 96.0)),
    AuthorsResult("pruned, rate 0.8 (collapsed)", 0.8, None, 10.00, (82.0, 96.0)),
    AuthorsResult("pruned, rate 0.9 (collapsed)", 0.9, None, 10.00, (82.0, 96.0)),
    AuthorsResult("regularised 0.7, dense", 0.0, 0.7, 88.00, 0.0),
    AuthorsResult("rate 0.6 + regularised 0.7", 0.6, 0.7, 82.28, 71.34, (75.3, 3.8)),
    AuthorsResult("rate 0.5 + regularised 0.7", 0.5, 0.7, 83.05, 48.94),
    AuthorsResult("rate 0.5 + regularised 0.8", 0.5, 0.8, 82.03, 50.35),
    AuthorsResult("rate 0.5 + regularised 0.9", 0.5, 0.9, 82.90, 49.48),
)


def read_metrics(run: Path) -> list[Record]:
    """Return the records of `run/metrics.jsonl`, one per epoch, each with the layers' names and sizes.

    A last line that was cut off, as by a crash, is dropped, and that is printed. Where a resumed run did an
    epoch again, the later record of it counts.

    Raises:
        FileNotFoundError: without that file.
        ValueError: for a file without a finished epoch, and for a bad line, with its number.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is not the folder of a run: it has no metrics.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    records: list[Record] = []
    once: Record = {}
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines) and not line.endswith("\n"):
                print(f"{place} was cut off and is left out")
                break
            raise ValueError(f"{place}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected an object, found {type(record).__name__}")
        once |= {key: record[key] for key in LAYER_FIELDS if key in record}
        record = once | record
        if missing := _missing(record):
            raise ValueError(f"{place}: {', '.join(missing)} missing")
        while records and records[-1]["epoch"] >= record["epoch"]:
            records.pop()
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no finished epoch yet")
    return records


def _missing(record: Record) -> list[str]:
    missing = (_EVERY_LINE | set(LAYER_FIELDS)) - record.keys()
    for split in ("train", "test"):
        scores = record.get(split)
        found = scores.keys() if isinstance(scores, dict) else set()
        missing |= {f"{split}.{key}" for key in _SCORES - found}
    return sorted(missing)


def run_title(config: Mapping[str, Any], fallback: str = "run") -> str:
    """Return a line that says what ran, from those settings that are there; `fallback` where none is."""
    parts = [str(config[key]) for key in ("model", "data", "recipe") if config.get(key) is not None]
    if config.get("prune_rate") is not None:
        parts.append(f"rate {config['prune_rate']:g}")
    if _alpha(config) is not None:
        parts.append(f"{config['decorrelation']} α {_alpha(config):g}")
    if config.get("seed") is not None and parts:
        parts.append(f"seed {config['seed']}")
    return " · ".join(parts) or fallback


def comparison(config: Mapping[str, Any], last: Record, best: Record) -> dict[str, Any]:
    """Return this run beside the authors' run of the same settings, or why there is none.

    Args:
        config: the settings; model, data, train_images, epochs, prune_type, prune_rate, decorrelation, alpha and
            recipe are used.
        last, best: the records of the last epoch and of the one with the best test top-1.

    Returns:
        `{"comparable": False, "why"}` or `{"comparable": True, "authors", "difference_top1", "note"}`, where
        `difference_top1` is ours minus their best in percentage points, for our "last" and our "best".
    """
    needed = {"model": "resnet56", "data": "cifar10", "epochs": 300}
    rate, alpha = config.get("prune_rate") or 0.0, _alpha(config)
    same = [authors for authors in AUTHORS_RESULTS if (authors.prune_rate, authors.alpha) == (rate, alpha)]
    why = ""
    if differing := [f"{key} {config.get(key)}" for key, value in needed.items() if config.get(key) != value]:
        why = f"theirs are resnet56 on cifar10 for 300 epochs, and this is {', '.join(differing)}"
    elif config.get("train_images") not in (None, _CIFAR10_TRAIN_IMAGES):
        why = f"theirs saw {_CIFAR10_TRAIN_IMAGES:,} training images, and this run {config['train_images']:,}"
    elif rate and config.get("prune_type") == "unstructured":
        why = "theirs pruned whole filters, and this run single weights"
    elif last["epoch"] != 300:
        why = f"this run has finished {last['epoch']} of its 300 epochs"
    elif not same:
        state = "unregularised" if alpha is None else f"regularised with alpha {alpha:g}"
        why = f"the authors have no run at rate {rate:g}, {state}"
    if why:
        return {"comparable": False, "why": why}
    authors = same[0]
    note = (
        "The authors' figure is the test accuracy of their best epoch of 300; "
        "ours names the last epoch first, and the best beside it only because theirs is one."
    )
    if alpha is not None:
        note += " Their regulariser was always zero."
    if config.get("recipe") != "faithful":
        note += f" They trained as our recipe 'faithful' does, this run as {config.get('recipe')!r}."
    ours = {"last": last["test"]["top1"], "best": best["test"]["top1"]}
    difference = {name: round(top1 - authors.best_top1, 4) for name, top1 in ours.items()}
    return {"comparable": True, "authors": asdict(authors), "difference_top1": difference, "note": note}


def summary(config: Mapping[str, Any], metrics: Sequence[Record]) -> dict[str, Any]:
    """Return what goes into summary.json: the last epoch first, then the best.

    The best is by test top-1, the earliest of equals; "seconds" is the sum over the epochs,
    "images_per_s" their mean.

    Raises:
        ValueError: without a finished epoch.
    """
    if not metrics:
        raise ValueError("no finished epoch to sum up")
    last, best = metrics[-1], best_epoch(metrics)
    per_layer = {*LAYER_FIELDS, "kept_per_layer"}
    return {
        "run": run_title(config),
        "last": {key: value for key, value in last.items() if key not in per_layer},
        "best": {key: value for key, value in best.items() if key not in per_layer},
        "comparison": comparison(config, last, best),
        "epochs": len(metrics),
        "seconds": sum(m["seconds"] for m in metrics),
        "images_per_s": fmean(m["images_per_s"] for m in metrics),
    }


def format_summary(summary: Mapping[str, Any]) -> str:
    """Return a few lines for people from what `summary` returned."""
    last, best, beside = summary["last"], summary["best"], summary["comparison"]
    test, count = last["test"], summary["epochs"]
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    lines = [
        summary["run"],
        f"  last epoch ({last['epoch']}): test top-1 {test['top1']:.2f} %, top-5 {test['top5']:.2f} %, "
        f"loss {test['loss']:.4f}; sparsity {last['sparsity']:.2f} %, "
        f"{last['kept_filters']:,} of {last['filters']:,} filters kept",
        f"  best epoch ({best['epoch']}): test top-1 {best['test']['top1']:.2f} %, sparsity {best['sparsity']:.2f} %",
        f"  {count} epoch{'s' * (count > 1)} in {minutes // 60} h {minutes % 60:02} min {seconds:02} s, "
        f"{summary['images_per_s']:,.0f} images/s",
    ]
    if not beside["comparable"]:
        return "\n".join([*lines, f"  not comparable with the authors' table: {beside['why']}"])
    authors, difference = beside["authors"], beside["difference_top1"]
    figures = [f"best epoch of 300 {authors['best_top1']:.2f} %"]
    if authors["last50"] is not None:
        figures.append("last 50 epochs {} ± {} %".format(*authors["last50"]))
    if isinstance(authors["sparsity"], float):  # of the collapsed runs only a range is known
        figures.append(f"sparsity {authors['sparsity']:.2f} %")
    lines += [
        f'  the authors\' "{authors["run"]}": {", ".join(figures)}',
        f"  ours against their best: last {difference['last']:+.2f}, best {difference['best']:+.2f} points",
        f"  {beside['note']}",
    ]
    return "\n".join(lines)


def _alpha(config: Mapping[str, Any]) -> float | None:
    """Return the weight of the decorrelation term, None where there is none."""
    return (config.get("alpha") or None) if config.get("decorrelation") else None


def best_epoch(metrics: Sequence[Record]) -> Record:
    """Return the record with the highest test top-1, the earliest of equals."""
    return max(metrics, key=lambda m: m["test"]["top1"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command ``python -m fastprune.report``; see report_page."""
    from . import report_page  # which draws with what reads from here

    return report_page.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
