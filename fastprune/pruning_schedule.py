"""When masks are updated, and how the rate of pruning rises until then."""

from __future__ import annotations

from typing import Any, Literal

from . import arguments

Ramp = Literal["constant", "linear", "cubic"]


def check_schedule(rate: Any, every: Any, until: Any, period: Any) -> tuple[float, int, int | None, int | None]:
    """Return the arguments as plain numbers.

    Raises:
        TypeError, ValueError: naming the first that is not as it must be.
    """
    return (
        arguments.rate("rate", rate),
        arguments.whole_number("every", every, 1),
        None if until is None else arguments.whole_number("until", until, 0),
        None if period is None else arguments.whole_number("steps_per_epoch", period, 1),
    )


def is_due(steps: int, every: int, period: int | None) -> bool:
    """Whether the iteration after ``steps`` finished ones starts with new masks."""
    return ((steps % period if period else steps) + 1) % every == 0


def next_due(steps: int, every: int, until: int | None, period: int | None) -> int | None:
    """After how many finished iterations, at least ``steps``, masks are updated next; None for never."""
    first = steps - steps % period if period else 0  # of the epoch
    due = first + -(-(steps - first + 1) // every) * every - 1
    if period and due >= first + period:
        due = first + period + every - 1
        if every > period:
            return None
    return None if until is not None and due >= until else due


def why_never(every: int, until: int | None, period: int | None) -> str:
    """Why no update comes before the schedule ends; empty if one does."""
    if next_due(0, every, until, period) is not None:
        return ""
    if period is not None and period < every:
        return f"every={every} counts from the start of each epoch, and an epoch has {period} iterations"
    return f"until={until} ends the schedule before the first update, which every={every} asks for"


def ramp_length(schedule: Ramp, ramp_steps: int | None, every: int, until: int | None, period: int | None) -> int:
    """The iterations in which the rate rises; an update must follow, or the masks would end short of the rate."""
    if schedule not in ("constant", "linear", "cubic"):
        raise ValueError(f"schedule must be constant, linear or cubic, got {schedule!r}")
    if ramp_steps is not None:
        ramp_steps = arguments.whole_number("ramp_steps", ramp_steps, 0)
    if schedule == "constant":
        if ramp_steps:
            raise ValueError(f"ramp_steps={ramp_steps} is for a rate that rises: set schedule to linear or cubic")
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
