"""Image folders: what is read, how it is cached, and what is refused."""

import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pngs
import pytest
import torch
from PIL import Image

import fastprune.data.folder as folder_module
from fastprune.data import DataError, ImageData, load, load_folder

Draw = Callable[[int], Image.Image]


def noise(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_folder(root: Path, test: str = "test", per_class: int = 3, draw: Draw = noise) -> Path:
    folder = root / "pets"
    for s, split in enumerate(("train", test)):
        for c, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(per_class):
                draw(100 * s + 10 * c + i).save(folder / split / name / f"{i}.png")
    return folder


def cache_files(root: Path) -> list[Path]:
    return sorted((root / "cache").iterdir())


def pixels(data: ImageData, index: int = 0) -> np.ndarray:
    return data.train_images[index].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("test", ["test", "val"])
def test_pixels_labels_and_order(tmp_path: Path, test: str) -> None:
    folder = make_folder(tmp_path, test)
    data = load(str(folder), root=tmp_path)
    assert data.name == "pets"
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    for index, seed in enumerate((0, 1, 2, 10, 11, 12)):
        assert np.array_equal(pixels(data, index), np.asarray(noise(seed)))
        assert np.array_equal(data.test_images[index].permute(1, 2, 0).numpy(), np.asarray(noise(100 + seed)))
    assert str(folder) in data.source
    assert "6 train and 6 test" in data.source


def test_test_wins_over_val(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "val").mkdir()
    assert len(load_folder(folder, tmp_path).test_images) == 6


def test_other_files_and_hidden_ones_are_passed_over(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    (folder / "train" / "cat" / "._0.png").write_bytes(b"left by a file manager")
    (folder / "train" / ".thumbnails").mkdir()
    assert len(load_folder(folder, tmp_path).train_images) == 6


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "bmp", "webp", "ppm", "gif", "tiff"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    folder = make_folder(tmp_path)
    target = folder / "train" / "cat" / f"0.{suffix}"
    Image.new("RGB", (16, 16), (200, 40, 90)).save(target)
    (folder / "train" / "cat" / "0.png").unlink()
    difference = pixels(load_folder(folder, tmp_path)).astype(int) - np.array([200, 40, 90])
    assert np.abs(difference).max() <= 4  # some of them are lossy


def grey16() -> Image.Image:
    return Image.fromarray(np.full((16, 16), 77 * 256 + 5, dtype=np.uint16))


def palette_with_hole() -> Image.Image:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.info["transparency"] = 0
    image.paste(0, (0, 0, 16, 8))
    return image


@pytest.mark.parametrize(
    ("image", "top", "bottom"),
    [
        (Image.new("L", (16, 16), 77), (77, 77, 77), (77, 77, 77)),
        (Image.new("1", (16, 16), 1), (255, 255, 255), (255, 255, 255)),
        (grey16(), (77, 77, 77), (77, 77, 77)),
        (Image.new("RGBA", (16, 16), (10, 20, 30, 255)), (10, 20, 30), (10, 20, 30)),
        (Image.new("RGBA", (16, 16), (10, 20, 30, 0)), (255, 255, 255), (255, 255, 255)),
        (Image.new("LA", (16, 16), (40, 255)), (40, 40, 40), (40, 40, 40)),
        (palette_with_hole(), (255, 255, 255), (10, 20, 30)),
    ],
    ids=["grey", "bilevel", "grey16", "rgba", "transparent", "grey-alpha", "palette"],
)
def test_modes_become_rgb(tmp_path: Path, image: Image.Image, top: tuple[int, ...], bottom: tuple[int, ...]) -> None:
    folder = make_folder(tmp_path)
    image.save(folder / "train" / "cat" / "0.png")
    result = pixels(load_folder(folder, tmp_path))
    assert result.shape == (16, 16, 3)
    assert tuple(result[2, 2]) == top
    assert tuple(result[13, 13]) == bottom


@pytest.mark.parametrize("interlaced", [False, True], ids=["", "interlaced"])
@pytest.mark.parametrize(("kind", "depth", "transparent"), pngs.KINDS)
def test_pngs_of_every_kind_have_their_pixels(
    tmp_path: Path, kind: int, depth: int, transparent: bool, interlaced: bool
) -> None:
    expected = pngs.example(tmp_path / "x.png", kind, depth, transparent, interlaced)[:, 1:-1]  # cropped to a square
    with Image.open(tmp_path / "x.png") as image:
        found = folder_module._pixels(image, 11)
    assert np.abs(found - expected).max() <= 0.5


def test_only_the_very_grey_of_16_bits_is_transparent(tmp_path: Path) -> None:
    samples = np.full((4, 4, 1), 77 * 256 + 5)
    samples[:2] += 1
    pngs.write(tmp_path / "x.png", samples, pngs.GREY, 16, False, tRNS=struct.pack(">H", 77 * 256 + 5))
    with Image.open(tmp_path / "x.png") as image:
        assert folder_module._pixels(image, 4)[:, 0, 0].tolist() == [77, 77, 255, 255]


def test_camera_orientation_is_obeyed(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    noise(0).save(folder / "train" / "cat" / "0.png", exif=exif)
    assert np.array_equal(pixels(load_folder(folder, tmp_path)), np.asarray(noise(0))[::-1, ::-1])


def test_camera_orientation_is_obeyed_in_16_bits(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    grey = np.arange(16, dtype=np.uint16).reshape(4, 4) << 8
    Image.fromarray(grey).save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(folder_module._pixels(image, 4)[:, :, 0], np.arange(16)[::-1].reshape(4, 4))


def test_centre_crop_of_the_shorter_side(tmp_path: Path) -> None:
    def three_bands(_: int) -> Image.Image:
        image = Image.new("RGB", (60, 20), (255, 0, 0))
        image.paste((0, 255, 0), (20, 0, 40, 20))  # the centre square
        return image

    data = load_folder(make_folder(tmp_path, draw=three_bands), tmp_path, image_size=10)
    assert data.train_images.shape == (6, 3, 10, 10)
    # The outermost columns blend with what lies beside the square, as in a crop after scaling.
    assert np.array_equal(pixels(data)[:, 1:-1].reshape(-1, 3), [[0, 255, 0]] * 80)


def test_scaling_down_is_antialiased(tmp_path: Path) -> None:
    def stripes(_: int) -> Image.Image:
        return Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (32, 16)))

    data = load_folder(make_folder(tmp_path, draw=stripes), tmp_path, image_size=8)
    assert np.abs(pixels(data)[:, 1:-1].astype(int) - 127).max() <= 1


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(16, 16)], 16),
        ([(300, 300)], 300),
        ([(30, 40), (52, 45), (61, 90)], 48),
        ([(30, 20)], 24),
        ([(3, 5)], 8),
        ([(500, 400), (900, 901)], 224),
    ],
)
def test_own_size(tmp_path: Path, sizes: list[tuple[int, int]], expected: int) -> None:
    folder = make_folder(tmp_path, draw=lambda seed: Image.new("RGB", sizes[seed % 10 % len(sizes)]))
    assert load_folder(folder, tmp_path).train_images.shape[-2:] == (expected, expected)


