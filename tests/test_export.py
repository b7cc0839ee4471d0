"""A trained run is exported small, and what the file computes is what the run computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import fastprune
from fastprune import checkpoint, formats, network_file, run_folder, train
from fastprune.export import CheckFailedError, check, main
from fastprune.recipes import Config
from fastprune.run_folder import RunError
from fastprune.scatter import Scatter

CONFIG: dict[str, Any] = {"model": "resnet20", "data": "embedded", "device": "cpu", "precision": "fp32", "min_kept": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, with masks that its pruner made."""
    folder = tmp_path_factory.mktemp("run")
    settings = {**CONFIG, "limit_train": 16, "limit_test": 8, "batch_size": 8, "epochs": 1, "prune_every": 2}
    train.run(Config(out=folder, prune_rate=0.5, **settings))
    return folder


def trained(run: Path) -> nn.Module:
    return run_folder.load_network(run)[1]


def test_a_run_comes_back_with_its_masks(run: Path) -> None:
    model = trained(run)
    saved = checkpoint.load(run / train.CHECKPOINT)["model"]
    assert not model.training
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    kept = [int(module.mask.sum()) for module in model.modules() if isinstance(module, fastprune.MaskedConv2d)]
    last = json.loads((run / "summary.json").read_text())["last"]
    assert sum(kept) == last["kept_filters"] < last["filters"]


@pytest.mark.parametrize("kind", ["onnx", "pt2", "safetensors"])
def test_runs_are_exported_and_checked(
    run: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / f"small.{kind}"
    assert main([str(run), "--format", kind, "--check", "--batch", "1", "5", "--out", str(out)]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0] == f"{out}: {out.stat().st_size:,} bytes"
    assert text[1].startswith("  parameters: 272,474 -> ")
    assert text[2].startswith("  MACs: 40,813,184 -> ")
    assert [line.split(":")[0] for line in text[3:]] == ["  batch 1", "  batch 5", "  checked"]
    assert float(text[-1].split()[5]) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    if kind == "onnx":
        session = formats.onnx_session(out.read_bytes())
        assert [(each.name, each.shape) for each in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
        assert [each.name for each in session.get_outputs()] == ["logits"]
    if kind == "safetensors":
        loaded = fastprune.load(out)
        assert sum(p.numel() for p in loaded.parameters()) < 272_474
        assert loaded.meta["info"]["model"] == "resnet20"
        assert loaded.meta["inputs"] == [{"shape": [1, 3, 32, 32], "dtype": "float32"}]


def test_branches_of_fewer_channels_are_exported() -> None:
    """As a convolution, which ONNX Runtime is fast at, where eager PyTorch adds to some channels."""
    torch.manual_seed(0)
    model = fastprune.models.create("resnet20").eval()
    pruner = fastprune.FilterPruner(model, rate=0.0)
    pruner.set_masks({"layer3.1.conv2": torch.arange(64) % 4 == 3, "layer3.2.conv2": torch.zeros(64).bool()})
    images = torch.randn(3, 3, 32, 32)
    small = fastprune.compact(model, images)
    assert [module.kept for module in small.modules() if isinstance(module, Scatter)] == [16, 0]
    exported = formats.onnx_bytes(small, images[:1])
    assert not [node.op_type for node in onnx.load_from_string(exported).graph.node if "Scatter" in node.op_type]
    (found,) = formats.onnx_session(exported).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images).detach(), rtol=1e-4, atol=1e-5)


def test_without_compact_pruned_weights_are_zeros(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "whole.safetensors"
    assert main([str(run), "--format", "safetensors", "--no-compact", "--check", "--out", str(out)]) == 0
    assert "parameters: 272,474 -> 272,474 (100.0%)" in capsys.readouterr().out
    loaded, model = fastprune.load(out), trained(run)
    assert not any(isinstance(module, fastprune.MaskedConv2d) for module in loaded.modules())
    mask = model.get_submodule("layer1.0.conv1").mask
    assert isinstance(mask, torch.Tensor)
    assert not loaded.get_parameter("layer1.0.conv1.weight")[~mask].any()


def test_saved_networks_are_exported_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).eval()
    path = tmp_path / "net.safetensors"
    fastprune.save(model, path, torch.zeros(4, 3, 8, 8))
    assert main([str(path), "--format", "pt2", "--check"]) == 0
    assert (tmp_path / "network.pt2").exists()
    fastprune.save(model, path)
    assert main([str(path), "--format", "pt2", "--image-size", "8", "--check"]) == 0


