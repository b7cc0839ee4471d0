"""Who evaluates encodings: this process, one after the other, or several at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from .encoding import Encoding
from .fitness import Fitness, Score
from .training import PruningTrainer


class Evaluator(Protocol):
    """Evaluates encodings.

    Attributes:
        batch_size: images at a time, which memory may have halved; may be set.
    """

    batch_size: int

    def __call__(self, encodings: Sequence[Encoding]) -> Iterator[tuple[Encoding, Score]]:
        """Give each encoding's score once, in any order."""
        ...


class InThisProcess:
    """One after the other."""

    def __init__(self, fitness: Fitness) -> None:
        self.fitness = fitness

    @property
    def batch_size(self) -> int:
        """Images at a time."""
        return self.fitness.batch_size

    @batch_size.setter
    def batch_size(self, size: int) -> None:
        self.fitness.batch_size = size

    def __call__(self, encodings: Sequence[Encoding]) -> Iterator[tuple[Encoding, Score]]:
        """Give each encoding's score, in order."""
        for encoding in encodings:
            yield encoding, self.fitness(encoding)


@contextmanager
def evaluator(trainer: PruningTrainer) -> Iterator[Evaluator]:
    """What the configuration asks for: this process, or Ray's workers, which go when this ends."""
    if trainer.config.workers == 0:
        yield InThisProcess(trainer.fitness())
        return
    from .parallel import ray_evaluator

    with ray_evaluator(trainer) as evaluate:
        yield evaluate