def test_second_time_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path)
    first = load_folder(folder, tmp_path)
    assert len(cache_files(tmp_path)) == 1

    def fail(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(folder_module, "_decode", fail)
    again = load_folder(folder, tmp_path)
    assert torch.equal(again.train_images, first.train_images)
    assert torch.equal(again.test_images, first.test_images)
    with pytest.raises(AssertionError):
        load_folder(folder, tmp_path, image_size=8)


@pytest.mark.parametrize("change", ["pixels", "time", "name"])
def test_changed_files_are_read_again(tmp_path: Path, change: str) -> None:
    folder = make_folder(tmp_path)
    load_folder(folder, tmp_path)
    target = folder / "train" / "cat" / "0.png"
    if change == "pixels":
        noise(55).save(target)
    elif change == "time":
        os.utime(target, ns=(1, 1))
    else:
        target.rename(target.with_name("9.png"))
    data = load_folder(folder, tmp_path)
    assert len(cache_files(tmp_path)) == 2
    if change == "pixels":
        assert np.array_equal(pixels(data), np.asarray(noise(55)))
    if change == "name":
        assert np.array_equal(pixels(data, 2), np.asarray(noise(0)))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "garbage"])
def test_damaged_cache_is_rebuilt(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    folder = make_folder(tmp_path)
    first = load_folder(folder, tmp_path)
    expected = first.train_images.clone()
    (cache,) = cache_files(tmp_path)
    content = cache.read_bytes()
    damaged = {
        "cut": content[: len(content) // 2],
        "flipped": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
        "garbage": b"\xff" * len(content),
    }[damage]
    cache.unlink()  # the first result may still look into the old file
    cache.write_bytes(damaged)
    assert torch.equal(load_folder(folder, tmp_path).train_images, expected)
    assert "damaged cache, rebuilding" in capsys.readouterr().err
    assert cache.read_bytes() == content


@pytest.mark.parametrize("how", ["os-error", "file-size-limit", "cache-is-a-file"])
def test_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    folder = make_folder(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "os-error":

        def no_space(_tensors: object, path: Path, **_: object) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(folder_module, "save_file", no_space)
    elif how == "file-size-limit":  # the kernel itself refuses the write after 1 KB
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    else:
        (tmp_path / "cache").write_text("in the way")
    try:
        data = load_folder(folder, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert np.array_equal(pixels(data), np.asarray(noise(0)))
    assert "going on without it" in capsys.readouterr().err
    if how != "cache-is-a-file":
        assert cache_files(tmp_path) == []


@pytest.mark.parametrize(("missing", "words"), [("train", "no folder train;"), ("test", r"no folder test \(or val\)")])
def test_missing_split(tmp_path: Path, missing: str, words: str) -> None:
    folder = make_folder(tmp_path)
    (folder / missing).rename(folder / "elsewhere")
    with pytest.raises(DataError, match=words):
        load_folder(folder, tmp_path)


def test_one_class_only(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    for split in ("train", "test"):
        (folder / split / "dog").rename(tmp_path / f"dog-{split}")
    with pytest.raises(DataError, match=r"at least two classes, found \['cat'\]"):
        load_folder(folder, tmp_path)


def test_other_classes_in_test(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(DataError, match=r"only in train: \['dog'\], only in test: \['wolf'\]"):
        load_folder(folder, tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_class(tmp_path: Path, split: str) -> None:
    folder = make_folder(tmp_path)
    for image in (folder / split / "dog").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=rf"{split}/dog: this class has no images"):
        load_folder(folder, tmp_path)


@pytest.mark.parametrize("image_size", [None, 16])
def test_unreadable_images_are_named(tmp_path: Path, image_size: int | None) -> None:
    folder = make_folder(tmp_path, draw=lambda seed: noise(seed, 64, 64))
    cut, text = folder / "train" / "dog" / "1.png", folder / "test" / "cat" / "2.png"
    cut.write_bytes(cut.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"1 of 12 images(.|\n)*train/dog/1.png: .*truncated"):
        load_folder(folder, tmp_path, image_size=image_size)
    text.write_text("this is no image")
    with pytest.raises(DataError, match=r"test/cat/2.png: cannot identify"):
        load_folder(folder, tmp_path, image_size=image_size)
    assert not (tmp_path / "cache").exists()


def test_cut_jpeg_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    target = folder / "train" / "cat" / "7.jpg"
    noise(1, 64, 64).save(target)
    target.write_bytes(target.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"cat/7.jpg: .*truncated"):
        load_folder(folder, tmp_path, image_size=16)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    Image.new("F", (16, 16), 0.5).save(folder / "train" / "cat" / "5.tif")
    with pytest.raises(DataError, match=r"5.tif: pixels of 32 bits .*mode F"):
        load_folder(folder, tmp_path)


def test_image_size_below_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="image_size"):
        load_folder(make_folder(tmp_path), tmp_path, image_size=0)
