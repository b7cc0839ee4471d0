"""Checkpoints without pickle: one safetensors file has the tensors, and all else as JSON in its header.

The header's metadata has one key, `fastprune.checkpoint`, with a JSON object `{"version", "sha256", "tree"}`.
`tree` is the saved state, in which a tensor stands as `{"tensor": name}`. `sha256` is the digest of the whole
file with that field zeroed, so that any damaged byte, of header or tensors, is found before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import safetensors.torch
import torch
from torch import Tensor

__all__ = [
    *("CheckpointError", "latest", "load", "plain", "previous_path", "read_sealed", "save", "write_atomically"),
    "write_sealed",
]

_KEY = "fastprune.checkpoint"
_VERSION = 1
_NO_DIGEST = "0" * 64
_MAX_HEADER = 100_000_000  # bytes; readers of safetensors refuse longer ones
_MAX_DEPTH = 100  # a tree deeper than this is taken for a cycle
_DTYPES = {
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
}


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file, what is wrong with it, and what to do."""


def previous_path(path: Path) -> Path:
    """Return where the checkpoint before the one at `path` is kept: `<stem>.previous<suffix>`."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def latest(path: Path) -> Path:
    """Return `path`, or `previous_path(path)` where only that is: a process was killed between two renames."""
    previous = previous_path(path)
    return previous if previous.exists() and not path.exists() else path


def save(path: Path, state: Any) -> None:
    """Write `state` to `path`; the checkpoint that was there moves to `previous_path(path)`.

    The new file is complete on disk before the old one moves: at every instant a complete checkpoint lies at
    `path` or at `previous_path(path)`.

    Args:
        path: the file, in an existing folder.
        state: a tree of dict (or OrderedDict, which comes back as dict) with str or int keys, list, tuple,
            Tensor, int, float, bool, str and None. Tensors are dense and real, of any device and strides;
            those that share storage are stored one by one.

    Raises:
        TypeError: for anything else in the tree; the message names the place.
        ValueError: for a tree deeper than 100 levels, or more than 100 MB of it outside tensors.
        OSError: where writing fails (disk full, no such folder); what was there before stays as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    write_sealed(path, tensors, _KEY, {"version": _VERSION}, {"tree": tree}, "checkpoint", keep=previous_path(path))


