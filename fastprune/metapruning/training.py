"""The training of a PruningNet: a fresh random encoding every step."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .. import data, precision
from ..data import ImageData
from ..decisions import Decision
from ..optim import PrunedSGD
from ..precision import DTYPES
from ..scores import Scores
from ..trainer import TrainingError
from .encoding import CHOICES, Encoding
from .fitness import Fitness
from .network import PlainNetwork
from .pruning_net import PruningNet
from .settings import SearchConfig


def choose_device(name: str) -> torch.device:
    """The device asked for.

    Raises:
        TrainingError: where there is no such device.
    """
    chosen = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if chosen == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device(chosen)


def with_precision(config: SearchConfig, images: ImageData) -> tuple[SearchConfig, list[Decision]]:
    """The configuration with a precision instead of ``auto``, that of the widest network, and why that one.

    Raises:
        TrainingError: where there is no such device.
    """
    if config.precision != "auto":
        return config, []
    with torch.random.fork_rng():
        widest = PlainNetwork(config.network, num_classes=len(images.classes)).to(choose_device(config.device))
    shape = (config.batch_size, *images.train_images.shape[1:])
    choice = precision.choose(widest, shape, memory_format(config))
    decision = Decision("precision", config.precision, choice.precision, choice.why)
    return dataclasses.replace(config, precision=choice.precision), [decision]


def memory_format(config: SearchConfig) -> torch.memory_format:
    """That of images and weights."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


class PruningTrainer:
    """The training of a PruningNet, and where it stands.

    All randomness (order of the images, augmentation, encodings) is a function of the seed and of the step, and the
    learning rate one of the step: what a checkpoint has to hold is the network, the momenta, the gradient scaler and
    the position.

    Args:
        config: of the search.
        images: with the validation images in the place of the test images, see :func:`fastprune.metapruning.split`.

    Attributes:
        step: steps finished.
        records: of the epochs finished.
    """

    def __init__(self, config: SearchConfig, images: ImageData) -> None:
        self.config = config = with_precision(config, images)[0]
        self.device = choose_device(config.device)
        torch.manual_seed(config.seed)
        self.network = PruningNet(config.network, len(images.classes)).to(self.device)
        self.images = images.to(self.device)
        self.mean, self.std = images.mean, images.std
        self.format = memory_format(config)
        self.dtype = DTYPES[config.precision]
        self.augment = data.Augment(config.pad, config.flip, 0)
        self.optimizer = _make_optimizer(config, self.network)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        full, rest = divmod(len(images.train_labels), config.batch_size)
        if full == 0 and rest < 2:
            raise TrainingError("one training image is too few to train on")
        self.steps_per_epoch = full + (rest >= 2)  # a lone image has no batch variance
        self.step = 0
        self.records: list[dict[str, Any]] = []
        self.scores = Scores(self.device)
        self.seconds = 0.0

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return self.step // self.steps_per_epoch

    @property
    def total(self) -> int:
        """Steps of the whole training."""
        return self.config.epochs * self.steps_per_epoch

    def encoding(self, step: int) -> Encoding:
        """That of a step: every gene uniform."""
        rng = np.random.default_rng([self.config.seed, step])
        return tuple(rng.integers(CHOICES, size=len(self.network.description.genes)).tolist())

    def _generator(self, device: torch.device | str, purpose: int, count: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(((self.config.seed * 2 + purpose) << 32) + count)

    def train_steps(self, limit: int) -> Iterator[int]:
        """Train to the end of the epoch or to step ``limit``, yielding after each step the steps finished."""
        epoch, batch_size = self.epoch, self.config.batch_size
        order = torch.randperm(len(self.images.train_labels), generator=self._generator("cpu", 0, epoch)).to(
            self.device
        )
        self.network.train()
        for i in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
            if self.step >= limit:
                return
            started = time.perf_counter()
            self._train_step(order[i * batch_size : (i + 1) * batch_size])
            self.seconds += time.perf_counter() - started
            yield self.step

    def _train_step(self, indices: torch.Tensor) -> None:
        images = self.augment(self.images.train_images[indices], self._generator(self.device, 1, self.step))
        labels = self.images.train_labels[indices]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.step, self.total)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            inputs = data.normalize(images, self.mean, self.std, memory_format=self.format)
            logits = self.network(inputs, self.encoding(self.step)).float()
            loss = functional.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.scores.add(loss.detach(), logits.detach(), labels)
        self.step += 1

    def check_loss(self) -> float:
        """The mean loss of this epoch so far; waits for the device.

        Raises:
            TrainingError: if it is no longer finite.
        """
        loss = self.scores.read()["loss"]
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is no longer finite at step {self.step}: lower --lr")
        return loss

    def fitness(self, **options: Any) -> Fitness:
        """What evaluates encodings of this network, as configured."""
        settings: dict[str, Any] = {
            "recalibration": self.config.recalibration,
            "batch_size": self.config.evaluation_batch,
            "mean": self.mean,
            "std": self.std,
            "dtype": self.dtype,
            "memory_format": self.format,
        }
        return Fitness(self.network, self.images, **(settings | options))

    def finish_epoch(self) -> dict[str, Any]:
        """Evaluate the uniform networks of three widths, and return the epoch's record, which is kept, too."""
        genes = len(self.network.description.genes)
        fitness = self.fitness(recalibration=min(self.config.recalibration, 4 * self.config.evaluation_batch))
        record = {
            "epoch": self.epoch,
            "train": self.scores.read(),
            "validation": {str(choice): fitness((choice,) * genes).top1 for choice in (5, 15, 30)},
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": self.seconds,
        }
        self.scores.sums.zero_()
        self.seconds = 0.0
        self.records.append(record)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed training needs besides the configuration and the data."""
        return {
            "network_name": self.config.network,
            "step": self.step,
            "train_images": len(self.images.train_labels),
            "batch_size": self.config.batch_size,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "scaler": self.scaler.state_dict(),
            "sums": self.scores.sums,
            "seconds": self.seconds,
            "records": self.records,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            TrainingError: if it is of another network, or of data or batches of another size.
        """
        try:
            here = {
                "network_name": self.config.network,
                "train_images": len(self.images.train_labels),
                "batch_size": self.config.batch_size,
            }
            for name, value in here.items():
                if state[name] != value:
                    raise ValueError(f"{name} was {state[name]} and is {value}")
            self.network.load_state_dict(state["network"])
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.scores.sums.copy_(state["sums"])
            self.step, self.seconds, self.records = state["step"], state["seconds"], list(state["records"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise TrainingError(f"the checkpoint is of another configuration or data set: {error}") from error


def _make_optimizer(config: SearchConfig, network: nn.Module) -> PrunedSGD:
    """Weight decay on the layers' weights, not on biases."""
    weights = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    biases = [parameter for parameter in network.parameters() if parameter.dim() == 1]
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": biases, "weight_decay": 0.0}]
    return PrunedSGD(groups, lr=config.lr, momentum=config.momentum)
