"""A saved network comes back to the last bit; any other file, however it was made, fails clearly."""

import copy
import json
import random
import re
import resource
import struct
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import fastprune
from fastprune import NetworkFileError, architecture, checkpoint, models, network_file
from fastprune.graph import trace


class Small(nn.Module):
    """A bit of everything, so that every branch of the reader is reached."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1, groups=2, bias=False)
        self.pool = nn.AdaptiveAvgPool2d((1, 1))
        self.scale = nn.Parameter(torch.randn(1))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv1(x)))[:, :, ::1]
        y = torch.cat([y, self.conv2(y) * self.scale], 1).chunk(2, 1)[0]
        return self.fc(self.pool(y).view(x.shape[0], -1))


def small() -> nn.Module:
    torch.manual_seed(0)
    model = Small()
    pruner = fastprune.FilterPruner(model, rate=0, ignore=["conv2"])
    pruner.masks()["conv1"][1] = False
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "net.safetensors"
    network_file.save(small(), path, torch.zeros(1, 3, 8, 8), {"classes": ["cat", "dog"]})
    return path


# ---- what comes back ----


@pytest.mark.parametrize("kind", ["dense", "masked", "compact"])
def test_networks_come_back_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = models.create("resnet20").eval()
    images = torch.randn(3, 3, 32, 32)
    if kind != "dense":
        fastprune.FilterPruner(model, rate=0.5).update()
    if kind == "compact":
        model = fastprune.compact(model, images)
    path = tmp_path / "net.safetensors"
    fastprune.save(model, path)
    loaded = fastprune.load(path)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert [path.name for path in tmp_path.iterdir()] == ["net.safetensors"]


def test_what_was_said_about_it_comes_back(saved: Path) -> None:
    loaded = fastprune.load(saved)
    assert loaded.meta["info"] == {"classes": ["cat", "dog"]}
    (example,) = network_file.example_inputs(loaded)
    assert (example.shape, example.dtype) == ((1, 3, 8, 8), torch.float32)
    assert network_file.is_network_file(saved)
    assert not network_file.is_network_file(saved.parent)


def test_other_readers_of_safetensors_find_the_state_dict(saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    assert tensors.keys() == small().state_dict().keys() | {"conv1.feedback"}
    assert torch.equal(tensors["fc.weight"], small().state_dict()["fc.weight"])


def test_other_dtypes_and_layouts_come_back(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fastprune.save(model, tmp_path / "net")
        assert torch.equal(fastprune.load(tmp_path / "net").state_dict()["0.weight"], model.state_dict()["0.weight"])


def test_a_loaded_network_trains_on(saved: Path) -> None:
    loaded = fastprune.load(saved).train()
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    before = loaded.get_parameter("conv1.weight").clone()
    loaded(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(loaded.get_parameter("conv1.weight"), before)
    fastprune.save(loaded, saved)
    assert torch.equal(fastprune.load(saved).get_parameter("conv1.weight"), loaded.get_parameter("conv1.weight"))


def test_models_that_cannot_be_saved_say_why_and_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"Sequential cannot be saved: 0\.weight and 1\.weight are one tensor"):
        fastprune.save(tied, path)
    with pytest.raises(ValueError, match=r"cannot be saved: 0 is a .*Bilinear|cannot be traced|LSTM"):
        fastprune.save(nn.Sequential(nn.LSTM(3, 3)), path)
    with pytest.raises(TypeError):
        fastprune.save(nn.Sequential(nn.ReLU()), path, info={"x": object()})
    assert not list(tmp_path.iterdir())


# ---- what cannot be loaded is not written ----

INTEGERS = {
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
}
COMPLEX = {torch.complex64, torch.complex128}
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def made() -> Iterator[Tensor]:
    """A tensor of each dtype; torch names more of them than it makes tensors of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those that are experimental
        for dtype in {value for value in vars(torch).values() if isinstance(value, torch.dtype)}:
            with suppress(RuntimeError, NotImplementedError):
                yield torch.zeros(4, dtype=dtype)


EACH_DTYPE = sorted(made(), key=lambda tensor: str(tensor.dtype))


