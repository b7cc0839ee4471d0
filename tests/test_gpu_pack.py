"""`make gpu-pack`: images packed without their common header, and the size of it all."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from gpu import images, pack
from PIL import Image


def picture(path: Path, seed: int, quality: int = 90) -> bytes:
    """A JPEG of 32×32 random pixels; the header depends on the quality alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "JPEG", quality=quality)
    return path.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eight images that share their header, one that does not, one cut short in its header, and a text."""
    made = tmp_path / "made"
    for i in range(8):
        picture(made / ("train" if i < 5 else "test") / "cat" / f"{i}.jpg", i)
    picture(made / "train" / "dog" / "other.jpg", 9, quality=40)
    (made / "train" / "dog" / "cut.jpg").write_bytes(picture(made / "test" / "dog" / "whole.jpg", 10)[:100])
    (made / "test" / "dog" / "empty.txt").touch()
    (made / "README").write_text("of neither split")
    return made


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for split in images.SPLITS for path in (folder / split).rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_images_come_back_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "images", tmp_path / "back"
    before = contents(folder)
    assert images.pack(folder, packed) == len(before) == 12
    assert images.unpack(packed, back) == 12
    assert contents(back) == before
    assert not (back / "README").exists()
    # Nine of them share a header, stored once, as hexadecimal digits that are deflated.
    header = images.header_of(before["test/dog/whole.jpg"])
    assert len(header) > 500
    assert packed.stat().st_size < sum(map(len, before.values())) - 7 * len(header)


def test_the_header_ends_where_compressed_pixels_begin(folder: Path) -> None:
    one, same = ((folder / "train" / "cat" / f"{i}.jpg").read_bytes() for i in range(2))
    header = images.header_of(one)
    assert same.startswith(header)
    assert header[-14:-12] == b"\xff\xda"  # the segment of 12 bytes that starts a scan
    assert images.header_of((folder / "train" / "dog" / "other.jpg").read_bytes()) != header
    for other in (b"", b"\xff\xd8", header[:100], b"GIF89a"):
        assert images.header_of(other) == b""


def test_a_folder_without_a_split_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "cat" / "0.jpg", 0)
    with pytest.raises(ValueError, match="test has no files: expected train/<class>"):
        images.pack(tmp_path, tmp_path / "images")


def test_a_damaged_pack_is_an_error(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "images"
    images.pack(folder, packed)
    whole = packed.read_bytes()
    for damaged in (whole[:-1], whole[:40], b"", b"something else"):
        packed.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is not a whole pack of images .*: make it again"):
            images.unpack(packed, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_pack_that_is_too_large_is_refused(tmp_path: Path) -> None:
    made, target = tmp_path / "made", tmp_path / ".gpu"
    for name, size in (("wheels/fastprune.whl", 3_000), ("cifar10.jpegs", 900_000), ("run", 100)):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(bytes(size))
    target.mkdir()
    (target / "run").write_text("of before")
    with pytest.raises(
        ValueError, match=r"has 0.9 MB, more than the 0.903099 MB .*: cifar10.jpegs 0.9 MB, wheels/fast"
    ):
        pack.finish(made, target, limit=903_099)
    assert (target / "run").read_text() == "of before"
    assert pack.finish(made, target, limit=903_100) == 903_100
    assert (target / "wheels" / "fastprune.whl").exists()
    assert not made.exists()


def test_what_cannot_be_packed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    assert pack.main(["--cifar", str(tmp_path / "nowhere")]) == 1
    assert f"{tmp_path / 'nowhere' / 'train'} has no files" in capsys.readouterr().err
    assert not (tmp_path / ".gpu").exists()


def test_the_whole_pack(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack, "ROOT", tmp_path)
    monkeypatch.setattr(pack, "carry", lambda wheels: (wheels / "needed.whl").touch())
    monkeypatch.setattr(pack, "wheel", lambda wheels, build: (wheels / "fastprune.whl").touch())
    monkeypatch.setattr(pack.sources, "digest", lambda root: "0123")
    assert pack.main(["--cifar", str(folder)]) == 0
    made = sorted(path.relative_to(tmp_path / ".gpu").as_posix() for path in (tmp_path / ".gpu").rglob("*.*"))
    assert made == ["cifar10.jpegs", "pack.json", "wheels/fastprune.whl", "wheels/needed.whl"]
    assert os.access(tmp_path / ".gpu" / "run", os.X_OK)