def write_sealed(
    path: Path,
    tensors: dict[str, Tensor],
    key: str,
    version: dict[str, int],
    content: dict[str, Any],
    what: str,
    keep: Path | None = None,
) -> None:
    """Write a safetensors file whose header has `version`, a checksum of the whole file and `content` under `key`.

    Args:
        path, keep: as for `write_atomically`.
        tensors: dense, contiguous, on the CPU.
        key: of the header's metadata.
        version: `{"version": number}`.
        content: JSON values.
        what: is written, as in "the checkpoint".

    Raises:
        ValueError: for more than 100 MB outside the tensors.
        OSError: as `write_atomically`.
    """
    _unshare(tensors)
    text = json.dumps({**version, "sha256": _NO_DIGEST, **content}, allow_nan=False)
    blob = memoryview(safetensors.torch.save(tensors, metadata={key: text}))
    header_end = 8 + int.from_bytes(blob[:8], "little")
    if header_end - 8 > _MAX_HEADER:
        raise ValueError(
            f"the state has {header_end - 8:,} bytes outside its tensors, "
            f"and at most {_MAX_HEADER:,} can be saved: put long lists into tensors"
        )
    header, body = bytes(blob[:header_end]), blob[header_end:]
    # The metadata comes first in the header and the digest before the content: the first 64 zeros are its field.
    header = header.replace(_NO_DIGEST.encode(), _digest(header, body).encode(), 1)
    write_atomically(path, [header, body], what=f"the {what}", keep=keep)


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """Return the tree that `save` wrote to `path`, equal to the last bit, its tensors on `device`.

    Raises:
        CheckpointError: for a missing, unreadable, truncated, damaged or foreign file, or another version.
            Where `previous_path(path)` holds a complete checkpoint, the message says how to go on from it.
    """
    try:
        tree, tensors = _read(path)
    except CheckpointError as error:
        previous = previous_path(path)
        try:
            _read(previous)
        except CheckpointError:
            raise error from None
        raise CheckpointError(
            f"{error}. The checkpoint before it is complete: to go on from that one, load {previous}, "
            f"or rename it to {path.name}"
        ) from None
    return _decode(tree, {name: tensor.to(device) for name, tensor in tensors.items()})


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview], what: str, keep: Path | None = None) -> None:
    """Write the chunks to `path` so that it never holds a part of them.

    They go to a file of their own beside it, `<name>.<something>.tmp`, are synced, and that file takes the place of
    `path`. With `keep`, the file that was at `path` is moved there first.

    Raises:
        OSError: of the same errno, saying `what` was being written; `path` is as before, no `.tmp` is left.
    """
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:12]}.tmp")  # no two processes write the same
    moved = False
    try:
        with open(temporary, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(path, keep)
                moved = True
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:  # an interrupt, too, leaves the old file in its place and nothing beside it
        if keep is not None and moved and not path.exists():
            os.replace(keep, path)
        if temporary.is_file():
            temporary.unlink()
        if isinstance(error, OSError):
            kept = "; the one before it is kept" if moved or (keep is not None and path.exists()) else ""
            text = f"could not write {what}: {error.strerror or error}{kept}"
            raise OSError(error.errno, text, str(path)) from error
        raise


def _sync_folder(folder: Path) -> None:
    """Make the renames in `folder` last through a power cut."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _digest(header: bytes, body: memoryview) -> str:
    digest = hashlib.sha256(header)
    digest.update(body)
    return digest.hexdigest()


def _encode(node: Any, place: str, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    """Return `node` as JSON values and put its tensors into `tensors`; `place` is how one would index it."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"a checkpoint nests at most {_MAX_DEPTH} levels, is there a cycle? At {place}")
    kind = type(node)
    if node is None or kind in (bool, str):
        return node
    if kind is int:
        return node if node.bit_length() < 64 else {"int": hex(node)}
    if kind is float:
        return node if math.isfinite(node) else {"float": struct.pack(">d", node).hex()}
    if kind in (list, tuple):
        items = [_encode(value, f"{place}[{i}]", tensors, depth + 1) for i, value in enumerate(node)]
        return items if kind is list else {"tuple": items}
    if kind in (dict, OrderedDict):
        for key in node:
            if type(key) not in (str, int):
                raise TypeError(
                    f"a checkpoint's dict keys are str or int, not {type(key).__name__}: {key!r} in {place}"
                )
        pairs = ((key, _encode(value, f"{place}[{key!r}]", tensors, depth + 1)) for key, value in node.items())
        return {"dict": [[_encode(key, place, tensors), value] for key, value in pairs]}
    if isinstance(node, Tensor):
        # The number makes the name unique, the place makes it readable in other tools.
        name = f"{len(tensors)} {ascii(place)[1:-1]}"
        tensors[name] = plain(node, place)
        return {"tensor": name}
    raise TypeError(
        f"a checkpoint holds dict, list, tuple, Tensor, int, float, bool, str and None, "
        f"not {kind.__module__}.{kind.__qualname__}, at {place}"
    )


def plain(tensor: Tensor, place: str, what: str = "checkpoint") -> Tensor:
    """Return `tensor` detached and contiguous on the CPU, itself where it is so already.

    Raises:
        TypeError: for one that a file cannot hold, naming its `place` in `what` is written.
    """
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES:
        found = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise TypeError(f"a {what} holds dense tensors of bool, integers or real floats, not {found}, at {place}")
    return tensor.detach().resolve_neg().cpu().contiguous()


def _unshare(tensors: dict[str, Tensor]) -> None:
    """Copy those tensors whose storage an earlier one uses: the format stores each by itself."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    ((tag, value),) = node.items()
    if tag == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in value}
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in value)
    if tag == "tensor":
        return tensors[value]
    return int(value, 16) if tag == "int" else struct.unpack(">d", bytes.fromhex(value))[0]


def _read(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """Return the JSON tree and the tensors by name."""
    stored, tensors = read_sealed(path, _KEY, _VERSION, "checkpoint")
    return stored["tree"], tensors


def read_sealed(path: Path, key: str, version: int, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what `write_sealed` put under `key`, and the tensors by name.

    The tensors take as much memory as they have in the file, and twice that while they are read, whatever its header
    says; the JSON, once it is made of objects, up to 40 bytes for each of its own.

    Raises:
        CheckpointError: for a missing, unreadable, truncated, damaged or foreign file, or another version.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = file.read(8)
            header_size = int.from_bytes(length, "little")
            if len(length) < 8 or header_size > min(size - 8, _MAX_HEADER):
                raise CheckpointError(f"{path} ({size:,} bytes) is truncated, or not a {what}")
            header = length + file.read(header_size)
            stored = _metadata(path, header, key, version, what)
            file.seek(0)
            blob = file.read()
    except FileNotFoundError:
        raise CheckpointError(f"there is no {what} {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read the {what} {path}: {error.strerror or error}") from error
    zeroed = header.replace(str(stored.get("sha256")).encode(errors="replace"), _NO_DIGEST.encode(), 1)
    if not blob.startswith(header) or _digest(zeroed, memoryview(blob)[len(header) :]) != stored.get("sha256"):
        raise CheckpointError(f"{path} is truncated or damaged: its contents do not match its checksum")
    try:
        return stored, safetensors.torch.load(blob)
    except Exception as error:  # its own error class, and others for headers that no one writes by accident
        raise CheckpointError(f"{path} is damaged, or not a {what}: {error}") from error


def _metadata(path: Path, header: bytes, key: str, version: int, what: str) -> dict[str, Any]:
    """Return our JSON object from a safetensors header, of the version that we read."""
    try:
        outer = json.loads(header[8:].decode())
        metadata = outer.get("__metadata__", {}) if isinstance(outer, dict) else {}
        stored = json.loads(metadata[key])
        found = stored["version"]
    except (KeyError, TypeError):
        raise CheckpointError(f"{path} was not written by fastprune: its header lacks {key!r}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged, or not a {what}: its header is not JSON") from None
    if found != version:
        raise CheckpointError(
            f"{path} has {what} version {found!r}, this fastprune reads {version}: "
            "load it with the release that wrote it"
        )
    return stored
