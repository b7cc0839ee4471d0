"""The learning rate as a function of the step: nothing to save, nothing to resume."""

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "one-cycle", "multistep"]


def learning_rate(schedule: Schedule, step: int, total: int, peak: float, warmup: int) -> float:
    """The learning rate of step ``step`` (0-based) of ``total``.

    After a linear warm-up over the first ``warmup`` steps: ``constant`` stays at ``peak``; ``cosine`` falls to 0 along
    half a cosine; ``one-cycle`` rises to the peak over the first 30 % (or the warm-up, if that is longer) and falls
    linearly to 0; ``multistep`` is divided by 10 at half and at three quarters.

    Raises:
        ValueError: for an unknown schedule.
    """
    if schedule == "one-cycle":
        warmup = max(warmup, round(0.3 * total))
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(total - warmup, 1)
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "one-cycle":
        return peak * (1 - progress)
    if schedule == "multistep":
        return peak * (1.0 if step < total / 2 else 0.1 if step < 3 * total / 4 else 0.01)
    raise ValueError(f"unknown schedule {schedule!r}")
