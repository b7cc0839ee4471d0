"""``python -m fastprune.train``: train, prune and decorrelate a network, and say what came out.

Several processes: ``torchrun --standalone --nproc-per-node 2 -m fastprune.train ...``.
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import budget, checkpoint, data, decisions, distributed, network, network_file, plots, report
from .checkpoint import write_atomically
from .data import ImageData
from .decisions import Decision
from .memory import is_out_of_memory, shortage
from .outcome import format_small, small_figures
from .recipes import Config, parse, read_config
from .run_lock import held
from .runlog import Progress, RunLog, duration, write_json
from .trainer import Trainer, TrainingError

CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
COMPACTION = "compaction.txt"


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 0, 1 for a run that failed, or 128 + the signal that stopped it."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        with distributed.joined(config.device):
            return _run_and_tell(config)
    except distributed.LaunchError as error:
        print(f"fastprune.train: error: {error}", file=sys.stderr)
        return 1
    except distributed.LostError as error:
        print(f"fastprune.train: error: {error}. {_how_to_go_on(config)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = "A smaller --batch-size, or --accumulate, takes less"
        print(f"fastprune.train: error: {shortage(error)}. {advice}. {_how_to_go_on(config)}", file=sys.stderr)
        return 1


def _how_to_go_on(config: Config) -> str:
    """What is left of a run that ended in the middle of a step."""
    if not checkpoint.latest(config.out / CHECKPOINT).exists():
        return "No checkpoint was written yet"
    return f"The last checkpoint is whole: continue with --resume {config.out}"


def _run_and_tell(config: Config) -> int:
    try:
        run(config)
    except Interrupted as stop:
        if distributed.is_first():
            print(f"{stop}; continue with --resume {config.out}", file=sys.stderr)
        distributed.largest(0)  # torchrun ends all when one goes: none goes before the first has told
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("stopped before training began", file=sys.stderr)
        return 128 + signal.SIGINT
    except distributed.PeerError:
        return 1
    except distributed.MismatchError as error:
        if distributed.is_first():
            print(f"fastprune.train: error: {error}", file=sys.stderr)
        return 1
    except (TrainingError, data.DataError, checkpoint.CheckpointError, OSError) as error:
        print(f"fastprune.train: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(config: Config) -> dict[str, Any]:
    """Train as ``config`` says, and return the summary that is also written to ``summary.json``.

    A run that ``max_steps`` stops before its first epoch is finished has no summary yet: ``{}``.

    Raises:
        TrainingError: if the run cannot start or go on.
        PeerError: where that, or one of the following, is told by another process.
        MismatchError: if the processes do not have the same settings, data or masks.
        Interrupted: after a signal, with the checkpoint written.
        DataError, CheckpointError, OSError: for files that cannot be used.
    """
    with distributed.first_prints(), held(config.out):
        whole = load_data(config)
        try:
            trainer, decided = prepare(config, whole)
        except TrainingError as error:
            raise distributed.agreed(error) from error
        del whole  # the trainer has what it uses of it
        print(trainer.images.source)
        config = trainer.config
        described = describe(trainer) | decisions.stored(decided)
        with distributed.together():
            records = resume(trainer, config.resume) if config.resume is not None else []
            log = RunLog(config.out, described, records)
        where = f"{trainer.device}" if distributed.size() == 1 else f"{distributed.size()} processes"
        print(
            f"{config.model}: {trainer.parameters():,} parameters, {trainer.steps_per_epoch} steps an epoch, "
            f"on {where}, in {config.precision}"
        )
        for line in (*decisions.lines(decided), network.never_pruned(trainer.pruner)):
            if line:
                print(line)
        with stop_on_signals() as signals:
            train(trainer, log, signals)
        if trainer.step < config.epochs * trainer.steps_per_epoch:
            print(f"stopped after {trainer.step} steps; continue with --resume {config.out}")
        return finish(trainer, described, log)


def load_data(config: Config) -> ImageData:
    """The images that a run is to use, all or some, in each process; one on each machine downloads them."""
    with distributed.together():
        continued = config.resume is not None and config.resume.resolve() == config.out.resolve()
        if not continued and checkpoint.latest(config.out / CHECKPOINT).exists():
            raise TrainingError(
                f"{config.out} holds a run: continue it with --resume {config.out}, or choose another --out"
            )
    with distributed.together(), distributed.first_on_each_machine():
        images = data.load(config.data, root=config.data_root, image_size=config.image_size, seed=config.seed)
    settings = {name: json.dumps(value).encode() for name, value in config.to_json().items()}
    distributed.verify_same(settings, "the settings are not the same:")
    labels = {"training": images.train_labels, "test": images.test_labels}
    contents = {f"{name} labels": tensor.numpy().tobytes() for name, tensor in labels.items()}
    means = json.dumps([images.classes, images.mean, images.std]).encode()
    distributed.verify_same({**contents, "classes and pixels": means}, "the data is not the same:")
    return images


def prepare(config: Config, whole: ImageData) -> tuple[Trainer, list[Decision]]:
    """Return the trainer of a run, and what was decided for it, now or when the run that goes on began.

    The steps that are taken to see how long they take are another trainer's, so that they leave nothing behind.

    Raises:
        TrainingError: if the run cannot start.
    """
    if config.resume is not None:
        with distributed.together():
            before = decisions.earlier(config.resume, config)
            _check_minutes(config, config.resume)
        trainer = Trainer(config, whole.subset(config.limit_train, config.limit_test))
        return trainer, decisions.merged(trainer.decided, before)
    images = whole.subset(config.limit_train, config.limit_test)
    trainer = Trainer(config, images)
    decided = trainer.decided
    if config.minutes is None:
        return trainer, decided
    with divergence_told():
        seconds = budget.seconds_per_step(trainer)
    fewer, left_out = budget.fitted(trainer.config, len(images.train_labels), len(images.test_labels), seconds)
    del trainer
    return Trainer(fewer, whole.subset(fewer.limit_train, fewer.limit_test)), [*decided, *left_out]


def _check_minutes(config: Config, run: Path) -> None:
    minutes = read_config(run).minutes
    if config.minutes not in (minutes, None):
        raise TrainingError(
            f"--minutes {config.minutes:g} is for a fresh run: the one in {run} keeps the length that it has; leave "
            f"--minutes out, or name --epochs"
        )


def finish(trainer: Trainer, described: dict[str, Any], log: RunLog) -> dict[str, Any]:
    """Sum up the epochs of a run, save its network without what is pruned, and draw them; all in its folder."""
    if not log.records:
        return {}
    summary = report.summary(described, log.records)
    small = None
    if trainer.step % trainer.steps_per_epoch == 0:  # else the last test was of another state
        small = trainer.small()
        summary["small"] = small_figures(trainer, small, log.records)
    with distributed.together():
        if distributed.is_first():
            _write_end(trainer, described, summary, small, log.folder)
    return summary


def _write_end(
    trainer: Trainer, described: dict[str, Any], summary: dict[str, Any], small: nn.Module | None, folder: Path
) -> None:
    if small is not None:
        compacted = trainer.network.compacted
        # A small network of a checkpoint that an earlier version wrote has no report.
        changes = str(getattr(small, "report", "")) if compacted is None else compacted.get("report", "")
        write_atomically(folder / COMPACTION, [f"{changes}\n".encode()], what="the report of the compaction")
        info = {name: described[name] for name in ("model", "data", "classes", "mean", "std")}
        network_file.save(small, folder / MODEL, trainer.example_input(), info)
    write_json(folder / "summary.json", summary, "a summary")
    pictures = plots.plot_run(folder)
    print(report.format_summary(summary))
    if small is not None:
        print(format_small(summary["small"], MODEL))
        print(f"  layer by layer: {folder / COMPACTION}; all as a page: python -m fastprune.report {folder}")
    print("plots: " + ", ".join(str(picture) for picture in pictures))


def describe(trainer: Trainer) -> dict[str, Any]:
    """``config.json``: what was asked for, under ``config``, and what it came to."""
    config, images = trainer.config, trainer.images
    return {
        **config.to_json(),
        "decorrelation": None if config.decorrelation == "none" else config.decorrelation,
        "prune_rate": config.prune_rate if config.prunes else 0.0,
        "data": images.name,
        "data_source": images.source,
        "train_images": len(images.train_labels),
        "test_images": len(images.test_labels),
        "classes": list(images.classes),
        "mean": list(trainer.mean),
        "std": list(trainer.std),
        "device": str(trainer.device),
        "processes": distributed.size(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": config.to_json(),
    }


def resume(trainer: Trainer, run: Path) -> list[dict[str, Any]]:
    """Put ``trainer`` where the run in folder ``run`` stopped, and return the records of its finished epochs."""
    trainer.load_state_dict(checkpoint.load(checkpoint.latest(run / CHECKPOINT), str(trainer.device)))
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
    """The first SIGINT or SIGTERM is noted in the list that this gives; a second one ends the process at once."""
    received: list[int] = []

    def handle(signum: int, _: Any) -> None:
        received.append(signum)
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        if distributed.is_first():
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
        before = trainer.parameters()
        if trainer.compact_if_frozen():
            print(f"the masks stay: {trainer.parameters():,} of {before:,} parameters are trained on")
        try:
            train_epoch(trainer, progress, limit, signals)
            trainer.network.settle()
            ended = trainer.step % trainer.steps_per_epoch == 0
            record = trainer.finish_epoch() if ended else None
            trainer.check_state()
        except TrainingError as error:
            saved = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
            advice = "A lower --lr, a longer --warmup-epochs or --precision fp32 may help."
            raise distributed.agreed(TrainingError(f"{error}; {saved}. {advice}")) from error
        state = trainer.state_dict()
        with distributed.together():
            if record is not None:
                log.add(record)
                print(epoch_line(record, config.epochs), flush=True)
                reached = config.target_accuracy is not None and record["test"]["top1"] >= config.target_accuracy
            if distributed.is_first():
                checkpoint.save(path, state)
        signum = asked_to_stop(signals)
        if signum and trainer.step < limit and not reached:
            raise Interrupted(signum)
    if reached:
        seconds = sum(record["seconds"] for record in log.records)
        print(f"reached {config.target_accuracy:g} % after {duration(seconds)} of training")


def asked_to_stop(signals: list[int]) -> int:
    """A signal that any of the processes has received, or 0: they stop after the same step."""
    return distributed.largest(signals[0] if signals else 0)


def train_epoch(trainer: Trainer, progress: Progress, limit: int, signals: list[int]) -> None:
    """Train to the end of the epoch, to step ``limit`` or to the step in which a signal came.

    Raises:
        TrainingError: when the loss or a weight is no longer finite.
    """
    check_every = 1 if trainer.device.type == "cpu" else 50  # reading the loss waits for the device
    progress.start_epoch(trainer.epoch, trainer.step % trainer.steps_per_epoch)
    try:
        with divergence_told():
            for step in trainer.train_steps(limit):
                check = step % check_every == 0 or step % trainer.steps_per_epoch == 0
                progress.step(step, trainer.check_loss() if check else None)
                if asked_to_stop(signals):
                    return
    finally:
        progress.end_epoch()


@contextmanager
def divergence_told() -> Iterator[None]:
    """What the pruner says of weights that are no longer finite, which it sees before the next loss, as its own error.

    Raises:
        TrainingError: instead of it.
    """
    try:
        yield
    except RuntimeError as error:
        if "NaN or Inf" in str(error):
            raise TrainingError(str(error)) from error
        raise


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
