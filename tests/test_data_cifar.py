"""CIFAR on disk and over the network, with a small archive of the same form and a server on this machine."""

import contextlib
import hashlib
import pickle
import shutil
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import fastprune.data.cifar as cifar_module
from fastprune.data import DataError, DataUnavailableError, ImageData, load

CLASSES = [f"class{i}" for i in range(10)]
ARCHIVE, UNPACKED = "cifar-10-python.tar.gz", "cifar-10-batches-py"


def rows(seed: int, count: int = 20) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A CIFAR-10 archive of 40 train and 20 test images, whose MD5 sums torchvision is told to expect."""
    source = tmp_path / "made" / UNPACKED
    source.mkdir(parents=True)
    md5 = {}
    for seed, name in enumerate(("data_batch_1", "data_batch_2", "test_batch")):
        content = {"data": rows(seed), "labels": [(i + seed) % 10 for i in range(20)]}
        (source / name).write_bytes(pickle.dumps(content))
    (source / "batches.meta").write_bytes(pickle.dumps({"label_names": CLASSES}))
    for file in source.iterdir():
        md5[file.name] = hashlib.md5(file.read_bytes()).hexdigest()
    path = tmp_path / "made" / ARCHIVE
    with tarfile.open(path, "w:gz") as tar:
        tar.add(source, UNPACKED)
    kind = datasets.CIFAR10
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(kind, "train_list", [[name, md5[name]] for name in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5["batches.meta"]})
    return path


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPRUNE_OFFLINE", "1")
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


class Server:
    """Serves ``body``; announces ``length`` bytes; ``status`` other than 200 has no body; may be silent."""

    def __init__(self) -> None:
        self.body, self.length, self.status, self.silent_s = b"", 0, 200, 0.0
        self.requests = 0


@pytest.fixture
def server(archive: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            state.requests += 1
            time.sleep(state.silent_s)
            self.send_response(state.status)
            self.send_header("Content-Length", str(state.length or len(state.body)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if state.status == 200:
                with contextlib.suppress(ConnectionError):  # a client that has given up
                    self.wfile.write(state.body)

        def log_message(self, *_: object) -> None: ...

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    listener.block_on_close = False
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.body = archive.read_bytes()
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{listener.server_port}/{ARCHIVE}")
    monkeypatch.delenv("FASTPRUNE_OFFLINE")
    yield state
    listener.shutdown()
    listener.server_close()


def check(data: ImageData) -> None:
    assert data.name == "cifar10"
    assert data.classes == tuple(CLASSES)
    train = torch.from_numpy(np.concatenate([rows(0), rows(1)])).view(40, 3, 32, 32)
    assert torch.equal(data.train_images, train)
    assert data.train_images.is_contiguous()
    assert torch.equal(data.test_images, torch.from_numpy(rows(2)).view(20, 3, 32, 32))
    assert data.train_labels.tolist() == [i % 10 for i in range(20)] + [(i + 1) % 10 for i in range(20)]
    assert data.test_labels.tolist() == [(i + 2) % 10 for i in range(20)]


def make_image_folder(root: Path, classes: int = 10) -> None:
    for split in ("train", "test"):
        for c in range(classes):
            target = root / "cifar10" / split / f"class{c}"
            target.mkdir(parents=True)
            Image.new("RGB", (32, 32), (20 * c, 0, 0)).save(target / "0.png")


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_unpacked_folder(archive: Path, root: Path, name: str) -> None:
    shutil.copytree(archive.parent / UNPACKED, root / UNPACKED)
    data = load(name, root=root)
    check(data)
    assert "CIFAR-10 found in" in data.source
    assert str(root / UNPACKED) in data.source
    assert load(name, root=root, image_size=16).train_images.shape == (40, 3, 16, 16)


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_archive_is_unpacked_once(archive: Path, root: Path, name: str) -> None:
    root.mkdir()
    shutil.copy(archive, root)
    data = load(name, root=root)
    check(data)
    assert "unpacked from" in data.source
    assert sorted(path.name for path in root.iterdir()) == [UNPACKED, ARCHIVE]
    assert "found in" in load(name, root=root).source


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_damaged_archive_is_an_error(archive: Path, root: Path, name: str) -> None:
    root.mkdir()
    (root / ARCHIVE).write_bytes(archive.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"damaged or cut short.*Delete it") as error:
        load(name, root=root)
    assert not isinstance(error.value, DataUnavailableError)
    assert [path.name for path in root.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("file", ["data_batch_2", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_folder_is_an_error(archive: Path, root: Path, file: str, damage: str) -> None:
    shutil.copytree(archive.parent / UNPACKED, root / UNPACKED)
    if damage == "missing":
        (root / UNPACKED / file).unlink()
    else:
        (root / UNPACKED / file).write_bytes(b"something else")
    with pytest.raises(DataError, match=r"is damaged.*Delete this folder"):
        load("auto", root=root)


def test_disk_full_while_unpacking(archive: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.mkdir()
    shutil.copy(archive, root)

    def no_space(_: object, target: Path) -> None:
        (target / "half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", no_space)
    with pytest.raises(DataError, match="No space left"):
        load("cifar10", root=root)
    assert [path.name for path in root.iterdir()] == [ARCHIVE]


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_image_folder_is_used_and_said_so(root: Path, name: str) -> None:
    make_image_folder(root)
    data = load(name, root=root)
    assert data.name == "cifar10"
    assert data.train_images[3].unique().tolist() == [0, 60]
    assert "from the image folder" in data.source
    assert "may differ" in data.source


def test_image_folder_of_something_else(root: Path) -> None:
    make_image_folder(root, classes=3)
    with pytest.raises(DataError, match="expected the 10 classes of CIFAR-10, found 3"):
        load("auto", root=root)


@pytest.mark.parametrize("name", ["auto", "cifar10"])
def test_download(server: Server, root: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = socket.getdefaulttimeout()
    data = load(name, root=root)
    check(data)
    assert "CIFAR-10 downloaded to" in data.source
    assert [path.name for path in root.iterdir()] == [UNPACKED]
    assert socket.getdefaulttimeout() == before
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [f"CIFAR-10 is not in {root}: trying to download it"]
    server.requests = 0
    assert "found in" in load(name, root=root).source
    assert server.requests == 0


def break_server(server: Server, how: str) -> str:
    """Make the download fail; a word of the reason that is to be shown."""
    if how == "status":
        server.status = 503
        return "503"
    if how == "other-file":
        server.body = b"<html>please log in</html>"
        return "corrupted"
    if how == "cut":
        server.length, server.body = len(server.body), server.body[:100]
        return "corrupted"
    server.silent_s = 3.0
    return "timed out"


@pytest.mark.parametrize("how", ["status", "other-file", "cut", "silent"])
def test_failed_download(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(cifar_module, "TIMEOUT_S", 0.3)
    reason = break_server(server, how)
    start = time.perf_counter()
    with pytest.raises(DataUnavailableError, match=f"{reason}.*Put {ARCHIVE} into"):
        load("cifar10", root=root)
    assert time.perf_counter() - start < 2.5
    assert list(root.iterdir()) == []
    data = load("auto", root=root)
    assert data.name == "embedded"
    assert "chosen because CIFAR-10 is not in" in data.source
    assert reason in data.source
    assert list(root.iterdir()) == []


def test_root_that_cannot_be_made(server: Server, root: Path) -> None:
    root.write_text("a file is in the way")
    data = load("auto", root=root)
    assert data.name == "embedded"
    assert "File exists" in data.source


def test_offline_tries_nothing(server: Server, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPRUNE_OFFLINE", "1")
    with pytest.raises(DataUnavailableError, match="FASTPRUNE_OFFLINE forbids"):
        load("cifar10", root=root)
    with pytest.raises(DataUnavailableError, match="CIFAR-100"):
        load("cifar100", root=root)
    assert "FASTPRUNE_OFFLINE" in load("auto", root=root).source
    assert server.requests == 0
    assert not root.exists()
    monkeypatch.setenv("FASTPRUNE_OFFLINE", "0")
    check(load("cifar10", root=root))


def test_a_folder_named_like_a_data_set(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image_folder(root)
    monkeypatch.chdir(root)
    for path in ("./cifar10", Path("cifar10")):
        assert "image folder cifar10: 10 classes, 10 train" in load(path, root=root).source
