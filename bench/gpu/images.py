"""A folder of JPEG files as one file, which stores the header they share once.

A JPEG of CIFAR-10's 32×32 pixels is two thirds header, and one encoder gives all of them the same one.

Layout: MAGIC, the index's length (8 bytes, little-endian), the index (JSON, deflated), then the files' bytes, one after
another, those that begin with the header without it. The index is
`{"header": hexadecimal, "sha256": of those bytes, "files": [[path, length, whether the header belongs before it]]}`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from pathlib import Path

MAGIC = b"JPEGS\x00\x00\x01"
SPLITS = ("train", "test")
START, START_OF_SCAN = b"\xff\xd8", 0xDA


def header_of(content: bytes) -> bytes:
    """A JPEG's bytes up to its first compressed ones; none of what is not a JPEG."""
    at = len(START)
    if not content.startswith(START):
        return b""
    while content[at : at + 1] == b"\xff" and len(content) >= at + 4:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4], "big")
        at += 2 + length
        if marker == START_OF_SCAN:
            return content[:at]
    return b""


def pack(folder: Path, target: Path) -> int:
    """Write all files of both splits in `folder` to `target`, and return how many.

    Raises:
        ValueError: if a split is missing.
    """
    paths = [path for split in SPLITS for path in sorted((folder / split).rglob("*")) if path.is_file()]
    missing = [split for split in SPLITS if not any(path.is_relative_to(folder / split) for path in paths)]
    if missing:
        raise ValueError(f"{folder / missing[0]} has no files: expected train/<class>/*.jpg and test/<class>/*.jpg")
    contents = [path.read_bytes() for path in paths]
    header = Counter(map(header_of, contents)).most_common(1)[0][0]
    files, parts = [], []
    for path, content in zip(paths, contents):
        shared = bool(header) and content.startswith(header)
        parts.append(content[len(header) :] if shared else content)
        files.append([path.relative_to(folder).as_posix(), len(parts[-1]), shared])
    body = b"".join(parts)
    described = {"header": header.hex(), "sha256": hashlib.sha256(body).hexdigest(), "files": files}
    index = zlib.compress(json.dumps(described).encode(), 9)
    target.write_bytes(MAGIC + len(index).to_bytes(8, "little") + index + body)
    return len(files)


def unpack(source: Path, folder: Path) -> int:
    """Write the files of `source` under `folder`, as they were, and return how many.

    Raises:
        ValueError: if `source` is something else or damaged.
    """
    content = source.read_bytes()
    begin = len(MAGIC) + 8
    end = begin + int.from_bytes(content[len(MAGIC) : begin], "little")
    try:
        if not content.startswith(MAGIC):
            raise ValueError("it does not begin as one")
        described = json.loads(zlib.decompress(content[begin:end]))
        if hashlib.sha256(content[end:]).hexdigest() != described["sha256"]:
            raise ValueError("its content is not what was written")
    except (ValueError, zlib.error) as error:
        raise ValueError(f"{source} is not a whole pack of images ({error}): make it again") from error
    header, made = bytes.fromhex(described["header"]), set()
    for name, length, shared in described["files"]:
        path = folder / name
        if path.parent not in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.add(path.parent)
        path.write_bytes((header if shared else b"") + content[end : end + length])
        end += length
    return len(described["files"])
