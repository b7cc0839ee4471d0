"""When masks are renewed, and how the rate of pruning rises until then."""

from __future__ import annotations

from typing import Literal

Ramp = Literal["constant", "linear", "cubic"]


def check_schedule(rate: float, every: int, until: int | None, period: int | None) -> None:
    """Raise ValueError for what is out of range."""
    if not 0 <= rate < 1:
        raise ValueError(f"rate must be in [0, 1), got {rate}")
    for name, value, least in (("every", every, 1), ("until", until, 0), ("steps_per_epoch", period, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def is_due(steps: int, every: int, period: int | None) -> bool:
    """Whether the iteration after ``steps`` finished ones starts with new masks."""
    return ((steps % period if period else steps) + 1) % every == 0


def ramp_length(schedule: Ramp, ramp_steps: int | None, every: int, until: int | None, period: int | None) -> int:
    """The iterations in which the rate rises; an update must follow, or the masks would end short of the rate."""
    if schedule not in ("constant", "linear", "cubic"):
        raise ValueError(f"schedule must be constant, linear or cubic, got {schedule!r}")
    if schedule == "constant":
        return 0
    last = None if until is None else next((i for i in reversed(range(until)) if is_due(i, every, period)), 0)
    ramp = last if ramp_steps is None else ramp_steps
    if ramp is None or ramp < 1:
        raise ValueError(f"schedule {schedule!r} needs ramp_steps of at least 1 (or until), got {ramp}")
    if last is not None and ramp > last:
        raise ValueError(
            f"ramp_steps must be at most {last}, got {ramp}: the last update before until={until} comes after {last} "
            f"iterations, and the rate would not have risen to what it shall be"
        )
    return ramp


def risen(schedule: Ramp, steps: int, ramp_steps: int) -> float:
    """The share of the rate that holds after ``steps`` of ``ramp_steps`` iterations (``t`` of ``T``).

    ``linear``: ``t/T``; ``cubic``: ``1 - (1 - t/T)³``; 1 from ``T`` on, and for ``constant``.

    Source:
        Zhu and Gupta, "To prune, or not to prune", ICLR workshop 2018 (arXiv 2017).
    """
    if schedule == "constant" or steps >= ramp_steps:
        return 1.0
    return 1 - (1 - steps / ramp_steps) ** (3 if schedule == "cubic" else 1)