class Holds(nn.Module):
    """Has a tensor of its own."""

    def __init__(self, tensor: Tensor, is_parameter: bool) -> None:
        super().__init__()
        if is_parameter:
            self.own = nn.Parameter(tensor, requires_grad=False)
        else:
            self.register_buffer("own", tensor)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.own])


@pytest.mark.parametrize("is_parameter", [True, False], ids=["parameter", "buffer"])
@pytest.mark.parametrize("tensor", EACH_DTYPE, ids=lambda tensor: str(tensor.dtype))
def test_tensors_of_any_dtype_come_back_or_are_refused(tmp_path: Path, tensor: Tensor, is_parameter: bool) -> None:
    path, model = tmp_path / "net", Holds(tensor, is_parameter)
    if tensor.dtype not in INTEGERS | FLOATS:
        with pytest.raises(ValueError, match=rf"cannot be saved: a saved network .*not {tensor.dtype}, .* at own"):
            fastprune.save(model, path)
        assert not path.exists()
        return
    fastprune.save(model, path)
    (loaded,) = architecture.tensors_of(fastprune.load(path)).values()
    assert loaded.dtype is tensor.dtype
    assert torch.equal(loaded, tensor)


@pytest.mark.parametrize("tensor", EACH_DTYPE, ids=lambda tensor: str(tensor.dtype))
def test_inputs_of_any_dtype_come_back_or_are_refused(tmp_path: Path, tensor: Tensor) -> None:
    path, dtype = tmp_path / "net", tensor.dtype
    if dtype not in INTEGERS | FLOATS | COMPLEX:
        with pytest.raises(ValueError, match="a file holds inputs of at most 8 dimensions, of float32, float64, "):
            fastprune.save(nn.Sequential(nn.Flatten()), path, tensor[None])
        assert not path.exists()
        return
    fastprune.save(nn.Sequential(nn.Flatten()), path, tensor[None])
    (loaded,) = network_file.example_inputs(fastprune.load(path))
    assert (loaded.dtype, loaded.shape) == (dtype, (1, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            torch.zeros(1, 1, 1, 1, 1, 1, 1, 1, 2),
            r"example_input is float32 \[1, .*: a file holds .* at most 8 dim",
        ),
        (torch.zeros(1).expand(2**15, 2**14), "268,435,456 elements together, .* take a smaller batch"),
        ({"images of a": torch.zeros(1)}, "has the key 'images of a': those in a file are strings like"),
        ({0: torch.zeros(1)}, "has the key 0"),
        ((torch.zeros(1), 3), r"example_input\[1\] is 3: a file holds tensors as inputs"),
        ([torch.zeros(1), None], r"example_input\[1\] is None: a file holds tensors as inputs"),
        ("images", "example_input is 'images', without a tensor: expected is a tensor, or a tuple of"),
        (random, "example_input is a module: expected is a tensor"),
        (torch.zeros(1, 3, 8, 8, device="meta"), "example_input is on meta and the model on cpu: move it there"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_inputs_that_no_file_can_hold_are_refused(tmp_path: Path, example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastprune.save(small(), tmp_path / "net", example)
    assert not list(tmp_path.iterdir())


def test_names_that_cannot_be_loaded_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("__hidden", nn.ReLU())
    with pytest.raises(ValueError, match="saved: '__hidden' cannot be the name of a module"):
        fastprune.save(model, tmp_path / "net")
    with pytest.raises(ValueError, match=r"cannot be saved: a saved network holds .*, on meta, at 0.weight"):
        fastprune.save(nn.Sequential(nn.Linear(2, 2, device="meta")), tmp_path / "net")


# ---- inputs and outputs in dicts ----


class InDicts(nn.Module):
    """Takes and returns what some trainers hand around."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        features = self.conv(batch["image"]) * batch["scales"][0]
        return {"logits": features.mean((2, 3)), "more": {"features": features, "all": [features, (batch["image"],)]}}


def test_dicts_and_lists_as_inputs_and_outputs_come_back(tmp_path: Path) -> None:
    model = InDicts().eval()
    batch = {"image": torch.randn(2, 3, 8, 8), "scales": [torch.randn(1), (torch.zeros(2, dtype=torch.int32),)]}
    fastprune.save(model, tmp_path / "net", batch)
    loaded = fastprune.load(tmp_path / "net")
    (example,) = network_file.example_inputs(loaded)
    assert torch.utils._pytree.tree_structure(example) == torch.utils._pytree.tree_structure(batch)
    assert example["scales"][1][0].dtype is torch.int32
    assert example["image"].shape == (2, 3, 8, 8)
    with torch.no_grad():
        found, expected = loaded(batch), model(batch)
    assert found.keys() == expected.keys()
    assert torch.equal(found["logits"], expected["logits"])
    assert torch.equal(found["more"]["all"][1][0], batch["image"])


def test_a_key_that_no_file_may_have_is_named(tmp_path: Path) -> None:
    class Asks(nn.Module):
        def forward(self, batch: dict[str, Tensor]) -> Any:
            return {"out put": batch["image"].relu()}

    with pytest.raises(ValueError, match=r"output output has the argument \{'out put': relu\}, which cannot be saved"):
        fastprune.save(Asks(), tmp_path / "net")


# ---- how much it takes ----


def layers(count: int, kinds: Sequence[str] = ("Conv2d", "MaskedConv2d")) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of a file of so many small layers, their kinds by turns."""
    (plain,) = architecture.describe(trace(nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))))["modules"].values()
    modules, tensors = {}, {}
    nodes: list[Any] = [["placeholder", "x", [], {}]]
    for i in range(count):
        kind = kinds[i % len(kinds)]
        modules[f"{i}"] = [kind, {} if kind == "Sigmoid" else plain[1]]
        nodes.append(["call_module", f"{i}", [{"node": i}], {}])
        if kind != "Sigmoid":
            tensors[f"{i}.weight"] = torch.zeros(1, 1, 1, 1)
        if kind == "MaskedConv2d":
            tensors[f"{i}.mask"] = torch.ones(1, dtype=torch.bool)
    nodes.append(["output", "output", [{"node": count}], {}])
    return content(modules, nodes), tensors


def content(modules: dict[str, Any], nodes: list[Any]) -> dict[str, Any]:
    return {"architecture": {"modules": modules, "attributes": {}, "nodes": nodes}, "inputs": [], "info": {}}


def calls_of_load(path: Path) -> int:
    """How many functions are called: a measure of time that knows no noise."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        fastprune.load(path)
    finally:
        sys.setprofile(None)
    return count


def test_the_time_to_load_grows_with_the_layers_and_not_with_their_square(tmp_path: Path) -> None:
    calls = []
    for count in (800, 1600):
        forge(tmp_path / "net", *layers(count))
        calls.append(calls_of_load(tmp_path / "net"))
    assert calls[1] / calls[0] < 2.1


def memory_of_load(path: Path) -> float:
    """The most that Python has while it loads, as a multiple of the file's length."""
    tracemalloc.start()
    try:
        with suppress(NetworkFileError):
            fastprune.load(path)
        return tracemalloc.get_traced_memory()[1] / path.stat().st_size
    finally:
        tracemalloc.stop()


def wide(arguments: list[Any], name: str = "a") -> dict[str, Any]:
    """A network whose second node reads a lot."""
    nodes = [
        ["placeholder", "x", [], {}],
        ["call_module", name, [{"node": 0}], {}],
        ["call_function", "torch.cat", [arguments], {}],
        ["output", "output", [{"node": 2}], {}],
    ]
    return content({name: ["Sigmoid", {}]}, nodes)


def within(containers: int) -> dict[str, Any]:
    """A network whose layers are in modules in modules."""
    made, _ = layers(1000, ["Sigmoid"])
    text = json.dumps(made["architecture"])
    inner = "." + "a." * (containers - 1) + "a"
    made["architecture"] = json.loads(re.sub(r'"(\d+)"', rf'"\1{inner}"', text))
    return made


@pytest.mark.parametrize(
    ("made", "multiple"),
    [
        (layers(1000)[0], 60),
        (layers(1000, ["Sigmoid"])[0], 150),
        (within(4), 250),
        (within(19), 30),  # refused
        (wide([{"node": 1}] * 10_000), 120),
        (wide([{"node": 1}] * 10_000, ".".join(["a" * 200] * 20)), 120),  # a long name, read often
        (wide([{"node": 1}, *[[]] * 10_000]), 400),
        (wide([{"node": 1}, *[[]] * 1_000_001]), 60),  # refused
        ({**wide([]), "info": {"x": [[]] * 10_000}}, 30),
        ({**wide([]), "inputs": [{"list": [{"list": []}] * 10_000}]}, 30),
    ],
    ids=["convolutions", "small", "nested", "deep", "reads", "names", "lists", "more lists", "info", "inputs"],
)
def test_no_description_takes_more_memory_than_a_multiple_of_its_length(
    tmp_path: Path, made: dict[str, Any], multiple: float
) -> None:
    forge(tmp_path / "net", made, {})
    # Now and then a table of the whole process grows meanwhile, and not twice in a row.
    assert memory_of_load(tmp_path / "net") < multiple or memory_of_load(tmp_path / "net") < multiple


def test_tensors_take_twice_the_file_while_they_are_read(tmp_path: Path) -> None:
    fastprune.save(nn.Sequential(nn.Linear(2000, 1000)), tmp_path / "net")
    assert memory_of_load(tmp_path / "net") < 2.1


# ---- files that are not what save wrote ----


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content, tensors = checkpoint.read_sealed(path, "fastprune.network", 1, "saved network")
    return {key: content[key] for key in ("architecture", "inputs", "info")}, tensors


def forge(path: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write with a right checksum, as one who means harm would."""
    checkpoint.write_sealed(path, dict(tensors), "fastprune.network", {"version": 1}, content, "saved network")


def loads_or_fails_clearly(path: Path) -> bool:
    try:
        fastprune.load(path)
    except NetworkFileError as error:
        if str(path) not in str(error):
            pytest.fail(f"the file is not named: {error}")
        return False
    return True


def test_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    with pytest.raises(NetworkFileError, match=rf"there is no saved network {re.escape(str(path))}"):
        fastprune.load(path)
    with pytest.raises(NetworkFileError, match="cannot read the saved network"):
        fastprune.load(tmp_path)
    checkpoint.save(path, {"step": 1})
    with pytest.raises(NetworkFileError, match=r"was not written by fastprune: its header lacks 'fastprune\.network'"):
        fastprune.load(path)
    checkpoint.write_sealed(path, {}, "fastprune.network", {"version": 2}, {}, "saved network")
    with pytest.raises(NetworkFileError, match="has saved network version 2, this fastprune reads 1"):
        fastprune.load(path)


def test_headers_that_ask_for_terabytes_get_none(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    for length in (2**63, 2**40, 10**8, 100):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        assert not loads_or_fails_clearly(path)
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert not loads_or_fails_clearly(path)


def test_a_tensor_larger_than_the_file_is_refused_even_with_a_right_checksum(saved: Path) -> None:
    blob = saved.read_bytes()
    end = 8 + int.from_bytes(blob[:8], "little")
    header, body = blob[8:end], blob[end:]
    stored = json.loads(json.loads(header)["__metadata__"]["fastprune.network"])["sha256"]
    for old, new in ((b'"shape":[4,3,3,3]', b'"shape":[9,9,9,9]'), (b'"data_offsets":[0,', b'"data_offsets":[1,')):
        assert old in header
        changed = header.replace(old, new, 1).replace(stored.encode(), b"0" * 64, 1)
        length = struct.pack("<Q", len(changed))
        digest = checkpoint._digest(length + changed, memoryview(body))
        saved.write_bytes(length + changed.replace(b"0" * 64, digest.encode(), 1) + body)
        with pytest.raises(NetworkFileError, match="is damaged, or not a saved network"):
            fastprune.load(saved)


def test_every_truncation_is_found(saved: Path) -> None:
    blob = saved.read_bytes()
    rng = random.Random(0)
    for length in [*range(20), *rng.sample(range(20, len(blob)), 150), len(blob) - 1]:
        saved.write_bytes(blob[:length])
        assert not loads_or_fails_clearly(saved)
    saved.write_bytes(blob + b"\0")
    assert not loads_or_fails_clearly(saved)


def test_every_flipped_byte_is_found(saved: Path) -> None:
    blob = saved.read_bytes()
    rng = random.Random(1)
    for place in [*range(120), *rng.sample(range(120, len(blob)), 300)]:
        damaged = bytearray(blob)
        damaged[place] ^= 1 << rng.randrange(8)
        saved.write_bytes(bytes(damaged))
        assert not loads_or_fails_clearly(saved), place


# What a fuzzer puts in the place of a value.
PAYLOAD = "__import__('pathlib').Path('{}').touch()"
NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 2**31 - 1, 2**31, 2**40, 2**70, -(2**63), 10**400, 0.5, 1e308, -0.0),
    *("", "x", "self", "graph", "forward", "__class__", "..", "a.b.c.d", "\0", "é", '"', "')", "x\n  y", "if"),
    *("torch.relu", "operator.getitem", "getattr", "view", "expand", "shape", "constant", "MaskedConv2d", "Conv2d"),
    *([], {}, [[]], [None], {"node": 0}, {"node": 10**9}, {"tuple": [2**31 - 1] * 6}, {"tuple": []}, {"dtype": "bool"}),
    *(
        {"slice": [None, None, 0]},
        {"key": "x"},
        {"key": "__class__"},
        {"dict": {"a": {"node": 0}}},
        {"dict": {"a'": 1}},
        {"list": [{"shape": [2**31 - 1] * 8, "dtype": "int16"}]},
        {"ellipsis": True},
        {"node": 0, "tuple": []},
        {"unknown": 1},
        "BatchNorm2d",
        "output",
    ),
    *("placeholder", "call_module", "call_function", "get_attr", "call_method", "conv1", "conv1.weight", "buffer"),
]


def places(node: Any) -> list[tuple[Any, Any]]:
    """Each value in a tree of lists and dicts, as its container and its key."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [place for key in keys for place in ((node, key), *places(node[key]))]


def mutate(content: dict[str, Any], rng: random.Random, nasty: list[Any]) -> None:
    found = places(content)
    container, key = rng.choice(found)
    kind = rng.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1:
        other, place = rng.choice(found)
        container[key], other[place] = other[place], copy.deepcopy(container[key])
    elif kind == 2 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(rng.choice([container[key], *nasty])))
    elif kind == 3 and isinstance(container, dict):
        container[str(rng.choice(nasty))] = container.pop(key)
    elif kind == 4 and type(container[key]) is int:
        container[key] += rng.choice([-1, 1, 2**20, -(2**20)])
    else:
        container[key] = copy.deepcopy(rng.choice(nasty))


def mutate_tensors(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    kind = rng.randrange(5)
    if kind == 0:
        tensors[name] = tensor.to(rng.choice([torch.int8, torch.bool, torch.float64, torch.uint16]))
    elif kind == 1:
        tensors[name] = tensor.flatten().repeat(2)
    elif kind == 2:
        tensors[rng.choice(["x", "fc", "conv1.bias2", "..", "graph", name + ".x"])] = tensor
    elif kind == 3:
        tensors[name] = tensor[None].expand(2, *tensor.shape).contiguous()


def finite(node: Any) -> bool:
    try:
        json.dumps(node, allow_nan=False)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20))])
