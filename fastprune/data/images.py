"""The one form every data set takes: uint8 images and int64 labels held in memory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1024  # images handled at a time where wider integers or floats are needed


class DataError(ValueError):
    """Data on disk that cannot be used; the message says what was expected, what was found and what to do."""


class DataUnavailableError(DataError):
    """A known data set that is neither on disk nor to be had from the network now."""


@dataclass(frozen=True, eq=False)
class ImageData:
    """A classification data set, train and test split, in memory.

    Attributes:
        name: short name, e.g. ``"cifar10"``, ``"embedded"`` or the image folder's name.
        classes: the C class names; a label is an index into them.
        train_images: uint8 ``[n, 3, H, W]``, RGB, values 0..255.
        train_labels: int64 ``[n]``, each in 0..C-1.
        test_images: uint8 ``[m, 3, H, W]``.
        test_labels: int64 ``[m]``.
        source: one plain line for the user: what the data is, where it came from and why it was chosen.

    Raises:
        ValueError: a tensor has another dtype or shape than said above.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_images: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    source: str

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
                raise ValueError(
                    f"{split}_images of {self.name!r}: expected uint8 [n, 3, H, W] with n >= 1, "
                    f"got {images.dtype} {list(images.shape)}"
                )
            if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise ValueError(
                    f"{split}_labels of {self.name!r}: expected int64 [{len(images)}], "
                    f"got {labels.dtype} {list(labels.shape)}"
                )

    @cached_property
    def _moments(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        # Integer sums are exact, so every device and every order of summation gives the same bits.
        total, squares = torch.zeros(2, 3, dtype=torch.int64, device=self.train_images.device)
        for chunk in self.train_images.split(_CHUNK):
            wide = chunk.to(torch.int64)
            total += wide.sum(dim=(0, 2, 3))
            squares += (wide * wide).sum(dim=(0, 2, 3))
        count = self.train_images.numel() // 3
        mean, std = [], []
        for s, q in zip(total.tolist(), squares.tolist(), strict=True):
            mean.append(s / count / 255)
            std.append(math.sqrt(count * q - s * s) / count / 255 or 1.0)
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of the training images per channel, in 0..1."""
        return self._moments[0]

    @property
    def std(self) -> tuple[float, float, float]:
        """Population standard deviation, likewise; 1 for a channel that is constant."""
        return self._moments[1]

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with all four tensors on ``device``."""
        return dataclasses.replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def subset(self, train: int | None = None, test: int | None = None) -> ImageData:
        """At most ``train`` and ``test`` images, classes mixed: the first after a shuffle with a fixed seed.

        ``None`` leaves a split as it is. A smaller subset is the beginning of a larger one.

        Raises:
            ValueError: a number below 1.
        """
        if train is None and test is None:
            return self
        train_images, train_labels = _first_shuffled(self.train_images, self.train_labels, train)
        test_images, test_labels = _first_shuffled(self.test_images, self.test_labels, test)
        return dataclasses.replace(
            self,
            train_images=train_images,
            train_labels=train_labels,
            test_images=test_images,
            test_labels=test_labels,
            source=f"{self.source}; of it {len(train_images):,} train and {len(test_images):,} test images",
        )

    def resize(self, size: int) -> ImageData:
        """Every image scaled to ``size`` × ``size`` pixels (bilinear, antialiased).

        Raises:
            ValueError: ``size`` below 1.
        """
        if size < 1:
            raise ValueError(f"image_size: expected at least 1 pixel, got {size}")
        if self.train_images.shape[-2:] == self.test_images.shape[-2:] == (size, size):
            return self
        return dataclasses.replace(
            self, train_images=_resized(self.train_images, size), test_images=_resized(self.test_images, size)
        )


def _first_shuffled(images: Tensor, labels: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    if count is None:
        return images, labels
    if count < 1:
        raise ValueError(f"subset: expected at least 1 image per split, got {count}")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count].to(images.device)
    return images[order], labels[order]


def _resized(images: Tensor, size: int) -> Tensor:
    chunks = (
        F.interpolate(chunk.float(), (size, size), mode="bilinear", antialias=True) for chunk in images.split(_CHUNK)
    )
    return torch.cat([chunk.round_().clamp_(0, 255).to(torch.uint8) for chunk in chunks])
