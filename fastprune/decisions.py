"""What a run decided by itself, in place of what was asked for: printed, and kept in its config.json."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError

__all__ = ["Decision", "earlier", "lines", "merged", "stored"]

KEY = "decided"
STORED = ("field", "asked", "used", "why")


@dataclass(frozen=True)
class Decision:
    """One field of the configuration: what was asked for, what the run uses, and why, for people."""

    field: str
    asked: Any
    used: Any
    why: str
    earlier: bool = False  # when the run began; this is a later start of it

    def __str__(self) -> str:
        asked = "all" if self.asked is None else self.asked
        return f"{self.field.replace('_', ' ')} {self.used} (asked for: {asked})"


def lines(decisions: Iterable[Decision]) -> list[str]:
    """Return decisions for people, those of one reason in one line."""
    by_reason: dict[str, list[str]] = {}
    for decision in decisions:
        why = f"decided when the run began: {decision.why}" if decision.earlier else decision.why
        by_reason.setdefault(why, []).append(str(decision))
    return [f"{', '.join(said)}: {why}" for why, said in by_reason.items()]


def stored(decisions: Iterable[Decision]) -> dict[str, Any]:
    """Return decisions as config.json has them, under ``decided``."""
    entries = {decision.field: asdict(decision) for decision in decisions}
    return {KEY: {field: {name: entry[name] for name in STORED} for field, entry in entries.items()}}


def earlier(run: Path | None, config: Any) -> list[Decision]:
    """Return what the run in a folder decided and ``config`` has still; nothing where there is no run.

    Raises:
        CheckpointError: if its config.json is none.
    """
    if run is None:
        return []
    path = run / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8")).get(KEY, {})
        decisions = [Decision(**value, earlier=True) for value in values.values()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a run's configuration: {error}") from error
    return [decision for decision in decisions if getattr(config, decision.field, None) == decision.used]


def merged(fresh: Iterable[Decision], before: Iterable[Decision]) -> list[Decision]:
    """Return the decisions of both, the fresh one of each field."""
    return list({decision.field: decision for decision in (*before, *fresh)}.values())
