"""A state comes back to the last bit, damage is a CheckpointError, and no write loses the last good file."""

import errno
import json
import math
import os
import resource
import struct
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastprune import checkpoint
from fastprune.checkpoint import CheckpointError, latest, load, previous_path, save

INTEGERS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint64,
)
DTYPES = (*INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def same(a: Any, b: Any) -> bool:
    """Equal in type, order and bits, all the way down."""
    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and (a.dtype, a.shape) == (b.dtype, b.shape)
            and a.detach().contiguous().reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, dict):
        keys = [(type(k), k) for k in a] == [(type(k), k) for k in b]
        return keys and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    count = math.prod(shape) * dtype.itemsize
    raw = draw(st.binary(min_size=count, max_size=count))
    if not raw:
        return torch.empty(shape, dtype=dtype)
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
    return tensor.mT if tensor.ndim >= 2 and draw(st.booleans()) else tensor


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
KEYS = st.text(st.characters(), max_size=5) | st.integers()
TREES = st.recursive(
    SCALARS | tensors(),
    lambda tree: (
        st.lists(tree, max_size=4) | st.lists(tree, max_size=4).map(tuple) | st.dictionaries(KEYS, tree, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(state=TREES)
def test_any_tree_comes_back_to_the_last_bit(tmp_path: Path, state: Any) -> None:
    path = tmp_path / "any.safetensors"
    save(path, state)
    assert same(load(path), state)


def test_awkward_values_come_back(tmp_path: Path) -> None:
    payload_nan = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]
    state = {
        "floats": [0.1, -0.0, math.inf, -math.inf, math.nan, payload_nan, 5e-324, 1.7976931348623157e308],
        "ints": [0, -1, 2**63, -(2**200), 10**5000],
        "looks like ours": {"tensor": "0", "tuple": [1], "float": "7ff0", "dict": [["a", 1]]},
        "__metadata__": torch.ones(2),
        1: "an int key",
        "1": "a str key",
        "zeros": "0" * 64,
        "surrogate \ud800": "\ud800",
        "empty": [{}, [], (), ""],
        "numbers": (1, 1.0, True, "1", None),
    }
    path = tmp_path / "awkward.safetensors"
    save(path, state)
    assert same(load(path), state)


def test_shared_strided_and_parameter_tensors_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    weight = torch.nn.Parameter(base.clone())
    state = {
        "whole": base,
        "again": base,
        "row": base[1],
        "last": base.to(memory_format=torch.channels_last),
        "strided": base[:, ::2],
        "expanded": torch.tensor(3).expand(4),
        "parameter": weight,
    }
    path = tmp_path / "shared.safetensors"
    save(path, state)
    back = load(path)
    for key, tensor in state.items():
        assert torch.equal(back[key], tensor), key
        assert back[key].is_contiguous(), key
    assert type(back["parameter"]) is torch.Tensor
    assert not back["parameter"].requires_grad
    back["whole"].zero_()  # what was shared is not shared any more
    assert torch.equal(back["again"], base)


def test_a_training_state_comes_back_into_model_optimizer_and_generator(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(1)
    path = tmp_path / "training.safetensors"
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": generator.get_state()}
    save(path, state)
    expected = torch.rand(3, generator=generator)
    back = load(path)
    assert list(back["model"]) == list(model.state_dict())
    assert same(back["optimizer"], optimizer.state_dict())
    model.load_state_dict(back["model"])
    optimizer.load_state_dict(back["optimizer"])
    generator.set_state(back["rng"])
    assert torch.equal(torch.rand(3, generator=generator), expected)


def test_the_file_is_ordinary_safetensors_with_readable_names(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    save(path, {"model": {"conv.weight": torch.ones(2)}})
    assert safetensors.torch.load_file(path)["0 state['model']['conv.weight']"].tolist() == [1, 1]
    assert b"pickle" not in path.read_bytes()


def test_tensors_arrive_on_the_device_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "device.safetensors"
    save(path, [torch.ones(2)])
    assert load(path)[0].device.type == "cpu"
    assert load(path, device="meta")[0].device.type == "meta"


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Point(1, 2), "Point"),
        ({1, 2}, "builtins.set"),
        (b"bytes", "builtins.bytes"),
        (1j, "builtins.complex"),
        (Path("p"), "Path"),
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(2, 2).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(2, device="meta"), "meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_types_are_refused_with_their_place(tmp_path: Path, value: Any, named: str) -> None:
    with pytest.raises(TypeError) as caught:
        save(tmp_path / "bad.safetensors", {"a": [0, (1, {"b": value})]})
    assert named in str(caught.value)
    assert "state['a'][1][1]['b']" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", [True, 1.0, None, (1,)])
def test_other_keys_are_refused_with_their_place(tmp_path: Path, key: Any) -> None:
    with pytest.raises(TypeError, match=r"keys are str or int, not \w+: .* in state\['a'\]"):
        save(tmp_path / "bad.safetensors", {"a": {key: 1}})


def test_deep_trees_are_saved_and_cycles_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    deep: Any = torch.ones(1)
    for level in range(100):
        deep = {"next": deep} if level % 2 else (deep,)
    save(path, deep)
    assert same(load(path), deep)
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ValueError, match="is there a cycle"):
        save(path, cycle)


def test_more_text_than_a_reader_takes_is_refused_when_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_MAX_HEADER", 1000)
    with pytest.raises(ValueError, match=r"bytes outside its tensors, and at most 1,000"):
        save(tmp_path / "long.safetensors", list(range(1000)))
    assert list(tmp_path.iterdir()) == []


# ---- writing ----


def test_the_checkpoint_before_is_kept_and_nothing_else_left(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    for step in range(3):
        save(path, {"step": step})
    assert load(path) == {"step": 2}
    assert previous_path(path) == tmp_path / "last.previous.safetensors"
    assert load(previous_path(path)) == {"step": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.previous.safetensors", "last.safetensors"]


def test_a_complete_checkpoint_exists_at_every_step_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    save(path, 0)
    save(path, 1)
    calls: list[str] = []

    def check() -> None:
        complete = [p for p in (path, previous_path(path)) if p.exists()]
        assert [load(p) for p in complete], "no complete checkpoint"
        assert all(load(p) in (0, 1, 2) for p in complete)

    def spied(name: str, original: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            check()
            original(*arguments)
            check()
            calls.append(name)

        return call

    for name in ("replace", "fsync"):
        monkeypatch.setattr(os, name, spied(name, getattr(os, name)))
    save(path, 2)
    assert calls == ["fsync", "replace", "replace", "fsync"]  # contents before names; the folder last
    assert (load(path), load(previous_path(path))) == (2, 1)


def test_two_that_write_one_file_leave_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    save(path, {"step": 0})
    replace, nested = os.replace, []

    def while_another_writes(*names: Any) -> None:
        if not nested:  # before the first rename of the one, the other does all
            nested.append(True)
            save(path, {"step": 2})
            path.unlink()
        replace(*names)

    monkeypatch.setattr(os, "replace", while_another_writes)
    save(path, {"step": 1})
    assert load(path) == {"step": 1}
    assert load(previous_path(path)) == {"step": 0}
    assert len(list(tmp_path.iterdir())) == 2


def test_the_latest_is_the_one_before_where_only_that_is(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    assert latest(path) == path
    save(path, 1)
    save(path, 2)
    assert load(latest(path)) == 2
    path.unlink()
    assert load(latest(path)) == 1


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rest(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save(path, {"step": 1})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # the kernel refuses longer files
    try:
        with pytest.raises(OSError, match=r"could not write the checkpoint: .*; the one before it is kept") as caught:
            save(path, torch.zeros(1_000_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "first replace", "second replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "last.safetensors"
    save(path, 1)
    original, replaces = os.replace, 0

    def replace(*arguments: Any) -> None:
        nonlocal replaces
        replaces += 1
        if (failing, replaces) in (("first replace", 1), ("second replace", 2)):
            raise error
        original(*arguments)

    def fsync(_: int) -> None:
        if failing == "fsync":
            raise error

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(type(error)):
        save(path, 2)
    assert load(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "last.safetensors"
    with pytest.raises(FileNotFoundError, match="could not write the checkpoint") as caught:
        save(path, 1)
    assert str(path) in str(caught.value)
    assert "kept" not in str(caught.value)


# ---- damaged files ----

STATE = {
    "weights": torch.arange(12.0).reshape(3, 4),
    "mask": torch.tensor([True, False]),
    "lr": 0.1,
    "epoch": 7,
}


@pytest.fixture
def blob(tmp_path: Path) -> bytes:
    path = tmp_path / "good.safetensors"
    save(path, STATE)
    return path.read_bytes()


def test_truncation_at_any_byte_is_found(tmp_path: Path, blob: bytes) -> None:
    path = tmp_path / "cut.safetensors"
    for end in range(len(blob)):
        path.write_bytes(blob[:end])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            load(path)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_a_flipped_byte_anywhere_is_found(tmp_path: Path, blob: bytes, flip: int) -> None:
    path = tmp_path / "flipped.safetensors"
    for position in range(len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= flip
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"flipped\.safetensors"):
            load(path)


def test_bytes_after_the_end_are_found(tmp_path: Path, blob: bytes) -> None:
    path = tmp_path / "longer.safetensors"
    path.write_bytes(blob + b"\0")
    with pytest.raises(CheckpointError, match="do not match its checksum"):
        load(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=200), claim=st.integers(0, 200), framed=st.booleans())
def test_garbage_is_refused(tmp_path: Path, garbage: bytes, claim: int, framed: bool) -> None:
    path = tmp_path / "garbage.safetensors"
    path.write_bytes(struct.pack("<Q", claim) + garbage if framed else garbage)
    with pytest.raises(CheckpointError, match=r"garbage\.safetensors"):
        load(path)


def with_header(path: Path, header: str) -> Path:
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    return path


@pytest.mark.parametrize(
    "header",
    [
        "[" * 100_000,
        "9" * 10_000,
        "[]",
        "null",
        '{"__metadata__": null}',
        '{"__metadata__": {"fastprune.checkpoint": 3}}',
        '{"__metadata__": {"fastprune.checkpoint": "[]"}}',
        json.dumps({"__metadata__": {"fastprune.checkpoint": "[" * 100_000}}),
        json.dumps({"__metadata__": {"fastprune.checkpoint": '{"version": 1}'}}),
        json.dumps({"__metadata__": {"fastprune.checkpoint": '{"version": 1, "sha256": "\\ud800", "tree": 1}'}}),
    ],
    ids=range(10),
)
def test_hostile_headers_are_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(CheckpointError):
        load(with_header(tmp_path / "hostile.safetensors", header))


def test_a_claimed_huge_header_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match=r"huge\.safetensors \(10 bytes\) is truncated, or not a checkpoint"):
        load(path)
    with open(path, "wb") as file:  # a sparse file: its claimed header would fit in it
        file.write(struct.pack("<Q", 2**39))
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load(path)


def test_foreign_and_other_version_files_are_named_as_such(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2)}, foreign)
    with pytest.raises(CheckpointError, match=r"foreign\.safetensors was not written by fastprune"):
        load(foreign)
    newer = tmp_path / "newer.safetensors"
    text = json.dumps({"version": 2})
    safetensors.torch.save_file({}, newer, metadata={"fastprune.checkpoint": text})
    with pytest.raises(CheckpointError, match=r"newer\.safetensors has checkpoint version 2, this fastprune reads 1"):
        load(newer)


def test_missing_and_unreadable_files_are_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*missing\.safetensors"):
        load(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*: Is a directory"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_the_error_points_to_the_previous_checkpoint_where_that_is_complete(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "last.safetensors"
    save(path, 1)
    save(path, 2)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"last\.previous\.safetensors, or rename it to last\.safetensors"):
        load(path)
    assert load(previous_path(path)) == 1
    previous_path(path).write_bytes(b"damaged too")
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert "previous" not in str(caught.value)


def test_ordered_dict_comes_back_as_dict_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "ordered.safetensors"
    save(path, OrderedDict([("b", 1), ("a", 2)]))
    back = load(path)
    assert type(back) is dict
    assert list(back.items()) == [("b", 1), ("a", 2)]
