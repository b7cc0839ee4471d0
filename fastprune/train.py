"""``python -m fastprune.train``: train, prune and decorrelate a network, and say what came out."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, data, plots, report
from .data import ImageData
from .recipes import Config, parse
from .runlog import Progress, RunLog, duration, write_json
from .trainer import Trainer, TrainingError

CHECKPOINT = "checkpoint.safetensors"


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 0, 1 for a run that failed, or 128 + the signal that stopped it."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        run(config)
    except Interrupted as stop:
        print(f"{stop}; continue with --resume {config.out}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("stopped before training began", file=sys.stderr)
        return 128 + signal.SIGINT
    except (TrainingError, data.DataError, checkpoint.CheckpointError, OSError) as error:
        print(f"fastprune.train: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(config: Config) -> dict[str, Any]:
    """Train as ``config`` says, and return the summary that is also written to ``summary.json``.

    A run that ``max_steps`` stops before its first epoch is finished has no summary yet: ``{}``.

    Raises:
        TrainingError: if the run cannot start or go on.
        Interrupted: after a signal, with the checkpoint written.
        DataError, CheckpointError, OSError: for files that cannot be used.
    """
    continued = config.resume is not None and config.resume.resolve() == config.out.resolve()
    if not continued and (config.out / CHECKPOINT).exists():
        raise TrainingError(
            f"{config.out} holds a run: continue it with --resume {config.out}, or choose another --out"
        )
    images = data.load(config.data, root=config.data_root, image_size=config.image_size, seed=config.seed)
    images = images.subset(config.limit_train, config.limit_test)
    print(images.source)
    trainer = Trainer(config, images)
    described = describe(config, images, trainer.device)
    log = RunLog(config.out, described, resume(trainer, config.resume) if config.resume is not None else [])
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{config.model}: {parameters:,} parameters, {trainer.steps_per_epoch} steps an epoch, on {trainer.device}")
    with stop_on_signals() as signals:
        train(trainer, log, signals)
    if trainer.step < config.epochs * trainer.steps_per_epoch:
        print(f"stopped after {trainer.step} steps; continue with --resume {config.out}")
    if not log.records:
        return {}
    summary = report.summary(described, log.records)
    write_json(config.out / "summary.json", summary, "a summary")
    pictures = plots.plot_run(config.out)
    print(report.format_summary(summary))
    print("plots: " + ", ".join(str(picture) for picture in pictures))
    return summary


def describe(config: Config, images: ImageData, device: torch.device) -> dict[str, Any]:
    """``config.json``: what was asked for, under ``config``, and what it came to."""
    return {
        **config.to_json(),
        "decorrelation": None if config.decorrelation == "none" else config.decorrelation,
        "prune_rate": config.prune_rate if config.prunes else 0.0,
        "data": images.name,
        "data_source": images.source,
        "train_images": len(images.train_labels),
        "test_images": len(images.test_labels),
        "device": str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": config.to_json(),
    }


def resume(trainer: Trainer, run: Path) -> list[dict[str, Any]]:
    """Put ``trainer`` where the run in folder ``run`` stopped, and return the records of its finished epochs."""
    trainer.load_state_dict(checkpoint.load(run / CHECKPOINT, str(trainer.device)))
    print(f"resumed from {run} after {trainer.step} steps")
    if trainer.epoch == 0:
        return []
    try:
        # Epochs after the checkpoint are done again.
        return [record for record in report.read_metrics(run) if record["epoch"] <= trainer.epoch]
    except ValueError as error:
        raise TrainingError(f"the metrics of the run to resume cannot be read: {error}") from error


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM is noted in the list that this gives; a second one ends the program at once."""
    received: list[int] = []

    def handle(signum: int, _: Any) -> None:
        received.append(signum)
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        print(f"\n{signal.Signals(signum).name}: saving after this step (again: stop at once)", file=sys.stderr)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, handle)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(trainer: Trainer, log: RunLog, signals: list[int]) -> None:
    """The epochs of a run, with their log lines and checkpoints, until its last step, its target or a signal."""
    config = trainer.config
    path = log.folder / CHECKPOINT
    total = config.epochs * trainer.steps_per_epoch
    limit = min(total, config.max_steps or total)
    progress = Progress(config.epochs, trainer.steps_per_epoch, trainer.step, limit)
    reached = False
    while trainer.step < limit and not reached:
        try:
            train_epoch(trainer, progress, limit, signals)
            if trainer.step % trainer.steps_per_epoch == 0:
                record = trainer.finish_epoch()
                trainer.check_state()
                log.add(record)
                print(epoch_line(record, config.epochs), flush=True)
                reached = config.target_accuracy is not None and record["test"]["top1"] >= config.target_accuracy
            else:
                trainer.check_state()
        except TrainingError as error:
            saved = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
            advice = "A lower --lr, a longer --warmup-epochs or --precision fp32 may help."
            raise TrainingError(f"{error}; {saved}. {advice}") from error
        checkpoint.save(path, trainer.state_dict())
        if signals and trainer.step < limit and not reached:
            raise Interrupted(signals[0])
    if reached:
        seconds = sum(record["seconds"] for record in log.records)
        print(f"reached {config.target_accuracy:g} % after {duration(seconds)} of training")


def train_epoch(trainer: Trainer, progress: Progress, limit: int, signals: list[int]) -> None:
    """Train to the end of the epoch, to step ``limit`` or to the step in which a signal came.

    Raises:
        TrainingError: when the loss or a weight is no longer finite.
    """
    check_every = 1 if trainer.device.type == "cpu" else 50  # reading the loss waits for the device
    progress.start_epoch(trainer.epoch, trainer.step % trainer.steps_per_epoch)
    try:
        for step in trainer.train_steps(limit):
            check = step % check_every == 0 or step % trainer.steps_per_epoch == 0
            if check:
                trainer.check_loss()
            progress.step(step, trainer.scores.read()["loss"] if check else None)
            if signals:
                return
    except RuntimeError as error:
        if "NaN or Inf" in str(error):  # said by the pruner, whose masks read the weights before the next loss does
            raise TrainingError(str(error)) from error
        raise
    finally:
        progress.end_epoch()


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """An epoch's record for people."""
    train, test = record["train"], record["test"]
    return (
        f"epoch {record['epoch']}/{epochs}  "
        f"train loss {train['loss']:.3f} top-1 {train['top1']:.2f} top-5 {train['top5']:.2f}  "
        f"test loss {test['loss']:.3f} top-1 {test['top1']:.2f} top-5 {test['top5']:.2f}  "
        f"sparsity {record['sparsity']:.2f} %  kept {record['kept_filters']}/{record['filters']}  "
        f"penalty {record['penalty']:.3f}  lr {record['lr']:.4f}  {record['images_per_s']:.0f} images/s"
    )


if __name__ == "__main__":
    sys.exit(main())
