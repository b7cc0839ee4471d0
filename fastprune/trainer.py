"""One training run: its model, data, optimizer and pruner, step by step."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import data, models
from .data import ImageData
from .decorrelation import Decorrelation
from .optim import PrunedSGD
from .pruner import FilterPruner, Pruner, WeightPruner
from .recipes import Config
from .schedule import learning_rate

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and what was saved."""


class Scores:
    """Sums of loss, top-1 and top-5 hits, kept on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, images

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss, its ``[B, classes]`` logits and ``[B]`` labels."""
        with torch.no_grad():
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            batch = torch.stack(
                [loss.double() * len(labels), best[:, :1].sum(), best.sum(), loss.new_full((), len(labels))]
            )
            self.sums += batch

    def read(self) -> dict[str, float]:
        """Mean loss, and top-1 and top-5 in percent."""
        loss, top1, top5, images = self.sums.tolist()
        return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}


class Trainer:
    """One training run: its model, data, optimizer and pruner, and where it stands.

    All randomness is a function of the seed and of the step, and the learning rate one of the step: what a checkpoint
    has to hold is the model, the optimizer's state, the gradient scaler's, and the position.
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
        try:
            model = models.create(config.model, len(images.classes), config.stem)
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.model = model.to(self.device, memory_format=self.format)  # type: ignore[call-overload]
        self.pruner = self._make_pruner()
        self.decorrelation = None
        if config.decorrelation != "none":
            self.decorrelation = Decorrelation(
                self.model, config.decorrelation, config.alpha, config.include_diagonal, config.include_pruned
            )
        filters = self.pruner if isinstance(self.pruner, FilterPruner) else None
        self.optimizer = PrunedSGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            pruner=filters,
            # Nothing here writes weights through .data. A compiled forward masks them itself.
            masked_dtype=_DTYPES[config.precision] if filters and not config.compile else None,
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
            with self._timed():
                self.train_step(order[i * batch_size : (i + 1) * batch_size])
            yield self.step

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started

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
        """Test, and return the epoch's record; the sums start anew.

        Raises:
            TrainingError: if the test loss is not finite.
        """
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, nn.Conv2d)}
        filters = {name: layer.out_channels for name, layer in layers.items()}
        kept = filters | (self.pruner.kept() if self.pruner is not None else {})
        images = self.steps_per_epoch * self.config.batch_size
        test = self.test()
        if not math.isfinite(test["loss"]):
            raise TrainingError(f"the test loss is not finite after epoch {self.epoch}")
        record = {
            "epoch": self.epoch,
            "step": self.step,
            "train": self.scores.read(),
            "test": test,
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

    def check_loss(self) -> None:
        """Make sure that the loss has stayed finite in this epoch. Waits for the device, which counts as training.

        Raises:
            TrainingError: if it has not.
        """
        with self._timed():
            finite = bool((self.scores.sums[0] + self.penalty).isfinite())
        if not finite:
            raise TrainingError(f"the loss is no longer finite at step {self.step}")

    def check_state(self) -> None:
        """Make sure that what a checkpoint would hold is finite: the loss shows a step's damage only in the next one.

        Raises:
            TrainingError: naming a tensor that is not.
        """
        momenta = {
            name: self.optimizer.state[parameter].get("momentum_buffer")
            for name, parameter in self.model.named_parameters()
        }
        named = [*self.model.state_dict().items(), *((f"momentum of {name}", m) for name, m in momenta.items())]
        floats = [(name, tensor) for name, tensor in named if tensor is not None and tensor.is_floating_point()]
        finite = torch.stack([tensor.isfinite().all() for _, tensor in floats]).tolist()
        if not all(finite):
            raise TrainingError(f"{floats[finite.index(False)][0]} is no longer finite at step {self.step}")

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the configuration and the data."""
        return {
            "step": self.step,
            "train_images": len(self.images.train_labels),
            "batch_size": self.config.batch_size,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "pruner": self.pruner.state_dict() if self.pruner is not None else None,
            "sums": self.scores.sums,
            "penalty": self.penalty,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the optimizer's settings are those of this run's configuration.

        Raises:
            TrainingError: if it is of another model, or of data or batches of another size.
        """
        try:
            for name, here in (("train_images", len(self.images.train_labels)), ("batch_size", self.config.batch_size)):
                if state[name] != here:
                    raise ValueError(f"{name} was {state[name]} and is {here}, so its place in the data is unknown")
            self.model.load_state_dict(state["model"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            if self.pruner is not None:
                self.pruner.load_state_dict(state["pruner"])
            self.scores.sums.copy_(state["sums"])
            self.penalty.copy_(state["penalty"])
            self.step, self.seconds = state["step"], state["seconds"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            message = f"the checkpoint is of another configuration or data set: {error}"
            raise TrainingError(message) from error
