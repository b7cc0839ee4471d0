"""Data sets held in memory, and their augmentation in batches.

``load`` gives CIFAR-10, CIFAR-100, any image folder or the embedded set of generated shapes as ``ImageData``;
``Augment`` and ``normalize`` turn its uint8 images into training batches on the device.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from .augment import Augment, normalize
from .cifar import NAMES as _CIFAR_NAMES
from .cifar import load_cifar
from .folder import load_folder
from .images import DataError, DataUnavailableError, ImageData
from .shapes import embedded

__all__ = [
    "Augment",
    "DataError",
    "DataUnavailableError",
    "ImageData",
    "default_root",
    "embedded",
    "load",
    "load_cifar",
    "load_folder",
    "normalize",
]


def default_root() -> Path:
    """Where data sets are kept: ``$FASTPRUNE_DATA``, else ``$XDG_CACHE_HOME/fastprune``.

    Where that is not set either, ``~/.cache/fastprune``.
    """
    if chosen := os.environ.get("FASTPRUNE_DATA"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastprune"


def load(
    name: str | Path = "auto", *, root: Path | None = None, image_size: int | None = None, seed: int = 0
) -> ImageData:
    """Load a data set into memory, on the CPU.

    Args:
        name: ``"cifar10"`` or ``"cifar100"`` (see ``load_cifar``), ``"embedded"``, the path of an image
            folder (see ``load_folder``; ``./cifar10`` or a ``Path`` where the folder has one of these names),
            or ``"auto"``: CIFAR-10 where it is on disk or can be downloaded, else the embedded set.
        root: folder of data sets and caches; ``default_root()`` without it.
        image_size: side of the square images, in pixels; ``None`` for their own.
        seed: of the embedded set.

    Returns:
        The data; its ``source`` says in one line what was chosen and why.

    Raises:
        DataError: data on disk that is damaged or laid out otherwise, or a name that is none of the above.
            ``"auto"`` does not pass over a damaged CIFAR-10.
        DataUnavailableError: CIFAR asked for by name, not on disk and not to be downloaded.
        ValueError: ``image_size`` below 1, ``seed`` below 0.
    """
    root = default_root() if root is None else Path(root)
    if isinstance(name, Path) or name not in ("auto", "embedded", *_CIFAR_NAMES):
        return _load_named_folder(name, root, image_size)
    if name == "embedded":
        data = embedded(seed)
    elif name == "auto":
        data = _load_auto(root, seed)
    else:
        data = load_cifar(name, root)
    return data if image_size is None else data.resize(image_size)


def _load_auto(root: Path, seed: int) -> ImageData:
    try:
        return load_cifar("cifar10", root)
    except DataUnavailableError as reason:
        data = embedded(seed)
        return dataclasses.replace(data, source=f"{data.source}; chosen because {reason}")


def _load_named_folder(name: str | Path, root: Path, image_size: int | None) -> ImageData:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        known = ", ".join(("auto", *_CIFAR_NAMES, "embedded"))
        raise DataError(f"data {str(name)!r}: expected one of {known} or the path of an image folder; there is none")
    return load_folder(folder, root, image_size=image_size)
