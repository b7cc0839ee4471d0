"""Images per second of training ResNet-56: eager, as the trainer does it, and with forward and backward in a graph.

Both start from the same weights and see the same images, so that their mean losses of the first epoch must agree.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import device as devices
import torch
from fake_cuda import FakeDevice
from torch import Tensor
from torch.nn import functional

from fastprune import data
from fastprune.recipes import Config
from fastprune.trainer import Trainer
from gpu import images as packed

EAGER_STEPS = 3  # before the capture: they make the optimizer's state
AGREE = 0.05  # by how much the mean losses may differ: rounding is not the same, and training amplifies it


class Captured:
    """A trainer's steps, with forward and backward replayed from a graph; the optimizer and the masks stay outside.

    The graph reads masked weights where the optimizer and the pruner leave them.
    """

    def __init__(self, trainer: Trainer, device: devices.CudaDevice) -> None:
        self.trainer = trainer
        size = trainer.config.batch_size
        self.images = trainer.normalized(trainer.images.train_images[:size])
        self.labels = trainer.images.train_labels[:size].clone()
        statistics = {name: tensor.clone() for name, tensor in trainer.model.named_buffers()}
        self.replay = device.capture(self._forward_backward)
        for name, tensor in trainer.model.named_buffers():  # batch norm has counted the warm-up, too
            tensor.copy_(statistics[name])

    def _forward_backward(self) -> Tensor:
        trainer = self.trainer
        trainer.optimizer.zero_grad(set_to_none=True)  # the graph allocates the gradients, and writes them anew
        with trainer.autocast():
            logits = trainer.network.forward(self.images)
            loss = functional.cross_entropy(logits.float(), self.labels, label_smoothing=trainer.config.label_smoothing)
        total = loss if trainer.decorrelation is None else loss + trainer.decorrelation()
        total.backward()
        return loss.detach()

    def step(self, indices: Tensor) -> Tensor:
        """One step on the training images `indices`, a whole batch; the loss, which the next step overwrites."""
        trainer = self.trainer
        fresh = trainer.augment(
            trainer.images.train_images[indices], trainer.generator(trainer.device, 1, trainer.step)
        )
        self.images.copy_(trainer.normalized(fresh))
        self.labels.copy_(trainer.images.train_labels[indices])
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.learning_rate()
        loss: Tensor = self.replay()
        trainer.optimizer.step()
        trainer.step += 1
        if trainer.pruner is not None:
            trainer.pruner.step()
        return loss


def eager(trainer: Trainer) -> list[dict[str, float]]:
    """Train to the end; by epoch, the images per second, the mean loss and the test's top-1 in percent."""
    epochs = []
    while trainer.epoch < trainer.config.epochs:
        for step in trainer.train_steps(trainer.step + trainer.steps_per_epoch):
            if step % 50 == 0 or step % trainer.steps_per_epoch == 0:
                trainer.check_loss()  # as train.py does: it waits for the device
        record = trainer.finish_epoch()
        epochs.append(
            told("eager", len(epochs), record["images_per_s"], record["train"]["loss"], record["test"]["top1"])
        )
    return epochs


def captured(trainer: Trainer, device: devices.CudaDevice) -> list[dict[str, float]]:
    """The same with whole batches alone; the first epoch's rate leaves out the eager steps and the capture."""
    size, epochs = trainer.config.batch_size, []
    whole = len(trainer.images.train_labels) // size
    graph: Captured | None = None
    for epoch in range(trainer.config.epochs):
        order = torch.randperm(len(trainer.images.train_labels), generator=trainer.generator("cpu", 0, epoch))
        batches = list(order.to(trainer.device)[: whole * size].split(size))
        total = torch.zeros((), dtype=torch.float64, device=trainer.device)
        if graph is None:
            for indices in batches[:EAGER_STEPS]:
                trainer.train_step(indices)
            total += trainer.scores.total()[0] / size
            batches = batches[EAGER_STEPS:]
            trainer.model.train()
            graph = Captured(trainer, device)
        device.synchronize()
        start = time.perf_counter()
        for indices in batches:
            total += graph.step(indices)
        device.synchronize()
        seconds = time.perf_counter() - start
        loss, top1 = float(total) / whole, trainer.test()["top1"]
        trainer.model.train()
        epochs.append(told("graph", epoch, len(batches) * size / seconds, loss, top1))
    return epochs


def told(way: str, epoch: int, images_per_s: float, loss: float, top1: float) -> dict[str, float]:
    """An epoch's figures, printed."""
    print(
        f"{way}, epoch {epoch + 1}: {images_per_s:,.0f} images/s, loss {loss:.4f}, test top-1 {top1:.2f} %", flush=True
    )
    return {"images_per_s": images_per_s, "loss": loss, "top1": top1}


def measure(config: Config, images: data.ImageData, device: devices.CudaDevice, file: Path) -> str:
    """Both ways, each written down as soon as it is measured; return what is wrong, nothing if they agree."""
    results: dict[str, Any] = {"config": config.to_json(), "device": str(device), "data": images.source}
    for way in ("eager", "graph"):
        torch.manual_seed(config.seed)
        trainer = Trainer(config, images)
        try:
            results[way] = eager(trainer) if way == "eager" else captured(trainer, device)
        except Exception as error:  # the other way's figures are not to be lost with it
            traceback.print_exc()
            return f"{way}: {type(error).__name__}: {error}"
        finally:
            file.write_text(json.dumps(results, indent=1) + "\n")
    first = [results[way][0]["loss"] for way in ("eager", "graph")]
    if abs(first[0] - first[1]) > AGREE * first[0]:
        return f"the mean losses of the first epoch do not agree: {first[0]:.4f} eager, {first[1]:.4f} in a graph"
    return ""


def main() -> int:
    """The exit status is 1 if one of the two ways failed, or they do not agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--images", type=Path, help="CIFAR-10 as `make gpu-pack` packed it, if it did")
    parser.add_argument("--fake", action="store_true", help="a few images on the fake device, where there is no GPU")
    options = parser.parse_args()
    if options.images and options.images.exists():
        start = time.perf_counter()
        count = packed.unpack(options.images, data.default_root() / "cifar10")
        print(f"unpacked {count:,} images in {time.perf_counter() - start:.1f} s", flush=True)
    images = data.load("auto")
    config = Config(model="resnet56", epochs=3, precision="bf16", device="cpu" if options.fake else "cuda")
    if options.fake:
        config = Config(model="resnet20", epochs=3, precision="bf16", device="cpu", batch_size=32)
        images = images.subset(train=192, test=64)
    print(images.source, flush=True)
    device = FakeDevice() if options.fake else devices.create("cuda")
    wrong = measure(config, images, device, options.json)
    if wrong:
        print(f"FAILED: {wrong}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
