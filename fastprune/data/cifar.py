"""CIFAR-10 and CIFAR-100: found on disk or downloaded, verified by MD5, held as uint8."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .folder import load_folder
from .images import DataError, DataUnavailableError, ImageData

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

TIMEOUT_S = 10.0  # of each network operation of a download

_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
NAMES = tuple(_TITLES)


def load_cifar(name: str, root: Path) -> ImageData:
    """CIFAR-10 or CIFAR-100, 32×32 pixels, from the first of these that is there.

    1. ``root/cifar-10-batches-py`` (``root/cifar-100-python``), as torchvision unpacks it;
    2. ``root/cifar-10-python.tar.gz`` (``root/cifar-100-python.tar.gz``), which is then unpacked beside it;
    3. an image folder ``root/cifar10`` (``root/cifar100``), see ``load_folder``;
    4. a download into 1. Environment variable ``FASTPRUNE_OFFLINE=1`` forbids it.

    ``source`` names which one it was. Files of 1, 2 and 4 are checked against their known MD5 sums.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: the folder all data sets are kept in; made when there is something to put into it.

    Raises:
        DataError: what is on disk is damaged or cannot be unpacked.
        DataUnavailableError: nothing on disk, and no download.
    """
    kind, title = _torchvisions(name), _TITLES[name]
    unpacked, archive, folder = root / kind.base_folder, root / kind.filename, root / name
    if unpacked.is_dir():
        return _read(name, root, f"{title} found in {unpacked}")
    if archive.is_file():
        _unpack(name, root)
        return _read(name, root, f"{title} unpacked from {archive}")
    if (folder / "train").is_dir():
        return _read_folder(name, folder, root)
    _download(name, root)
    return _read(name, root, f"{title} downloaded to {unpacked}")


def _torchvisions(name: str) -> type[CIFAR10]:
    """torchvision's class, loaded when it is wanted: it takes seconds, and other data do without."""
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _read(name: str, root: Path, source: str) -> ImageData:
    kind = _torchvisions(name)
    try:
        train, test = kind(root, train=True), kind(root, train=False)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root / kind.base_folder} is damaged: a file is missing, unreadable or has another "
            f"MD5 sum than {_TITLES[name]}'s. Delete this folder and run again ({error})"
        ) from error
    images = [torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous() for split in (train, test)]
    return ImageData(
        name=name,
        classes=tuple(train.classes),
        train_images=images[0],
        train_labels=torch.tensor(train.targets),
        test_images=images[1],
        test_labels=torch.tensor(test.targets),
        source=f"{source}, MD5 verified: {len(images[0]):,} train and {len(images[1]):,} test images",
    )


def _read_folder(name: str, folder: Path, root: Path) -> ImageData:
    data = load_folder(folder, root, image_size=32, name=name)
    expected = int(name.removeprefix("cifar"))
    if len(data.classes) != expected:
        raise DataError(
            f"{folder}: expected the {expected} classes of {_TITLES[name]}, found {len(data.classes)}; "
            "move other images elsewhere and name their folder"
        )
    source = (
        f"{_TITLES[name]} from the image folder {folder}, whose pixels may differ from the original's "
        f"(JPEG is lossy): {len(data.train_images):,} train and {len(data.test_images):,} test images"
    )
    return dataclasses.replace(data, source=source)


def _unpack(name: str, root: Path) -> None:
    from torchvision.datasets.utils import check_integrity, extract_archive

    kind = _torchvisions(name)
    archive = root / kind.filename
    try:
        if not check_integrity(archive, kind.tgz_md5):
            raise DataError(
                f"{archive} is damaged or cut short: its MD5 sum is not {kind.tgz_md5}. "
                "Delete it and run again, and it is downloaded anew"
            )
        with _staging(root, kind.base_folder) as staging:
            extract_archive(archive, staging)
    except OSError as error:
        raise DataError(f"{archive} cannot be unpacked: {error}") from error


def _download(name: str, root: Path) -> None:
    kind, title = _torchvisions(name), _TITLES[name]
    advice = (
        f"Put {kind.filename} into {root}, or its images into {root / name}/train/<class> and "
        f"{root / name}/test/<class>, or choose the embedded set, which needs neither disk nor network"
    )
    if os.environ.get("FASTPRUNE_OFFLINE", "") not in ("", "0"):
        raise DataUnavailableError(f"{title} is not in {root}, and FASTPRUNE_OFFLINE forbids a download. {advice}")
    print(f"{title} is not in {root}: trying to download it", file=sys.stderr)
    try:
        with _staging(root, kind.base_folder) as staging, _socket_timeout(TIMEOUT_S), _quiet():
            kind(staging, download=True)
    except (
        OSError,
        HTTPException,
        RuntimeError,
    ) as error:  # RuntimeError: torchvision's, for a wrong MD5 sum
        raise DataUnavailableError(f"{title} is not in {root}, and the download failed ({error}). {advice}") from error


@contextlib.contextmanager
def _staging(root: Path, result: str) -> Iterator[Path]:
    """A temporary folder in ``root``; on success its folder ``result`` moves up, the rest goes."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".unpacking-") as staging:
        yield Path(staging)
        if not (root / result).exists():  # another process may have been faster
            os.replace(Path(staging, result), root / result)


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torchvision's words off standard output, and its progress bar off anything but a terminal."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield
