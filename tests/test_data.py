"""ImageData, the embedded set, and what ``load`` chooses."""

import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastprune.data import DataError, ImageData, default_root, embedded, load


@pytest.fixture(scope="module")
def shapes() -> ImageData:
    return embedded(0, train=3000, test=1000)


def linear_accuracy(data: ImageData, steps: int) -> tuple[float, float]:
    """Accuracy on train and test of a multinomial logistic regression on the pixels, fitted by L-BFGS."""
    train, test = ((images.flatten(1).float() / 255 - 0.5) for images in (data.train_images, data.test_images))
    weight = torch.zeros(10, train.shape[1], requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(train, weight, bias), data.train_labels)
        loss = loss + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(closure)
    with torch.no_grad():
        hits = [
            (F.linear(x, weight, bias).argmax(1) == y).float().mean().item()
            for x, y in ((train, data.train_labels), (test, data.test_labels))
        ]
    return hits[0], hits[1]


def tiny(train: int = 6, size: int = 8) -> ImageData:
    g = torch.Generator().manual_seed(0)
    return ImageData(
        name="tiny",
        classes=("a", "b"),
        train_images=torch.randint(256, (train, 3, size, size), dtype=torch.uint8, generator=g),
        train_labels=torch.arange(train) * 2 // train,
        test_images=torch.randint(256, (4, 3, size, size), dtype=torch.uint8, generator=g),
        test_labels=torch.tensor([0, 0, 1, 1]),
        source="made up",
    )


def test_moments_are_those_of_the_training_images() -> None:
    data = tiny(train=2500)
    values = data.train_images.double() / 255
    torch.testing.assert_close(torch.tensor(data.mean).double(), values.mean((0, 2, 3)), rtol=1e-6, atol=0)
    expected = values.std((0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(data.std).double(), expected, rtol=1e-6, atol=0)


def test_constant_channel_has_std_one() -> None:
    data = tiny()
    data.train_images[:, 1] = 7
    assert data.std[1] == 1.0
    assert data.mean[1] == pytest.approx(7 / 255)


def test_to_moves_all_four_tensors() -> None:
    data = tiny().to("meta")
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    assert all(tensor.device.type == "meta" for tensor in tensors)


def test_subset_is_mixed_paired_nested_and_repeatable() -> None:
    data = tiny(train=100)
    data.train_images[:] = torch.arange(100, dtype=torch.uint8)[:, None, None, None]
    small, large = data.subset(train=10, test=2), data.subset(train=20)
    assert small.train_images.shape == (10, 3, 8, 8)
    assert len(small.test_images) == len(small.test_labels) == 2
    assert set(small.train_labels.tolist()) == {0, 1}
    index = small.train_images[:, 0, 0, 0].long()
    assert torch.equal(small.train_labels, data.train_labels[index])
    assert torch.equal(small.train_images, large.train_images[:10])
    assert torch.equal(large.test_images, data.test_images)
    assert "10 train and 2 test" in small.source
    assert len(data.subset(train=1000).train_images) == 100


@pytest.mark.parametrize("numbers", [{"train": 0}, {"test": -1}])
def test_subset_below_one_is_an_error(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        tiny().subset(**numbers)


def test_resize_keeps_flat_images_and_averages_fine_ones() -> None:
    data = tiny()
    data.train_images[0] = 200
    data.train_images[1] = torch.tensor([0, 255], dtype=torch.uint8).repeat(4)  # stripes of one pixel
    half, double = data.resize(4), data.resize(16)
    assert half.train_images.shape == (6, 3, 4, 4)
    assert double.test_images.shape == (4, 3, 16, 16)
    assert bool((half.train_images[0] == 200).all())
    assert bool(((half.train_images[1, :, :, 1:-1].int() - 127).abs() <= 1).all())  # antialiased
    with pytest.raises(ValueError, match="image_size"):
        data.resize(0)


def test_wrong_tensors_are_refused() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    for bad_images, bad_labels, words in (
        (images.float(), labels, "uint8"),
        (images[:, :1], labels, r"\[2, 1, 4, 4\]"),
        (images[:0], labels[:0], "n >= 1"),
        (images, labels.int(), "int64"),
        (images, labels[:1], r"\[1\]"),
    ):
        with pytest.raises(ValueError, match=words):
            ImageData("x", ("a",), bad_images, bad_labels, images, labels, "")


def test_embedded_is_balanced_and_mixed(shapes: ImageData) -> None:
    assert shapes.train_images.shape == (3000, 3, 32, 32)
    assert shapes.test_images.shape == (1000, 3, 32, 32)
    assert len(shapes.classes) == 10
    assert shapes.train_labels.bincount().tolist() == [300] * 10
    assert shapes.test_labels.bincount().tolist() == [100] * 10
    assert len(set(shapes.train_labels[:40].tolist())) > 5
    assert max(abs(mean - 0.5) for mean in shapes.mean) < 0.05


def test_embedded_depends_on_seed_and_split_only(shapes: ImageData) -> None:
    torch.manual_seed(123)
    again, other = embedded(0, train=3000, test=1000), embedded(1, train=3000, test=1000)
    assert torch.equal(again.train_images, shapes.train_images)
    assert torch.equal(again.train_labels, shapes.train_labels)
    assert torch.equal(again.test_images, shapes.test_images)
    assert not torch.equal(other.train_images, shapes.train_images)
    train = {image.numpy().tobytes() for image in shapes.train_images}
    assert len(train) == 3000
    assert train.isdisjoint(image.numpy().tobytes() for image in shapes.test_images)


def test_embedded_is_not_linear(shapes: ImageData) -> None:
    train_accuracy, test_accuracy = linear_accuracy(shapes, steps=40)
    assert train_accuracy > 0.7  # it was fitted: far above what it reaches on unseen images
    assert test_accuracy < 0.6


@pytest.mark.slow
def test_embedded_in_full_is_quick_to_make_and_not_linear() -> None:
    start = time.perf_counter()
    data = embedded()
    assert time.perf_counter() - start < 20
    train_accuracy, test_accuracy = linear_accuracy(data, steps=200)
    assert train_accuracy > test_accuracy
    assert test_accuracy < 0.6


def test_embedded_refuses_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least 10"):
        embedded(train=9)
    with pytest.raises(ValueError, match="seed"):
        embedded(-1)


def test_load_embedded_takes_seed_and_size(tmp_path: Path) -> None:
    data = load("embedded", root=tmp_path, image_size=16, seed=3)
    assert data.name == "embedded"
    assert data.train_images.shape == (10_000, 3, 16, 16)
    assert data.test_images.shape == (2_000, 3, 16, 16)
    assert "seed 3" in data.source
    assert list(tmp_path.iterdir()) == []


def test_load_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="auto, cifar10, cifar100, embedded"):
        load("cifar11", root=tmp_path)


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("FASTPRUNE_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_root() == Path("/home/someone/.cache/fastprune")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_root() == tmp_path / "xdg" / "fastprune"
    monkeypatch.setenv("FASTPRUNE_DATA", "~/sets")
    assert default_root() == Path("/home/someone/sets")


def test_the_whole_set_is_no_subset() -> None:
    images = embedded(0, train=20, test=10)
    assert images.subset() is images
    assert "of it 5 train" in images.subset(train=5).source
