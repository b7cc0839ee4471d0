"""Image folders: ``train/<class>/*`` and ``test/<class>/*``, decoded once, then cached."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .images import DataError, ImageData

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".gif", ".tif", ".tiff"})

_CACHE_FORMAT = 2  # raised whenever the same files would give other pixels
_FILES_PER_TASK = 64
_LARGEST_OWN_CHOICE = 224  # pixels: what image_size=None scales large images of mixed sizes to


class _File(NamedTuple):
    path: Path
    label: int
    bytes: int
    mtime_ns: int


def load_folder(folder: Path, cache_root: Path, *, image_size: int | None = None, name: str | None = None) -> ImageData:
    """Read ``folder/train/<class>/*`` and ``folder/test/<class>/*`` (``val`` where there is no ``test``).

    Grey, palette, 16-bit and CMYK images become RGB, transparent ones are laid on white, and a camera's
    orientation tag is obeyed. Names that begin with a dot, and files of other kinds, are passed over.
    The classes are the folders' names, sorted; within a class the files are sorted by name.

    Args:
        folder: the data set's folder.
        cache_root: the decoded images are kept in ``cache_root/cache/``, under a hash of the files' relative
            paths, sizes and times and of ``image_size``. A damaged cache is rebuilt, and a cache that cannot be
            written is done without; a line on standard error says so.
        image_size: every image is scaled (bilinear, antialiased) until its shorter side is this long, in pixels,
            and its centre square kept. ``None``: the images' own size where all are squares of one size; else
            the median of their shorter sides, rounded to a multiple of 8, at least 8 and at most 224.
        name: the data set's name; the folder's own without it.

    Raises:
        DataError: ``train`` or ``test`` missing, fewer than two classes, a class without images, other classes
            in ``train`` than in ``test``, or images that cannot be read (the message names them).
        ValueError: ``image_size`` below 1.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
    name = name or folder.resolve().name
    train_folder, test_folder = _split_folders(folder)
    classes, test_classes = _class_names(train_folder), _class_names(test_folder)
    if classes != test_classes:
        raise DataError(
            f"{folder}: expected the same classes in both splits; only in {train_folder.name}: "
            f"{sorted(set(classes) - set(test_classes))}, only in {test_folder.name}: "
            f"{sorted(set(test_classes) - set(classes))}"
        )
    train_files, test_files = _list_files(train_folder, classes), _list_files(test_folder, classes)
    files = train_files + test_files

    cache = cache_root / "cache" / f"{name}-{_cache_key(folder, files, image_size)}.safetensors"
    images = _read_cache(cache, len(files))
    if images is None:
        images = _decode(name, files, image_size)
        _write_cache(cache, images)
    labels = torch.tensor([file.label for file in files])
    n = len(train_files)
    return ImageData(
        name=name,
        classes=classes,
        train_images=images[:n],
        train_labels=labels[:n],
        test_images=images[n:],
        test_labels=labels[n:],
        source=f"image folder {folder}: {len(classes)} classes, {n:,} train and {len(test_files):,} test "
        f"images, {images.shape[-1]}×{images.shape[-1]} pixels",
    )


def _split_folders(folder: Path) -> tuple[Path, Path]:
    train, test = folder / "train", folder / "test"
    if not test.is_dir():
        test = folder / "val"
    if not train.is_dir() or not test.is_dir():
        missing = "train" if not train.is_dir() else "test (or val)"
        raise DataError(
            f"{folder}: there is no folder {missing}; expected train/<class>/* and test/<class>/* or val/<class>/*"
        )
    return train, test


def _class_names(split: Path) -> tuple[str, ...]:
    classes = sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and entry.name[0] != ".")
    if len(classes) < 2:
        raise DataError(f"{split}: expected one folder per class and at least two classes, found {classes}")
    return tuple(classes)


def _list_files(split: Path, classes: Iterable[str]) -> list[_File]:
    files = []
    for label, name in enumerate(classes):
        entries = [
            entry
            for entry in os.scandir(split / name)
            if Path(entry.name).suffix.lower() in SUFFIXES and entry.name[0] != "." and entry.is_file()
        ]
        if not entries:
            raise DataError(f"{split / name}: this class has no images; known are {', '.join(sorted(SUFFIXES))}")
        for entry in sorted(entries, key=lambda entry: entry.name):
            status = entry.stat()
            files.append(_File(Path(entry.path), label, status.st_size, status.st_mtime_ns))
    return files


def _decode(name: str, files: list[_File], image_size: int | None) -> Tensor:
    """All images as uint8 ``[n, 3, size, size]``."""
    paths = [file.path for file in files]
    if image_size is None:
        sizes = [(0, 0)] * len(paths)

        def note_size(index: int, image: Image.Image) -> None:
            sizes[index] = image.size

        _open_all(paths, note_size, f"{name}: sizes")
        image_size = _common_size(sizes)
    images = np.empty((len(paths), 3, image_size, image_size), dtype=np.uint8)

    def store(index: int, image: Image.Image) -> None:
        images[index] = _pixels(image, image_size).transpose(2, 0, 1)

    _open_all(paths, store, f"{name}: images")
    return torch.from_numpy(images)


def _common_size(sizes: list[tuple[int, int]]) -> int:
    width, height = sizes[0]
    if width == height and len(set(sizes)) == 1:
        return width
    median = statistics.median_low(min(size) for size in sizes)
    return min(max((median + 4) // 8 * 8, 8), _LARGEST_OWN_CHOICE)


def _pixels(image: Image.Image, size: int) -> np.ndarray:
    """One image as RGB on white, uint8 ``[size, size, 3]``."""
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits per channel (mode {image.mode}) have no known range; convert to 8 bits")
    _scale_transparent_colour(image)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _of_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _scale_transparent_colour(image: Image.Image) -> None:
    """Make the one colour of a PNG that is transparent comparable with its pixels, of which PIL makes 8 bits.

    Of 16 bits both lose the lower ones, so that all colours with the same upper ones are transparent.
    """
    tiles = getattr(image, "tile", None)  # how it lies in the file
    raw_mode, colour = tiles[0][3] if tiles else None, image.info.get("transparency")
    if raw_mode in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * (255 // (2 ** int(raw_mode[-1]) - 1))
    elif raw_mode == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits; what is transparent stays so."""
    values, transparent = np.asarray(image), image.info.get("transparency")
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _open_all(paths: list[Path], use: Callable[[int, Image.Image], None], label: str) -> None:
    """Open every image in a pool of threads and call ``use(index, image)``; report all that fail."""

    def work(start: int) -> list[str]:
        failures = []
        for index in range(start, min(start + _FILES_PER_TASK, len(paths))):
            try:
                with Image.open(paths[index]) as image:
                    use(index, image)
            except Exception as error:  # a decoder may raise nearly anything on damaged bytes
                failures.append(f"{paths[index]}: {error}")
        return failures

    failures: list[str] = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(paths), desc=label, unit=" images", disable=None, leave=False) as bar,
    ):
        for found in pool.map(work, range(0, len(paths), _FILES_PER_TASK)):
            failures += found
            bar.update(min(_FILES_PER_TASK, len(paths) - int(bar.n)))
    if failures:
        shown = "\n  ".join(failures[:5])
        raise DataError(
            f"{len(failures)} of {len(paths)} images cannot be read; repair or remove them "
            f"(the first {min(5, len(failures))} are named):\n  {shown}"
        )


def _cache_key(folder: Path, files: list[_File], image_size: int | None) -> str:
    listing = [(os.path.relpath(file.path, folder), file.bytes, file.mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([_CACHE_FORMAT, image_size, listing]).encode()).hexdigest()[:16]


def _read_cache(path: Path, count: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            images = stored.get_tensor("images")
            checksum = stored.metadata()["crc32"]
        if images.dtype != torch.uint8 or len(images) != count or _checksum(images) != checksum:
            raise ValueError("its content is not what was written")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        print(f"{path}: damaged cache, rebuilding it ({error})", file=sys.stderr)
        return None
    return images


def _checksum(images: Tensor) -> str:
    return str(zlib.crc32(images.numpy().data))


def _write_cache(path: Path, images: Tensor) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"images": images}, temporary, metadata={"crc32": _checksum(images)})
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        print(f"{path}: cannot write the cache, going on without it ({error})", file=sys.stderr)
