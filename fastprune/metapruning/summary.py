"""What the stages of a search found, for its folder and for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..runlog import duration
from .encoding import WIDEST, as_text
from .space import Space
from .state import Search


def budget_line(space: Space) -> str:
    """The budget for people: ``1,950.00 to 2,050.00 M flops``."""
    parts = []
    for metric, limits in space.budget.items():
        ends = " to ".join(amount(metric, value) for value in limits if value is not None)
        parts.append(ends if None not in limits else f"{'at most' if limits[0] is None else 'at least'} {ends}")
    return "; ".join(parts) or "none"


def amount(metric: str, value: float) -> str:
    """A value of a metric, with its unit."""
    if metric == "latency_ms":
        return f"{value:.3f} ms"
    return f"{value / 1e6:,.2f} M {metric}" if value >= 1e5 else f"{value:,.0f} {metric}"


def epoch_line(record: Mapping[str, Any], epochs: int) -> str:
    """An epoch of the PruningNet's training."""
    train = record["train"]
    return (
        f"PruningNet epoch {record['epoch']}/{epochs}  loss {train['loss']:.3f}  train top-1 {train['top1']:.2f}  "
        f"validation top-1 {_uniform_scores(record)}  {duration(record['seconds'])}"
    )


def _uniform_scores(record: Mapping[str, Any]) -> str:
    scores = [f"{top1:.2f} (genes {choice})" for choice, top1 in record["validation"].items()]
    return ", ".join(scores)


def generation_line(search: Search) -> str:
    """A finished generation."""
    last = search.history[-1]
    return (
        f"generation {search.generation}/{search.iterations}  validation top-1 best {last['best']:.2f}, "
        f"mean {last['mean']:.2f}  {len(search.evaluated):,} encodings, "
        f"{search.seconds / len(search.evaluated):.2f} s each  best {as_text(search.best()[0])}"
    )


def search_summary(search: Search) -> dict[str, Any]:
    """The best encoding, what it costs, that beside the widest network, and how long it took."""
    space, best = search.space, search.best()[0]
    costs, widest = space.costs_of(best), space.costs_of((WIDEST,) * space.genes)
    found = {
        "best": list(best),
        "validation": dataclasses.asdict(search.evaluated[best]),
        "costs": costs,
        "share_of_widest": {metric: value / widest[metric] for metric, value in costs.items()},
        "generations": search.generation,
        "evaluated": len(search.evaluated),
        "seconds": search.seconds,
        "seconds_per_encoding": search.seconds / len(search.evaluated),
        "history": search.history,
    }
    if front := search.front():
        found["front"] = [
            {"encoding": list(encoding), "top1": search.evaluated[encoding].top1, "costs": space.costs_of(encoding)}
            for encoding in front
        ]
    return found


def format_summary(summary: Mapping[str, Any]) -> str:
    """A few lines for people from ``summary.json``."""
    lines = [f"{summary['network']} on {summary['data']}, budget {summary['budget']}"]
    if "pruning_net" in summary:
        last = summary["pruning_net"]
        lines.append(
            f"  PruningNet, epoch {last['epoch']} of {last['epochs']} ({duration(last['seconds'])}): "
            f"validation top-1 {_uniform_scores(last)}"
        )
    if "search" in summary:
        found = summary["search"]
        costs = ", ".join(
            f"{amount(metric, value)} ({100 * found['share_of_widest'][metric]:.1f} %)"
            for metric, value in found["costs"].items()
        )
        lines += [
            f"  search: {found['evaluated']:,} encodings in {duration(found['seconds'])}, "
            f"{found['seconds_per_encoding']:.2f} s each",
            f"  best: {as_text(found['best'])}",
            f"    validation top-1 {found['validation']['top1']:.2f} % with generated weights",
            f"    {costs} of the widest network",
        ]
        if "front" in found:
            lines.append(f"  Pareto front: {len(found['front'])} encodings")
    if "final" in summary:
        last = summary["final"]["last"]
        lines.append(
            f"  trained from scratch, epoch {last['epoch']}: test top-1 {last['test']['top1']:.2f} %, "
            f"loss {last['test']['loss']:.4f}"
        )
    return "\n".join(lines)