def test_the_default_file_lies_in_the_run(run: Path) -> None:
    assert main([str(run), "--format", "safetensors", "--round-to", "8"]) == 0
    loaded = fastprune.load(run / "network.safetensors")
    sizes = {module.out_channels for module in loaded.modules() if isinstance(module, nn.Conv2d)}
    assert all(size % 8 == 0 for size in sizes)


@pytest.mark.slow
def test_latency_is_measured_before_and_after(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--format", "pt2", "--latency", "--out", str(tmp_path / "x.pt2")]) == 0
    text = capsys.readouterr().out
    assert text.count("before") == text.count("exported") == 6


# ---- what fails ----


def test_a_file_that_computes_something_else_fails_the_check(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    assert main([str(run), "--format", "safetensors", "--out", str(out)]) == 0
    model = trained(run)
    with torch.no_grad():
        model.get_parameter("fc.bias")[0] += 0.1
    with pytest.raises(CheckFailedError, match=r"safetensors differs by .* of the largest output, more than 0\.0001"):
        check(out, "safetensors", model, torch.zeros(1, 3, 32, 32), [2])
    with torch.no_grad():
        model.get_parameter("fc.bias")[0] = float("nan")
    with pytest.raises(CheckFailedError, match="differs by nan"):
        check(out, "safetensors", model, torch.zeros(1, 3, 32, 32), [1, 2])


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 1
    text = capsys.readouterr().err
    assert text.startswith("fastprune.export: error: ")
    return text


def test_sources_that_are_none_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not the folder of a run: it has no config.json" in failure([str(tmp_path)], capsys)
    assert "there is no saved network" in failure([str(tmp_path / "none")], capsys)
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    assert "there is no checkpoint" in failure([str(tmp_path)], capsys)
    state = checkpoint.load(run / train.CHECKPOINT)
    state["model"].pop("conv1.weight")
    checkpoint.save(tmp_path / train.CHECKPOINT, state)
    assert "does not fit to" in failure([str(tmp_path)], capsys)


def test_the_source_is_not_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "network.safetensors"
    fastprune.save(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), path, torch.zeros(1, 3, 2, 2))
    assert "would replace what is exported" in failure([str(path), "--format", "safetensors"], capsys)
    assert "would replace" in failure([str(run), "--out", str(run / train.CHECKPOINT)], capsys)


def test_an_input_must_be_known(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "net.safetensors"
    fastprune.save(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), path)
    assert "was saved without an example input: give --image-size" in failure([str(path)], capsys)
    config, _ = run_folder.load_network(run)
    (tmp_path / "config.json").write_text(json.dumps({"data": "my_folder"}))
    with pytest.raises(RunError, match="does not say how large its images are: give --image-size"):
        run_folder.image_shape(tmp_path, config)
    assert run_folder.image_shape(tmp_path, config, 96) == (3, 96, 96)


def test_missing_packages_are_said_before_the_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name.startswith("onnx") else name)
    text = failure([str(run), "--out", str(tmp_path / "x")], capsys)
    assert "--format onnx needs onnx and onnxscript: pip install 'fastprune[export]'" in text
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("flags", ["--round-to 0", "--batch 0", "--image-size 0", "--format tflite"])
def test_bad_flags_end_with_status_2(flags: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["somewhere", *flags.split()])
    assert end.value.code == 2


