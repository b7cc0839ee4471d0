"""``python -m fastprune.train``: train, prune and decorrelate a network, and say what came out."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import checkpoint, data, models, report
from .data import ImageData
from .decorrelation import Decorrelation
from .nn import MaskedConv2d
from .pruner import FilterPruner, Pruner, WeightPruner
from .recipes import Config, parse
from .runlog import Progress, RunLog, duration, write_json
from .schedule import learning_rate

CHECKPOINT = "checkpoint.safetensors"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and what was saved."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Scores:
    """Sums of loss, top-1 and top-5 hits, kept on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss, its ``[B, classes]`` logits and ``[B]`` labels."""
        with torch.no_grad():
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            batch = torch.stack(
                [loss.double() * len(labels), best[:, :1].sum(), best.sum(), loss.new_tensor(len(labels))]
            )
            self.sums += batch

    def read(self) -> dict[str, float]:
        """Mean loss, and top-1 and top-5 in percent."""
        loss, top1, top5, images = self.sums.tolist()
        return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}


class Trainer:
    """One training run: its model, data, optimizer and pruner, and where it stands.

    All randomness is a function of the seed and of the step, and the learning rate one of the step: what a checkpoint has
    to hold is the model, the optimizer's state, the gradient scaler's, and the position.
    """

    def __init__(self, config: Config, images: ImageData) -> None:
        self.config = config
        name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and not torch.cuda.is_available():
            raise TrainingError("--device cuda: torch finds no CUDA device here; use --device cpu")
        self.device = torch.device(name)
        self.images = images.to(self.device)
        self.format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.mean, self.std = (images.mean, images.std) if config.normalize == "data" else ((0.5,) * 3, (0.5,) * 3)
        self.augment = data.Augment(config.pad, config.flip, config.cutout)
        full, rest = divmod(len(images.train_images), config.batch_size)
        # A last batch of one image has no batch variance: it is left out.
        self.steps_per_epoch = full + (rest > 1)
        if self.steps_per_epoch == 0:
            raise TrainingError("one training image is too few to train on")

        torch.manual_seed(config.seed)
        model = models.create(config.model, len(images.classes), config.stem)
        self.model = model.to(self.device, memory_format=self.format)  # type: ignore[call-overload]
        self.pruner = self._make_pruner()
        self.decorrelation = None
        if config.decorrelation != "none":
            self.decorrelation = Decorrelation(
                self.model, config.decorrelation, config.alpha, config.include_diagonal, config.include_pruned
            )
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        self.scaler = torch.amp.GradScaler(name, enabled=config.precision == "fp16")
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.step = 0  # steps finished
        self.scores = Scores(self.device)  # of the epoch so far
        self.penalty = torch.zeros((), dtype=torch.float64, device=self.device)
        self.seconds = 0.0  # spent training in the epoch so far

    def _make_pruner(self) -> Pruner | None:
        config = self.config
        if not config.prunes:
            return None
        common: dict[str, Any] = {
            "rate": config.prune_rate,
            "importance": config.importance,
            "every": config.prune_every,
            "until": round(config.prune_until * config.epochs) * self.steps_per_epoch,
            "feedback": config.feedback,
            "steps_per_epoch": self.steps_per_epoch,
        }
        return (FilterPruner if config.prune_type == "structured" else WeightPruner)(self.model, **common)

    # ------------------------------------------------------------------------------------------------ steps

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step // self.steps_per_epoch

    def generator(self, device: torch.device | str, purpose: int, count: int) -> torch.Generator:
        """A generator seeded by what it is for: (0, epoch) for the order of the data, (1, step) for augmentation."""
        return torch.Generator(device).manual_seed(((self.config.seed * 2 + purpose) << 32) + count)

    def train_steps(self, limit: int) -> Iterator[int]:
        """Train to the end of the epoch or to step ``limit``, yielding after each step the steps finished."""
        epoch, batch_size = self.epoch, self.config.batch_size
        order = torch.randperm(len(self.images.train_labels), generator=self.generator("cpu", 0, epoch)).to(self.device)
        self.model.train()
        for i in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
            if self.step >= limit:
                return
            started = time.perf_counter()
            self.train_step(order[i * batch_size : (i + 1) * batch_size])
            self.seconds += time.perf_counter() - started
            yield self.step

    def train_step(self, indices: Tensor) -> None:
        """One step on the training images ``indices``."""
        images = self.augment(self.images.train_images[indices], self.generator(self.device, 1, self.step))
        labels = self.images.train_labels[indices]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        with self.autocast():
            logits = self.forward(self.normalized(images))
            loss = functional.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
        self.scores.add(loss.detach(), logits.detach(), labels)
        if self.decorrelation is not None:
            penalty = self.decorrelation.penalty()
            self.penalty += penalty.detach()
            loss = loss + self.config.alpha * penalty
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.pruner is not None:
            self.pruner.step()
        self.optimizer.zero_grad(set_to_none=True)

    def learning_rate(self) -> float:
        """That of the next step."""
        config = self.config
        total, warmup = config.epochs * self.steps_per_epoch, round(config.warmup_epochs * self.steps_per_epoch)
        return learning_rate(config.schedule, self.step, total, config.lr, warmup)

    def autocast(self) -> torch.autocast:
        """The compute dtype."""
        precision = self.config.precision
        return torch.autocast(self.device.type, _DTYPES[precision], enabled=precision != "fp32")

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 images as the network takes them."""
        return data.normalize(images, self.mean, self.std, memory_format=self.format)

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        """Scores on the test images."""
        self.model.eval()
        scores = Scores(self.device)
        size = max(self.config.batch_size, 500)
        for images, labels in zip(self.images.test_images.split(size), self.images.test_labels.split(size)):
            with self.autocast():
                logits = self.forward(self.normalized(images))
            scores.add(functional.cross_entropy(logits.float(), labels), logits, labels)
        return scores.read()

    def finish_epoch(self) -> dict[str, Any]:
        """Test, and return the epoch's record; the sums start anew."""
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Conv2d)}
        filters = {name: layer.out_channels for name, layer in layers.items()}
        kept = filters | (self.pruner.kept() if self.pruner is not None else {})
        images = self.steps_per_epoch * self.config.batch_size
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "train": self.scores.read(),
            "test": self.test(),
            "penalty": float(self.penalty) / self.steps_per_epoch,
            "sparsity": self.pruner.sparsity() if self.pruner is not None else 0.0,
            "kept_filters": sum(kept.values()),
            "filters": sum(filters.values()),
            "kept_per_layer": list(kept.values()),
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": min(images, len(self.images.train_labels)) / self.seconds,
            "seconds": self.seconds,
            "layers": list(filters),
            "filters_per_layer": list(filters.values()),
        }
        self.scores.sums.zero_()
        self.penalty.zero_()
        self.seconds = 0.0
        return record

    # ------------------------------------------------------------------------------------------------ state

    def is_finite(self) -> bool:
        """Whether the loss has stayed finite in this epoch. Reads the device."""
        return bool((self.scores.sums[0] + self.penalty).isfinite())

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the configuration and the data."""
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "pruner": self.pruner.state_dict() if self.pruner is not None else None,
            "sums": self.scores.sums,
            "penalty": self.penalty,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            TrainingError: if it is of another model or data set.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if self.pruner is not None:
                self.pruner.load_state_dict(state["pruner"])
            self.scores.sums.copy_(state["sums"])
            self.penalty.copy_(state["penalty"])
            self.step, self.seconds = state["step"], state["seconds"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"the checkpoint is of another configuration: {error}") from error


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM is noted in the list that this gives; a second one ends the program at once."""
    received: list[int] = []

    def handle(signum: int, _: Any) -> None:
        received.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        print(f"\n{signal.Signals(signum).name}: saving after this step (again: stop at once)", file=sys.stderr)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run(config: Config) -> dict[str, Any]:
    """Train as ``config`` says, and return the summary that is also written to ``summary.json``.

    Raises:
        TrainingError: if the run cannot start or go on.
        Interrupted: after a signal, with the checkpoint written.
    """
    images = data.load(config.data, root=config.data_root, image_size=config.image_size, seed=config.seed)
    print(images.source)
    images = images.subset(config.limit_train, config.limit_test)
    trainer = Trainer(config, images)
    path = config.out / CHECKPOINT
    if config.resume is not None:
        trainer.load_state_dict(checkpoint.load(config.resume / CHECKPOINT, str(trainer.device)))
        print(f"resumed from {config.resume} after {trainer.step} steps")
    elif path.exists():
        raise TrainingError(
            f"{config.out} holds a run: continue it with --resume {config.out}, or choose another --out"
        )
    log = RunLog(config.out, describe(config, images, trainer), trainer.epoch)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{config.model}: {parameters:,} parameters, {trainer.steps_per_epoch} steps an epoch, on {trainer.device}")
    with stop_on_signals() as signals:
        train(trainer, log, signals)
    records = log.read()
    if not records:
        print(f"stopped after {trainer.step} steps; continue with --resume {config.out}")
        return {}
    summary = report.summary({**config.to_json(), **described_data(images)}, records)
    write_json(config.out / "summary.json", summary, "a summary")
    plots = report.plot_run(config.out)
    print(report.format_summary(summary))
    print("plots: " + ", ".join(str(plot) for plot in plots))
    return summary


