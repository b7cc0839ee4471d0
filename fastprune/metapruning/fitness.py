"""The fitness of an encoding: accuracy with generated weights, once batch norm has been recalibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .. import data
from ..data import ImageData
from ..memory import is_out_of_memory
from .encoding import Encoding
from .pruning_net import PruningNet


@dataclass(frozen=True)
class Score:
    """What an encoding achieves on the validation images: top-1 in percent, and mean cross entropy."""

    top1: float
    loss: float


def split(images: ImageData, share: float, seed: int = 0) -> ImageData:
    """Hold out a share of the training images: they take the place of the test images, which are left out.

    Args:
        images: a data set; its test images are not used.
        share: of the training images to hold out, above 0 and below 1; at least one stays on each side.
        seed: of the choice.

    Raises:
        ValueError: for a share out of range, and for fewer than two training images.
    """
    count = len(images.train_labels)
    if not 0 < share < 1:
        raise ValueError(f"the share of held-out training images must be above 0 and below 1, got {share}")
    if count < 2:
        raise ValueError("a single training image cannot be split")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(images.train_labels.device)
    held = min(max(round(count * share), 1), count - 1)
    return ImageData(
        name=images.name,
        classes=images.classes,
        train_images=images.train_images[order[held:]],
        train_labels=images.train_labels[order[held:]],
        test_images=images.train_images[order[:held]],
        test_labels=images.train_labels[order[:held]],
        source=f"{images.source}; of the training images {held:,} are held out for validation",
    )


class Fitness:
    """Evaluates encodings, one after the other; the same encoding gives the same score.

    Weights are generated once for each. Batch norm takes the mean of its statistics over ``recalibration`` training
    images, in one pass without augmentation or gradients, in batches of ``batch_size`` (a rest is left out).

    Where memory runs out, the batch size is halved, which is said, and the evaluation is done again. Batch norm sees
    its batches, so scores depend on their size a little.

    Args:
        network: trained. Neither its weights nor its statistics change.
        images: on the network's device; the validation images in the place of the test images, see :func:`split`.
        recalibration: number of training images to recalibrate on, from the first on; 0 for the statistics that
            training left.
        batch_size: images at a time.
        mean, std: that the images are normalised with.
        dtype: to compute in.
        memory_format: of images and weights.
        tell: is called with a line for people.
    """

    def __init__(
        self,
        network: PruningNet,
        images: ImageData,
        recalibration: int = 2000,
        batch_size: int = 500,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        tell: Callable[[str], None] = print,
    ) -> None:
        if recalibration < 0 or batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, recalibration 0; got {batch_size} and {recalibration}")
        self.network, self.images, self.tell = network, images, tell
        self.recalibration = min(recalibration, len(images.train_labels))
        self.batch_size = batch_size
        self.mean, self.std = mean or images.mean, std or images.std
        self.dtype, self.memory_format = dtype, memory_format

    def __call__(self, encoding: Encoding) -> Score:
        """Evaluate one encoding.

        Raises:
            ValueError: for an encoding of another network.
            RuntimeError: where memory runs out with a single image, too.
        """
        while True:
            try:
                return self._evaluate(encoding)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.batch_size == 1:
                    raise
            # Outside of the handler, which holds on to the tensors of what failed.
            self.batch_size //= 2
            if self.images.train_images.is_cuda:
                torch.cuda.empty_cache()
            self.tell(f"out of memory: going on in batches of {self.batch_size}")

    @torch.no_grad()
    def _evaluate(self, encoding: Encoding) -> Score:
        network = self.network.candidate(
            encoding, self.dtype, self.memory_format, with_statistics=self.recalibration == 0
        )
        images, labels = self.images.test_images, self.images.test_labels
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            network.train()
            size = min(self.batch_size, self.recalibration)
            for start in range(0, self.recalibration - size + 1, size) if size else ():
                network(self._normalized(self.images.train_images[start : start + size]))
            network.eval()
            sums = torch.zeros(2, dtype=torch.float64, device=images.device)
            for some, their in zip(images.split(self.batch_size), labels.split(self.batch_size)):
                logits = network(self._normalized(some)).float()
                loss = functional.cross_entropy(logits, their, reduction="sum")
                sums += torch.stack([(logits.argmax(1) == their).sum().double(), loss.double()])
        correct, loss_sum = sums.tolist()
        return Score(100 * correct / len(labels), loss_sum / len(labels))

    def _normalized(self, images: Tensor) -> Tensor:
        return data.normalize(images, self.mean, self.std, memory_format=self.memory_format)