def test_no_description_does_anything_but_load_or_fail_clearly(
    saved: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    payload = PAYLOAD.format("executed")
    nasty = [*NASTY, payload, f"x={payload}", f"x'+{payload}+'", {payload: 1}]
    sound, tensors = read(saved)
    rng = random.Random(seed)
    threads = threading.active_count()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded = 0
    for _ in range(300):
        content, changed = copy.deepcopy(sound), dict(tensors)
        for _ in range(rng.choice([1, 1, 1, 2, 5])):
            mutate(content, rng, nasty)
        if rng.random() < 0.2:
            mutate_tensors(changed, rng)
        if not content or not finite(content):
            continue
        forge(saved, content, changed)
        loaded += loads_or_fails_clearly(saved)
    assert 5 < loaded < 120  # a few changes are harmless: another padding, an unused word in the info
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert threading.active_count() == threads
    assert not (saved.parent / "executed").exists()


def test_deep_json_is_refused(saved: Path) -> None:
    content, tensors = read(saved)
    for depth in (50, 900):
        deep: Any = 1
        for _ in range(depth):
            deep = [deep]
        content["architecture"]["nodes"][1][2] = deep
        forge(saved, content, tensors)
        assert not loads_or_fails_clearly(saved)
    text = json.dumps({"__metadata__": {"fastprune.network": "[" * 100_000}}).encode()
    saved.write_bytes(struct.pack("<Q", len(text)) + text)
    assert not loads_or_fails_clearly(saved)
