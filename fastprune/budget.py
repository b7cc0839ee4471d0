"""A run that ends in time: how long its steps take, and what it leaves out if they take too long.

The time for a run is ``minutes`` of its configuration. A share of it is for reading data, drawing and whatever slows
the machine down meanwhile.
"""

from __future__ import annotations

import dataclasses
import time
from statistics import fmean
from typing import Any

from . import distributed
from .decisions import Decision
from .recipes import Config
from .runlog import duration
from .trainer import Trainer

__all__ = ["fitted", "seconds_per_step"]

_SHARE = 0.75  # of the minutes, for epochs
_PATIENCE = 0.05  # of the minutes, for timing steps
_WARM_UP, _TIMED = 2, 4  # steps; new masks are due every few of them
_LEAST_EPOCHS = 3  # with fewer the masks hardly change; then images are left out
_LEAST_TESTED = 100  # images; an accuracy of fewer says little
_TESTED = 0.4  # of what it takes to train on an image, it takes to test one


def seconds_per_step(trainer: Trainer) -> float:
    """Take a few training steps, and return how long one takes in the first process.

    Args:
        trainer: at its beginning, with ``minutes`` in its configuration; to be thrown away.
    """
    patience = _PATIENCE * 60 * (trainer.config.minutes or 0)
    seconds: list[float] = []
    started = time.perf_counter()
    for _ in trainer.train_steps(_WARM_UP + _TIMED):
        trainer.scores.read()  # waits for the device
        now = time.perf_counter()
        seconds, started = [*seconds, now - started], now
        if distributed.from_first(len(seconds) > 1 and sum(seconds) > patience):
            break
    return float(distributed.from_first(fmean(seconds[_WARM_UP:] or [min(seconds)])))


def fitted(config: Config, train: int, test: int, seconds: float) -> tuple[Config, list[Decision]]:
    """Return the configuration of a run that ends in time, and what it decided for that.

    Fewer epochs come first; of the fewest, fewer images. At least as many batches of them are left as it takes to make
    new masks, if the run makes any; a run that does not end in time with so few is told so.

    Args:
        config: with ``minutes``.
        train, test: images that it would use.
        seconds: of a step.
    """
    assert config.minutes is not None
    allowed = _SHARE * 60 * config.minutes
    for_image = seconds / min(config.batch_size, train)

    def needed(epochs: int, train: int, test: int) -> float:
        return epochs * for_image * (train + _TESTED * test)

    whole = needed(1, train, test)
    if config.epochs * whole <= allowed:
        return config, []
    epochs = max(int(allowed / whole), min(config.epochs, _LEAST_EPOCHS))
    share = min(1.0, allowed / (epochs * whole))
    changes: dict[str, Any] = {"epochs": epochs}
    if share < 1:
        batches = config.prune_every if config.prunes else 1
        limits = {
            "limit_train": (max(int(share * train), batches * config.batch_size), train),
            "limit_test": (max(int(share * test), _LEAST_TESTED), test),
        }
        changes |= {name: limit for name, (limit, count) in limits.items() if limit < count}
    fewer = dataclasses.replace(config, **changes)
    left = needed(epochs, changes.get("limit_train", train), changes.get("limit_test", test))
    why = (
        f"a step took {seconds:.2g} s: the run asked for would take about {duration(config.epochs * whole)}, "
        f"this one about {duration(left)}, and --minutes is {config.minutes:g} (--minutes None for no limit)"
    )
    if left > 60 * config.minutes:
        why += "; there is no shorter one"
    asked = ((field, getattr(config, field), used) for field, used in changes.items())
    return fewer, [Decision(field, was, used, why) for field, was, used in asked if was != used]