def train(trainer: Trainer, log: RunLog, signals: list[int]) -> None:
    """The epochs of a run, with their log lines and checkpoints."""
    config = trainer.config
    path = log.folder / CHECKPOINT
    total = config.epochs * trainer.steps_per_epoch
    limit = min(total, config.max_steps or total)
    check_every = 1 if trainer.device.type == "cpu" else 50  # reading the loss waits for the device
    progress = Progress(config.epochs, trainer.steps_per_epoch, trainer.step)
    while trainer.step < limit:
        progress.start_epoch(trainer.epoch, trainer.step % trainer.steps_per_epoch)
        try:
            for step in trainer.train_steps(limit):
                check = step % check_every == 0 or step % trainer.steps_per_epoch == 0
                if check and not trainer.is_finite():
                    raise TrainingError(f"the loss is no longer finite at step {step}")
                progress.step(step, trainer.scores.read()["loss"] if check else None)
                if signals:
                    checkpoint.save(path, trainer.state_dict())
                    raise Interrupted(signals[0])
        except RuntimeError as error:
            diverged = isinstance(error, TrainingError) or "NaN or Inf" in str(error)
            if not diverged:
                raise
            saved = f"the last good checkpoint is {path}" if path.exists() else "no checkpoint was written yet"
            raise TrainingError(
                f"{error}; {saved}. A lower --lr, a longer --warmup-epochs or fp32 may help."
            ) from error
        finally:
            progress.end_epoch()
        if trainer.step % trainer.steps_per_epoch == 0:
            record = trainer.finish_epoch()
            log.add(record)
            print(epoch_line(record, config.epochs), flush=True)
            checkpoint.save(path, trainer.state_dict())
            if config.target_accuracy is not None and record["test"]["top1"] >= config.target_accuracy:
                print(f"reached {config.target_accuracy:g} % after {duration(sum(r['seconds'] for r in log.read()))}")
                return
        else:
            checkpoint.save(path, trainer.state_dict())


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


def described_data(images: ImageData) -> dict[str, Any]:
    """What the data turned out to be."""
    return {
        "data": images.name,
        "data_source": images.source,
        "train_images": len(images.train_labels),
        "test_images": len(images.test_labels),
    }


def describe(config: Config, images: ImageData, trainer: Trainer) -> dict[str, Any]:
    """``config.json``: what was asked for, under ``config``, and what it came to."""
    masked = any(isinstance(module, MaskedConv2d) for module in trainer.model.modules())
    return {
        **config.to_json(),
        **described_data(images),
        "device": str(trainer.device),
        "decorrelation": None if config.decorrelation == "none" else config.decorrelation,
        "prune_rate": config.prune_rate if masked else 0.0,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": config.to_json(),
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 0, 1 for a run that failed, or 128 + the signal that stopped it."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        run(config)
    except Interrupted as stop:
        print(f"{stop}; continue with --resume {config.out}", file=sys.stderr)
        return 128 + stop.signum
    except (TrainingError, data.DataError, checkpoint.CheckpointError, OSError) as error:
        print(f"fastprune.train: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
