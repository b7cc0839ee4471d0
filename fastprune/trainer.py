"""One training run: its model, data, optimizer and pruner, step by step."""

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from . import compaction, data, distributed, network, precision
from .compact import compact
from .data import ImageData
from .decisions import Decision
from .memory import is_out_of_memory
from .network import Network
from .recipes import Config
from .schedule import learning_rate
from .scores import Scores


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and what was saved."""


class Trainer:
    """One training run: its model, data, optimizer and pruner, and where it stands.

    All randomness is a function of the seed and of the step, and the learning rate one of the step: what a checkpoint
    has to hold is the model, the optimizer's state, the gradient scaler's, and the position.

    Where there are several processes, each has its share of every batch, and all have the same weights and masks.

    Attributes:
        config: of the run, with the precision that ``auto`` came to.
        decided: what the configuration left open.
    """

    def __init__(self, config: Config, images: ImageData) -> None:
        try:
            self.device = network.choose_device(config)
            model = network.make_model(config, len(images.classes), self.device)
            self.config, self.decided = _with_precision(config, model, images)
            config = self.config
        except ValueError as error:
            raise TrainingError(str(error)) from error
        self.images = images.to(self.device)
        self.format = network.memory_format(config)
        self.mean, self.std = (images.mean, images.std) if config.normalize == "data" else ((0.5,) * 3, (0.5,) * 3)
        self.augment = data.Augment(config.pad, config.flip, config.cutout)
        self.steps_per_epoch = self._count_steps(len(images.train_labels))
        self._use(Network(config, model, network.make_pruner(config, model, self.steps_per_epoch)))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.step = 0  # steps finished
        self.scores = Scores(self.device)  # of the epoch so far
        self.penalty = torch.zeros((), dtype=torch.float64, device=self.device)
        self.seconds = 0.0  # spent training in the epoch so far

    def _use(self, trained: Network) -> None:
        """Train this from now on."""
        self.network = trained
        self.model, self.pruner, self.decorrelation = trained.model, trained.pruner, trained.decorrelation
        self.optimizer = trained.optimizer

    def _count_steps(self, images: int) -> int:
        """Steps of an epoch.

        A last batch is left out where batch norm would see a single image of it, which has no batch variance, or a
        process none at all.
        """
        parts, batch_size, size = self.config.accumulate, self.config.batch_size, distributed.size()
        if batch_size < parts * size:
            raise TrainingError(
                f"--batch-size {batch_size}, of all processes together, is too small for {size} of them "
                f"with --accumulate {parts}"
            )
        full, rest = divmod(images, batch_size)
        least = parts * (max(2, size) if self.config.sync_batchnorm else 2 * size)
        if full == 0 and rest < least:
            number = "one training image is" if images == 1 else f"{images} training images are"
            raise TrainingError(f"{number} too few to train on")
        return full + (rest >= least)

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
        """One step on the training images ``indices``: on this process's share, in ``accumulate`` parts."""
        # All are augmented, which is cheap, so that each comes out as it does in a lone process.
        images = self.augment(self.images.train_images[indices], self.generator(self.device, 1, self.step))
        labels = self.images.train_labels[indices]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        parts = self.config.accumulate
        for i, (some_images, some_labels) in enumerate(zip(images.tensor_split(parts), labels.tensor_split(parts))):
            last = i == parts - 1
            with nullcontext() if last else self._gradients_kept():
                loss = self._share_of_loss(some_images, some_labels, len(indices))
                if last and self.decorrelation is not None:  # of the weights: once, and the same in every process
                    penalty = self.decorrelation.penalty()
                    self.penalty += penalty.detach()
                    loss = loss + self.config.alpha * penalty
                self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.pruner is not None and self.pruner.step():
            distributed.verify_masks(self.pruner)
        self.optimizer.zero_grad(set_to_none=True)

    def _share_of_loss(self, images: Tensor, labels: Tensor, batch: int) -> Tensor:
        """The loss on this process's share of some images, so that the mean over the processes adds up to the batch's.

        That mean is what becomes of the gradients.
        """
        images, labels = (_share(tensor) for tensor in (images, labels))
        with self.autocast():
            logits = self.network.forward(self.normalized(images))
            loss = functional.cross_entropy(_wide(logits), labels, label_smoothing=self.config.label_smoothing)
        self.scores.add(loss.detach(), logits.detach(), labels)
        return loss * (len(labels) * distributed.size() / batch)

    def _gradients_kept(self) -> AbstractContextManager[None]:
        """While this lasts, gradients stay in each process, to be exchanged with those that follow."""
        forward = self.network.forward
        return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()

    def learning_rate(self) -> float:
        """That of the next step."""
        config = self.config
        total, warmup = config.epochs * self.steps_per_epoch, round(config.warmup_epochs * self.steps_per_epoch)
        return learning_rate(config.schedule, self.step, total, config.lr, warmup)

    def autocast(self) -> torch.autocast:
        """The compute dtype."""
        dtype = precision.DTYPES[self.config.precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 images as the network takes them."""
        return data.normalize(images, self.mean, self.std, memory_format=self.format)

    @torch.no_grad()
    def test(self, model: nn.Module | None = None) -> dict[str, float]:
        """Scores on the test images, of which each process takes its share; of another model, if one is given."""
        (model or self.model).eval()
        forward = model or self.network.test_forward
        scores = Scores(self.device)
        size = max(self.config.batch_size, 500)
        shares = (_share(tensor) for tensor in (self.images.test_images, self.images.test_labels))
        for images, labels in zip(*(share.split(size) for share in shares)):
            if len(labels) == 0:  # fewer images than processes
                continue
            with self.autocast():
                logits = forward(self.normalized(images))
            scores.add(functional.cross_entropy(_wide(logits), labels), logits, labels)
        return scores.read()

    def finish_epoch(self) -> dict[str, Any]:
        """Test, and return the epoch's record; the sums start anew.

        Raises:
            TrainingError: if the test loss is not finite.
        """
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
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": min(images, len(self.images.train_labels)) / self.seconds,
            "seconds": self.seconds,
            "parameters": self.parameters(),
            "compacted": self.network.compacted is not None,
            **self.network.figures(),
        }
        self.scores.sums.zero_()
        self.penalty.zero_()
        self.seconds = 0.0
        return record

    # ------------------------------------------------------------------------------------------- small network

    def compact_if_frozen(self) -> bool:
        """Go on with the small network if so configured, the masks stay, and it is not done yet; whether it was."""
        if not (self.config.compact_when_frozen and self.pruner is not None and self.pruner.frozen):
            return False
        self._use(compaction.compacted(self._lone_copy(), self.example_input()))
        return True

    def small(self) -> nn.Module:
        """A copy of the network without what is pruned, as a lone process has it."""
        lone = self._lone_copy()
        return lone.model if lone.compacted else compact(lone.model, self.example_input(), self.config.round_to)

    def _lone_copy(self) -> Network:
        if self.network.compacted is not None:
            tensors = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
            return compaction.restored(self.config, self.network.compacted, tensors, several=False)
        model = network.make_model(self.config, len(self.images.classes), self.device)
        pruner = network.make_pruner(self.config, model, self.steps_per_epoch)
        copy = Network(self.config, model, pruner, several=False)
        copy.load_state_dict(self.network.state_dict())
        return copy

    def example_input(self) -> Tensor:
        """One test image as the network takes it."""
        return self.normalized(self.images.test_images[:1])

    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    # ------------------------------------------------------------------------------------------------ state

    def check_loss(self) -> float:
        """The mean loss of this epoch so far. Waits for the device, which counts as training.

        Raises:
            TrainingError: if it, or the penalty, is no longer finite.
        """
        with self._timed():
            total = self.scores.total()
            loss, images, penalty = torch.stack([total[0], total[3], self.penalty]).tolist()
        if not math.isfinite(loss + penalty):
            raise TrainingError(f"the loss is no longer finite at step {self.step}")
        return loss / images

    def check_state(self) -> None:
        """Make sure that what a checkpoint would hold is finite: the loss shows a step's damage only in the next one.

        Raises:
            TrainingError: naming a tensor that is not.
        """
        name = self.network.not_finite()
        if name is not None:
            raise TrainingError(f"{name} is no longer finite at step {self.step}")

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the configuration and the data. The same in every process."""
        return {
            "step": self.step,
            "train_images": len(self.images.train_labels),
            "batch_size": self.config.batch_size,
            "steps_per_epoch": self.steps_per_epoch,
            **self.network.state_dict(),
            "scaler": self.scaler.state_dict(),
            "sums": self.scores.total(),
            "penalty": self.penalty,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the optimizer's settings are those of this run's configuration.

        Raises:
            TrainingError: if it is of another model, or of data or batches of another size.
        """
        try:
            place = {"train_images": len(self.images.train_labels), "batch_size": self.config.batch_size}
            if "steps_per_epoch" in state:  # which the number of processes and of a batch's parts can change
                place["steps_per_epoch"] = self.steps_per_epoch
            for name, here in place.items():
                if state[name] != here:
                    raise ValueError(f"{name} was {state[name]} and is {here}, so its place in the data is unknown")
            if state.get("compacted") is not None:
                tensors = {name: tensor.to(self.device) for name, tensor in state["model"].items()}
                self._use(compaction.restored(self.config, state["compacted"], tensors))
            self.network.load_state_dict(state)
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.scores.set(state["sums"])
            self.penalty.copy_(state["penalty"])
            self.step, self.seconds = state["step"], state["seconds"]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            message = f"the checkpoint is of another configuration or data set: {error}"
            raise TrainingError(message) from error


def _with_precision(config: Config, model: nn.Module, images: ImageData) -> tuple[Config, list[Decision]]:
    """Return the configuration with a precision instead of ``auto``, and why that one."""
    if config.precision != "auto":
        return config, []
    batch = max(config.batch_size // (distributed.size() * config.accumulate), 1)
    shape = (batch, *images.train_images.shape[1:])
    choice = precision.choose(model, shape, network.memory_format(config))
    decision = Decision("precision", config.precision, choice.precision, choice.why)
    return dataclasses.replace(config, precision=choice.precision), [decision]


def _share(tensor: Tensor) -> Tensor:
    """This process's share of the rows."""
    return tensor.tensor_split(distributed.size())[distributed.rank()]


def _wide(logits: Tensor) -> Tensor:
    """At least in float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
