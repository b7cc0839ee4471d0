"""The first stage: a PruningNet is trained, or the one that was trained is loaded."""

from __future__ import annotations

from pathlib import Path

from .. import checkpoint
from ..runlog import Progress, write_json
from ..train import Interrupted
from .summary import epoch_line
from .training import PruningTrainer


class SearchError(RuntimeError):
    """The search cannot go on; the message says why, and what to do."""


def checkpoint_of(run: Path) -> Path:
    """Where a search keeps its PruningNet."""
    return run / "pruning_net" / "checkpoint.safetensors"


def stopped_early(trainer: PruningTrainer) -> bool:
    """Whether ``max_steps`` ended the training of the PruningNet."""
    return trainer.config.max_steps is not None and 0 < trainer.step < trainer.total


def train_pruning_net(trainer: PruningTrainer, signals: list[int]) -> None:
    """Train to the end, from the checkpoint if there is one, writing one after every epoch.

    Raises:
        Interrupted: after a signal.
        TrainingError: if the loss is no longer finite.
    """
    config, path = trainer.config, checkpoint_of(trainer.config.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if checkpoint.latest(path).exists():
        trainer.load_state_dict(checkpoint.load(checkpoint.latest(path), str(trainer.device)))
        print(f"PruningNet: going on after {trainer.step} of {trainer.total} steps")
    limit = min(config.max_steps or trainer.total, trainer.total)
    progress = Progress(config.epochs, trainer.steps_per_epoch, trainer.step, limit)
    while trainer.step < limit:
        _train_epoch(trainer, progress, limit, signals)
        if trainer.step % trainer.steps_per_epoch == 0:
            print(epoch_line(trainer.finish_epoch(), config.epochs), flush=True)
            write_json(path.parent / "metrics.json", trainer.records, "metrics")
        checkpoint.save(path, trainer.state_dict())
        if signals:
            raise Interrupted(signals[0])


def _train_epoch(trainer: PruningTrainer, progress: Progress, limit: int, signals: list[int]) -> None:
    """Train to the end of the epoch, to step ``limit`` or to the step in which a signal came."""
    check_every = 1 if trainer.device.type == "cpu" else 50  # reading the loss waits for the device
    progress.start_epoch(trainer.epoch, trainer.step % trainer.steps_per_epoch)
    try:
        for step in trainer.train_steps(limit):
            check = step % check_every == 0 or step % trainer.steps_per_epoch == 0
            progress.step(step, trainer.check_loss() if check else None)
            if signals:
                return
    finally:
        progress.end_epoch()


def load_pruning_net(trainer: PruningTrainer) -> None:
    """Load the PruningNet where it was not just trained.

    Raises:
        SearchError: if its training is not finished.
    """
    run = trainer.config.pruning_net or trainer.config.out
    if trainer.step == trainer.total:
        return
    path = checkpoint.latest(checkpoint_of(run))
    if not path.exists():
        raise SearchError(f"{run} has no PruningNet yet: train it with --stage train (or all)")
    trainer.load_state_dict(checkpoint.load(path, str(trainer.device)))
    if trainer.step < trainer.total:
        raise SearchError(
            f"the PruningNet of {run} has done {trainer.step} of {trainer.total} steps: "
            f"finish it with --resume {run} --stage train"
        )
