"""Augmentation and normalisation against a loop over the images."""

import pytest
import torch
from torch import Tensor

from fastprune.data import Augment, normalize


def some_images(batch: int = 16, height: int = 12, width: int = 10) -> Tensor:
    g = torch.Generator().manual_seed(7)
    # No zeros, so that zeros in a result are padding or cutout.
    return torch.randint(1, 256, (batch, 3, height, width), dtype=torch.uint8, generator=g)


def one_by_one(images: Tensor, augment: Augment, seed: int) -> Tensor:
    """The documented operations, image by image, with the documented draws."""
    g = torch.Generator().manual_seed(seed)
    batch, _, height, width = images.shape
    pad = augment.pad

    def draw(bound: int) -> list[int]:
        return torch.randint(bound, (batch,), generator=g).tolist()

    out = images.clone()
    if pad:
        for b, (top, left) in enumerate(zip(draw(2 * pad + 1), draw(2 * pad + 1), strict=True)):
            canvas = torch.zeros(3, height + 2 * pad, width + 2 * pad, dtype=torch.uint8)
            canvas[:, pad : pad + height, pad : pad + width] = images[b]
            out[b] = canvas[:, top : top + height, left : left + width]
    if augment.flip:
        for b, mirrored in enumerate(draw(2)):
            if mirrored:
                out[b] = out[b].flip(-1)
    if augment.cutout:
        for b, (row, column) in enumerate(zip(draw(height), draw(width), strict=True)):
            top, left = row - augment.cutout // 2, column - augment.cutout // 2
            out[b, :, max(top, 0) : top + augment.cutout, max(left, 0) : left + augment.cutout] = 0
    return out


@pytest.mark.parametrize(
    "augment",
    [Augment(), Augment(pad=0), Augment(flip=False), Augment(cutout=5), Augment(pad=0, flip=False, cutout=4)],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equals_the_loop(augment: Augment, memory_format: torch.memory_format) -> None:
    images = some_images().contiguous(memory_format=memory_format)
    before = images.clone()
    result = augment(images, torch.Generator().manual_seed(5))
    assert result.dtype == torch.uint8
    assert torch.equal(result, one_by_one(images, augment, seed=5))
    assert torch.equal(images, before)


def test_off_leaves_images_alone() -> None:
    images = some_images()
    assert torch.equal(Augment(pad=0, flip=False)(images, torch.Generator()), images)


def test_only_the_generator_decides() -> None:
    images, augment = some_images(), Augment(cutout=3)
    torch.manual_seed(1)
    first = augment(images, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    assert torch.equal(augment(images, torch.Generator().manual_seed(5)), first)
    assert not torch.equal(augment(images, torch.Generator().manual_seed(6)), first)
    going_on = torch.Generator().manual_seed(5)
    augment(images, going_on)
    assert not torch.equal(augment(images, going_on), first)


def test_every_offset_and_both_directions_come_up_and_padding_is_zero() -> None:
    images = torch.arange(1, 10, dtype=torch.uint8).view(1, 1, 3, 3).repeat(2000, 3, 1, 1)
    result = Augment(pad=1)(images, torch.Generator().manual_seed(0))
    patterns, counts = result[:, 0].flatten(1).unique(dim=0, return_counts=True)
    assert len(patterns) == 18  # 3 × 3 offsets, mirrored or not
    assert counts.min() > 60  # 111 each are expected
    shifted = torch.tensor([0, 0, 0, 0, 1, 2, 0, 4, 5], dtype=torch.uint8)  # offset (0, 0): two sides of zeros
    assert bool((patterns == shifted).all(1).any())


def test_cutout_size_and_centres() -> None:
    images = some_images(batch=3000, height=8, width=8)
    result = Augment(pad=0, flip=False, cutout=3)(images, torch.Generator().manual_seed(0))
    hidden = (result == 0).all(1)
    area = hidden.flatten(1).sum(1)
    assert area.max() == 9
    assert area.min() == 4  # centred in a corner
    assert bool((result[(~hidden)[:, None].expand_as(result)] > 0).all())
    share = hidden.float().mean(0)
    assert share[1:-1, 1:-1].sub(9 / 64).abs().max() < 0.03


@pytest.mark.parametrize(("pad", "cutout"), [(-1, 0), (4, -2)])
def test_negative_sizes_are_refused(pad: int, cutout: int) -> None:
    with pytest.raises(ValueError, match="or more"):
        Augment(pad=pad, cutout=cutout)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)])
def test_other_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        Augment()(images, torch.Generator())
    with pytest.raises(ValueError, match="expected uint8"):
        normalize(images, (0.5,) * 3, (0.2,) * 3)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)]
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize(dtype: torch.dtype, tolerance: float, memory_format: torch.memory_format) -> None:
    images, mean, std = some_images(), (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    result = normalize(images, mean, std, dtype, memory_format)
    assert result.dtype == dtype
    assert result.is_contiguous(memory_format=memory_format)
    expected = images.double() / 255
    for channel in range(3):
        expected[:, channel] = (expected[:, channel] - mean[channel]) / std[channel]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=2e-6)


def test_normalize_refuses_bad_moments() -> None:
    with pytest.raises(ValueError, match="std above 0"):
        normalize(some_images(), (0.5,) * 3, (0.2, 0.0, 0.2))
    with pytest.raises(ValueError, match="3 numbers"):
        normalize(some_images(), (0.5,), (0.2,))