def test_images_are_known_from_the_data_and_the_statistics_from_the_run(run: Path, tmp_path: Path) -> None:
    config, _ = run_folder.load_network(run)
    assert run_folder.image_shape(run, config) == (3, 32, 32)
    known = {"mean": [0.1, 0.2, 0.3], "std": [1.0, 2.0, 3.0], "classes": ["a"]}
    (tmp_path / "config.json").write_text(json.dumps({"data": "embedded", **known}))
    assert run_folder.image_statistics(tmp_path, config) == known
    half = Config(normalize="half")
    assert run_folder.image_statistics(tmp_path, half) == {"mean": [0.5] * 3, "std": [0.5] * 3, "classes": ["a"]}
    assert network_file.is_network_file(run / train.CHECKPOINT) is False


# ---- what is not exported ----


class Branched(nn.Module):
    """Takes one or two images, and returns one tensor or several."""

    def __init__(self, give: str = "tensor") -> None:
        super().__init__()
        self.conv, self.give = nn.Conv2d(3, 4, 3), give

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        z = self.conv(x) if y is None else self.conv(x) + self.conv(y)
        return {"dict": {"logits": z}, "chunks": z.chunk(2, 1), "tensor": z}[self.give]


IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.mark.parametrize("of", [formats.onnx_bytes, formats.pt2_bytes])
@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            (IMAGE, IMAGE),
            r"that take one tensor \[B, \.\.\.\]; the example input is \(float32 .*, float32",
        ),
        ({"image": IMAGE}, "the example input is {'image': float32"),
        (None, "the example input is None"),
        (torch.zeros(1, 4, 8, 8), r"does not run on the example input float32 \[1, 4, 8, 8\] on cpu"),
        (IMAGE.to("meta"), "example_input is on meta and the model on cpu"),
    ],
    ids=["two", "dict", "none", "shape", "device"],
)
def test_exports_say_what_input_they_take(
    of: Callable[..., bytes], example: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        of(Branched(), example)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("give", "named"), [("dict", r"\{'logits': conv\}"), ("chunks", "chunk")])
def test_onnx_is_of_models_that_return_one_tensor(give: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"returns one tensor, and Branched returns {named}: wrap it in a module"):
        formats.onnx_bytes(Branched(give), IMAGE)
    formats.onnx_bytes(Branched(), IMAGE)


def test_pt2_returns_what_the_model_does(tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(formats.pt2_bytes(Branched("dict"), IMAGE))
    found = torch.export.load(tmp_path / "net.pt2").module()(IMAGE)
    assert found.keys() == {"logits"}
    with pytest.raises(ValueError, match="a check is of a model that returns one tensor, not a dict"):
        check(tmp_path / "net.pt2", "pt2", Branched("dict"), IMAGE, [1])


def test_a_file_of_a_network_with_two_inputs_becomes_another_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "net.safetensors", tmp_path / "small.safetensors"
    fastprune.save(Branched(), source, (IMAGE, IMAGE))
    assert main([str(source), "--format", "safetensors", "--out", str(out)]) == 0
    assert fastprune.load(out)(IMAGE, IMAGE).shape == (1, 4, 6, 6)
    assert main([str(source), "--format", "onnx"]) == 1
    assert main([str(source), "--format", "safetensors", "--check"]) == 1
    assert capsys.readouterr().err.count("are of models that take one tensor [B, ...]; the example input is (") == 2


class Reading(nn.Module):
    """Multiplies by a weight of a convolution that is masked, and ties another to it."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        return x * self.a.weight.mean() if self.reads else x


def test_a_masked_weight_that_serves_elsewhere_too_stays_dense_there() -> None:
    model, images = Reading(reads=False).eval(), torch.randn(2, 3, 4, 4)
    fastprune.FilterPruner(model, 0.0, every=1000, include=["a"]).set_masks({"a": torch.tensor([1, 0, 1]).bool()})
    torch.testing.assert_close(formats.without_masks(model)(images), model(images))
    model = Reading(reads=True)
    fastprune.FilterPruner(model, 0.5, every=1000, include=["a"])
    with pytest.raises(ValueError, match=r"a is masked, and the forward also reads its weight by itself.*remove\(\)"):
        formats.without_masks(model)
