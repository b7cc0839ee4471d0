"""Augmentation and normalisation of whole batches, on the device the images are on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Random crop, flip and cutout, drawn for each image of a batch on its own.

    In this order, as torchvision's ``RandomCrop(padding=pad)`` and ``RandomHorizontalFlip`` before normalisation:

    1. ``pad`` pixels of zeros (black) on every side, then a crop of the old size at an offset uniform in
       0..2·pad in each direction;
    2. ``flip``: mirrored left to right with probability 1/2;
    3. ``cutout``: a square of ``cutout`` × ``cutout`` pixels set to zero, its centre uniform over the image
       and so partly outside of it at the border (DeVries and Taylor, arXiv:1708.04552).

    Raises:
        ValueError: ``pad`` or ``cutout`` below 0.
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("pad", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected 0 pixels (off) or more, got {getattr(self, name)}")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch.

        Args:
            images: uint8 ``[B, 3, H, W]``; not changed.
            generator: where all random numbers come from, in the order row offsets, column offsets, flips,
                cutout rows, cutout columns. It may be on the CPU with images on another device: the draws are
                then the same for every device.

        Returns:
            uint8 ``[B, 3, H, W]`` on the images' device.

        Raises:
            ValueError: images that are not uint8 ``[B, 3, H, W]``.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images: expected uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}; "
                "augment before normalize"
            )
        height, width = images.shape[-2:]

        def draw(bound: int) -> Tensor:
            numbers = torch.randint(bound, (len(images),), generator=generator, device=generator.device)
            return numbers.to(images.device, non_blocking=True)

        if self.pad:
            images = _crop(images, self.pad, draw(2 * self.pad + 1), draw(2 * self.pad + 1))
        if self.flip:
            images = torch.where(draw(2).bool()[:, None, None, None], images.flip(3), images)
        if self.cutout:
            hidden = _square(height, width, self.cutout, draw(height), draw(width))
            images = images.masked_fill(hidden[:, None], 0)
        return images


def _crop(images: Tensor, pad: int, top: Tensor, left: Tensor) -> Tensor:
    """``images`` padded by zeros, then image b's window of the old size at ``(top[b], left[b])``."""
    height, width = images.shape[-2:]
    # Every possible window as a view [B, 3, 2·pad + 1, 2·pad + 1, H, W]; indexing copies one for each image.
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def _square(height: int, width: int, side: int, row: Tensor, column: Tensor) -> Tensor:
    """Bool ``[B, H, W]``: true in the square of ``side`` pixels centred at (row, column)."""
    rows = torch.arange(height, device=row.device) - (row - side // 2)[:, None]
    columns = torch.arange(width, device=row.device) - (column - side // 2)[:, None]
    return ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]


def normalize(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """``(images / 255 - mean) / std`` per channel, computed in float32.

    Args:
        images: uint8 ``[B, 3, H, W]``.
        mean: the 3 channels' means, in 0..1, as ``ImageData.mean``.
        std: the 3 channels' standard deviations, in 0..1, above 0.
        dtype: dtype of the result.
        memory_format: memory format of the result.

    Returns:
        ``[B, 3, H, W]`` in ``dtype`` on the images' device.

    Raises:
        ValueError: images that are not uint8 ``[B, 3, H, W]``, or not 3 means and 3 positive deviations.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images: expected uint8 [B, 3, H, W], got {images.dtype} {list(images.shape)}")
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    values = images.to(torch.float32, memory_format=memory_format).mul_(scale).add_(shift)
    return values.to(dtype, memory_format=memory_format)


@lru_cache(maxsize=16)  # one copy to the device for a run, not one for each batch
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean, std: expected 3 numbers each, std above 0, got {mean} and {std}")
    deviation = torch.tensor(std, dtype=torch.float64)
    scale = 1 / (255 * deviation)
    shift = -torch.tensor(mean, dtype=torch.float64) / deviation
    scale, shift = (t.to(torch.float32).view(3, 1, 1).to(device) for t in (scale, shift))
    return scale, shift
