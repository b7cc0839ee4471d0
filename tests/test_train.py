"""Runs of the trainer at the smallest size: what they compute, write, survive, and how they go on."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import fastprune
from fastprune import FilterPruner, checkpoint, data, network, report, train
from fastprune.cost import cost
from fastprune.data import ImageData
from fastprune.nn import MaskedConv2d
from fastprune.recipes import Config
from fastprune.run_folder import load_network
from fastprune.train import CHECKPOINT, MODEL, Interrupted, main
from fastprune.trainer import Trainer, TrainingError

# 50 images of 8×8 pixels in batches of 16: four steps an epoch, the last of two images.
SMALL: dict[str, Any] = {
    "model": "resnet20",
    "data": "embedded",
    "device": "cpu",
    "precision": "fp32",
    "batch_size": 16,
    "epochs": 2,
    "lr": 0.05,
    "prune_every": 2,
}
STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """So little work is done fastest by one thread, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def images() -> ImageData:
    return data.embedded(0, train=50, test=20).resize(8)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(train.plots, "plot_run", lambda run: [])


@pytest.fixture
def small_data(images: ImageData, no_plots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run gets the small set, whatever it asks for."""
    monkeypatch.setattr(data, "load", lambda *_, **__: images)


def config(**changes: Any) -> Config:
    return Config(**{**SMALL, **changes})


def command(out: Path, **changes: Any) -> list[str]:
    settings = {**SMALL, "out": out, **changes}
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def state(run: Path) -> dict[str, Any]:
    return checkpoint.load(run / CHECKPOINT)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records without what a clock says."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in report.read_metrics(run)]


def assert_same(left: Any, right: Any, place: str = "state") -> None:
    """Equal to the last bit."""
    assert type(left) is type(right), place
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left.keys() - {"seconds"}:
            assert_same(left[key], right[key], f"{place}[{key!r}]")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype, place
        assert torch.equal(left, right), place
    else:
        assert left == right, place


def all_finite(state: dict[str, Any]) -> bool:
    momenta = [entry["momentum_buffer"] for entry in state["optimizer"].values()]
    return all(bool(t.isfinite().all()) for t in [*state["model"].values(), *momenta])


# ---- a whole run ----


@pytest.fixture(scope="module")
def whole_run(images: ImageData, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three epochs on the command line, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    printed = out.parent / "printed"
    with pytest.MonkeyPatch.context() as patch, open(printed, "w", encoding="utf-8") as stream:
        patch.setattr(data, "load", lambda *_, **__: images)
        patch.setattr(sys, "stdout", stream)
        assert main(command(out, epochs=3)) == 0
    return out, printed.read_text(encoding="utf-8")


def test_a_run_writes_its_files(whole_run: tuple[Path, str]) -> None:
    out, _ = whole_run
    names = ["checkpoint.previous.safetensors", CHECKPOINT, "compaction.txt", "config.json", "curves.png"]
    names += ["filters.png", "metrics.jsonl", MODEL, "summary.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    for name in ("curves.png", "filters.png"):
        with Image.open(out / name) as picture:
            assert picture.format == "PNG"


def test_an_epochs_record_has_every_figure(whole_run: tuple[Path, str]) -> None:
    records = report.read_metrics(whole_run[0])
    assert [(r["epoch"], r["step"]) for r in records] == [(1, 4), (2, 8), (3, 12)]
    for record in records:
        for split in ("train", "test"):
            scores = record[split]
            assert scores["loss"] > 0
            assert 0 <= scores["top1"] <= scores["top5"] <= 100
        assert 0 < record["sparsity"] < 100
        assert sum(record["kept_per_layer"]) == record["kept_filters"] < record["filters"] == 784
        assert len(record["layers"]) == len(record["kept_per_layer"]) == 21
        assert record["penalty"] > 0
        assert record["lr"] > 0
        assert record["images_per_s"] == pytest.approx(50 / record["seconds"])


def test_the_summary_names_the_last_epoch_first_and_the_best_second(whole_run: tuple[Path, str]) -> None:
    summary = json.loads((whole_run[0] / "summary.json").read_text())
    assert list(summary)[:3] == ["run", "last", "best"]
    assert summary["last"]["epoch"] == 3
    assert "resnet20 · embedded · fast · rate 0.6 · covariance α 0.01" in summary["run"]
    assert not summary["comparison"]["comparable"]


def test_the_resolved_configuration_is_written(whole_run: tuple[Path, str], images: ImageData) -> None:
    stored = json.loads((whole_run[0] / "config.json").read_text())
    assert stored["config"] == config(out=whole_run[0], epochs=3).to_json()
    assert (stored["device"], stored["train_images"], stored["test_images"]) == ("cpu", 50, 20)
    assert stored["data"] == "embedded"
    assert "generated" in stored["data_source"]
    assert (stored["classes"], stored["mean"], stored["std"]) == (list(images.classes), [*images.mean], [*images.std])


def test_a_run_says_what_it_does(whole_run: tuple[Path, str]) -> None:
    lines = whole_run[1].splitlines()
    assert lines[0].startswith("embedded set: 10 classes of generated")
    assert lines[1] == "resnet20: 272,474 parameters, 4 steps an epoch, on cpu, in fp32"
    assert any(line.startswith("about ") and "of training left" in line for line in lines)
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch ")] == [
        "epoch 1/3",
        "epoch 2/3",
        "epoch 3/3",
    ]
    figures = ("train loss", "top-5", "test loss", "sparsity", "kept", "lr", "images/s")
    assert all(figure in line for line in lines if line.startswith("epoch ") for figure in figures)
    assert any("last epoch (3): test top-1" in line for line in lines)


def test_a_finished_run_is_not_overwritten(
    whole_run: tuple[Path, str], small_data: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = whole_run
    before = (out / CHECKPOINT).read_bytes()
    assert main(command(out)) == 1
    assert f"{out} holds a run: continue it with --resume {out}" in capsys.readouterr().err
    assert (out / CHECKPOINT).read_bytes() == before


# ---- what is trained ----


def numpy_mask(layers: list[MaskedConv2d], rate: float) -> np.ndarray:
    """The rule, written once more: s = mean |w|; t = sort(s)[int(N · rate)]; kept where s > t."""
    weights = [layer.weight.detach().numpy() for layer in layers]
    scores = np.concatenate([np.abs(w.astype(np.float64)).mean(axis=(1, 2, 3)) for w in weights]).astype(np.float32)
    return scores > np.sort(scores)[int(len(scores) * rate)]


@pytest.mark.parametrize(
    "settings", [{"importance": "fpgm"}, {"prune_scope": "layer"}, {"round_to": 8}, {"min_kept": 3}]
)
def test_settings_of_the_pruner_reach_it(images: ImageData, settings: dict[str, Any]) -> None:
    pruner = Trainer(config(**settings), images).pruner
    assert isinstance(pruner, FilterPruner)
    of_selection = {"prune_scope": "scope"} | {name: name for name in ("min_kept", "round_to")}
    for name, value in settings.items():
        found = getattr(pruner.selection, of_selection[name]) if name in of_selection else getattr(pruner, name)
        assert found == value


@pytest.mark.parametrize(("recipe", "expected"), [("fast", [2, 5, 8, 11]), ("faithful", [2, 5, 9, 12])])
@pytest.mark.parametrize("rate", [0.3, 0.6])
def test_masks_are_those_of_the_rule_at_its_steps_and_stay_at_others(
    images: ImageData, rate: float, recipe: str, expected: list[int]
) -> None:
    settings = {"recipe": recipe, "prune_rate": rate, "min_kept": 0, "batch_size": 8, "prune_every": 3}
    trainer = Trainer(config(**settings, epochs=3, prune_until=2 / 3), images)
    layers = [module for module in trainer.model.modules() if isinstance(module, MaskedConv2d)]
    assert trainer.steps_per_epoch == 7  # the last of two images
    before = np.ones(784, dtype=bool)
    renewed = []
    while trainer.step < 21:
        for step in trainer.train_steps(21):
            masks = np.concatenate([layer.mask.numpy() for layer in layers])
            epoch, iteration = divmod(step, 7)  # of the next forward pass
            counted = iteration if recipe == "faithful" else step
            if epoch < 2 and (counted + 1) % 3 == 0:
                np.testing.assert_array_equal(masks, numpy_mask(layers, rate))
                renewed.append(step)
            else:
                np.testing.assert_array_equal(masks, before)
            before = masks
    assert renewed == expected
    assert not np.array_equal(before, numpy_mask(layers, rate))  # the weights went on, the masks did not


@pytest.mark.filterwarnings("ignore:compact. the masks keep every filter")
def test_epochs_shorter_than_the_time_between_updates(
    small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"prune_every": 5, "epochs": 3, "decorrelation": "none"}  # of four steps an epoch
    summary = train.run(config(out=tmp_path / "fast", **settings))
    assert summary["last"]["kept_filters"] < 784
    assert "nothing will be pruned" not in capsys.readouterr().out
    summary = train.run(config(out=tmp_path / "faithful", recipe="faithful", **settings))
    assert summary["last"]["kept_filters"] == 784
    captured = capsys.readouterr()
    said = "nothing will be pruned: every=5 counts from the start of each epoch, and an epoch has 4 iterations"
    assert captured.out.count(said) == 1
    assert "nothing will be pruned" not in captured.err


def test_sparsity_is_zeros_of_the_masks_over_all_parameters(images: ImageData) -> None:
    trainer = Trainer(config(), images)
    list(trainer.train_steps(STEPS))
    record = trainer.finish_epoch()
    layers = [module for module in trainer.model.modules() if isinstance(module, MaskedConv2d)]
    zeros = sum(int((~layer.mask).sum()) * math.prod(layer.weight.shape[1:]) for layer in layers)
    assert record["sparsity"] == pytest.approx(100 * zeros / 272_474, rel=1e-12)
    assert record["kept_per_layer"] == [int(layer.mask.sum()) for layer in layers]


@pytest.mark.parametrize("changes", [{"prune_rate": 0.0}, {"prune_type": "none"}])
def test_without_pruning_the_dense_network_is_trained(images: ImageData, changes: dict[str, Any]) -> None:
    trainer = Trainer(config(**changes), images)
    list(trainer.train_steps(STEPS))
    record = trainer.finish_epoch()
    assert trainer.pruner is None
    assert not any(isinstance(module, MaskedConv2d) for module in trainer.model.modules())
    assert (record["sparsity"], record["kept_filters"], record["filters"]) == (0.0, 784, 784)


def test_the_loss_falls_and_the_score_rises(images: ImageData) -> None:
    plain = {"pad": 0, "flip": False, "alpha": 0.01, "schedule": "constant", "prune_rate": 0.2}
    trainer = Trainer(config(epochs=10, **plain), images)
    records = []
    for _ in range(10):
        list(trainer.train_steps(10 * STEPS))
        records.append(trainer.finish_epoch())
    assert records[-1]["train"]["loss"] < records[0]["train"]["loss"] - 0.3
    assert records[-1]["train"]["top1"] > records[0]["train"]["top1"] + 20


def test_the_penalty_is_part_of_the_loss(images: ImageData) -> None:
    def penalty_after(alpha: float) -> float:
        trainer = Trainer(config(alpha=alpha, lr=0.1, schedule="constant"), images)
        list(trainer.train_steps(STEPS))
        assert trainer.decorrelation is not None
        return trainer.decorrelation.penalty().item()

    assert penalty_after(1.0) < penalty_after(0.0) - 0.1


def test_the_train_scores_are_those_of_the_steps(images: ImageData) -> None:
    """Without augmentation, learning and pruning the four steps see every image once, as one batch statistic each."""
    trainer = Trainer(
        config(lr=1e-30, pad=0, flip=False, prune_rate=0, label_smoothing=0, decorrelation="none"), images
    )
    list(trainer.train_steps(STEPS))
    order = torch.randperm(50, generator=trainer.generator("cpu", 0, 0))
    losses, hits = [], 0
    for batch in order.split(16):
        logits = trainer.model(trainer.normalized(images.train_images[batch]))
        labels = images.train_labels[batch]
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="sum").item())
        hits += int((logits.argmax(1) == labels).sum())
    scores = trainer.scores.read()
    assert scores["loss"] == pytest.approx(sum(losses) / 50, rel=1e-5)
    assert scores["top1"] == pytest.approx(2 * hits)


def test_the_seed_decides(images: ImageData) -> None:
    def weights(seed: int) -> Tensor:
        trainer = Trainer(config(seed=seed), images)
        list(trainer.train_steps(2))
        return trainer.model.get_parameter("layer1.0.conv1.weight").detach()

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_precision_is_that_of_the_convolutions(images: ImageData, precision: str) -> None:
    trainer = Trainer(config(precision=precision), images)
    dtypes: list[torch.dtype] = []
    trainer.model.get_submodule("layer1.0.conv1").register_forward_hook(lambda *a: dtypes.append(a[-1].dtype))
    list(trainer.train_steps(3))
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert dtypes == [expected] * 3
    trainer.check_loss()
    trainer.check_state()
    assert trainer.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_memory_format_is_as_asked(images: ImageData, channels_last: bool) -> None:
    trainer = Trainer(config(channels_last=channels_last), images)
    form = torch.channels_last if channels_last else torch.contiguous_format
    list(trainer.train_steps(1))
    assert trainer.model.get_parameter("layer1.0.conv1.weight").is_contiguous(memory_format=form)
    assert trainer.normalized(images.train_images[:2]).is_contiguous(memory_format=form)


@pytest.mark.slow
def test_a_compiled_model_trains_alike(images: ImageData) -> None:
    losses = []
    for compiled in (True, False):
        trainer = Trainer(config(compile=compiled), images)
        list(trainer.train_steps(STEPS))
        losses.append(trainer.finish_epoch()["train"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_the_device_must_be_there(images: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Trainer(config(device="auto"), images).device == torch.device("cpu")
    with pytest.raises(TrainingError, match="--device cuda: torch finds no CUDA device here"):
        Trainer(config(device="cuda"), images)


def test_a_network_without_that_stem_is_named(images: ImageData) -> None:
    with pytest.raises(TrainingError, match="has no ImageNet stem"):
        Trainer(config(stem="imagenet"), images)


def test_a_last_batch_of_one_image_is_left_out(images: ImageData) -> None:
    trainer = Trainer(config(), images.subset(17))
    assert trainer.steps_per_epoch == 1
    assert list(trainer.train_steps(5)) == [1]
    assert trainer.scores.sums[3] == 16
    assert Trainer(config(batch_size=1), images.subset(3)).steps_per_epoch == 3
    with pytest.raises(TrainingError, match="one training image is too few"):
        Trainer(config(), images.subset(1))


def test_a_run_stops_at_its_target(small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path, target_accuracy=0)) == 0
    assert [record["epoch"] for record in metrics(tmp_path)] == [1]
    printed = capsys.readouterr().out
    assert "reached 0 % after" in printed
    assert json.loads((tmp_path / "summary.json").read_text())["last"]["epoch"] == 1


def test_an_unregularised_run_says_so(small_data: None, tmp_path: Path) -> None:
    summary = train.run(config(out=tmp_path, epochs=1, decorrelation="none"))
    assert "α" not in summary["run"]
    assert json.loads((tmp_path / "config.json").read_text())["decorrelation"] is None


def test_coupling_reaches_the_pruner(images: ImageData) -> None:
    pruner = Trainer(config(couple=True, prune_scope="layer"), images).pruner
    assert isinstance(pruner, FilterPruner)
    pruner.update()
    masks = pruner.masks()
    assert torch.equal(masks["layer1.0.conv2"], masks["conv1"])


# ---- the small network ----


def test_a_run_leaves_its_network_without_what_is_pruned(whole_run: tuple[Path, str], images: ImageData) -> None:
    out, printed = whole_run
    small = fastprune.load(out / MODEL).eval()
    changes = (out / "compaction.txt").read_text(encoding="utf-8")
    assert f"parameters: 272,474 -> {sum(p.numel() for p in small.parameters()):,} (" in changes
    _, masked = load_network(out)
    inputs = data.normalize(images.test_images, images.mean, images.std)
    with torch.no_grad():
        torch.testing.assert_close(small(inputs), masked(inputs), rtol=1e-4, atol=1e-4)
    found = json.loads((out / "summary.json").read_text())["small"]
    before, after = found["parameters"]
    assert (before, after) == (272_474, sum(p.numel() for p in small.parameters()))
    assert found["macs"] == [cost(model, inputs[:1], masked=False).macs for model in (masked, small)]
    assert found["macs"][1] < found["macs"][0]
    assert found["test"][0] == report.read_metrics(out)[-1]["test"]
    assert found["test"][1] == pytest.approx(found["test"][0], rel=1e-3)
    assert "images_per_s" not in found
    assert f"without what is pruned (model.safetensors): {after:,} of 272,474 parameters" in printed


COMPACTED: dict[str, Any] = {"compact_when_frozen": True, "epochs": 3, "prune_until": 0.34}


def test_a_run_goes_on_small_when_the_masks_stay(
    small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train.run(config(out=tmp_path, **COMPACTED))
    records = report.read_metrics(tmp_path)
    assert [record["compacted"] for record in records] == [False, True, True]
    assert records[0]["parameters"] == 272_474 > records[1]["parameters"] == records[2]["parameters"]
    for figure in ("kept_per_layer", "filters_per_layer", "layers", "sparsity"):
        assert records[0][figure] == records[2][figure], "told of the network that was pruned"
    speeds = [record["images_per_s"] for record in records]
    assert summary["small"]["images_per_s"] == pytest.approx([speeds[0], sum(speeds[1:]) / 2])
    small = fastprune.load(tmp_path / MODEL)
    assert "parameters: 272,474 -> " in (tmp_path / "compaction.txt").read_text(encoding="utf-8")
    stored = state(tmp_path)["model"]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in small.state_dict().items())
    printed = capsys.readouterr().out
    assert f"the masks stay: {records[1]['parameters']:,} of 272,474 parameters are trained on" in printed
    _, loaded = load_network(tmp_path)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), small.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stops", [(3, 5), (4, 9)], ids=["within epochs", "as the masks end"])
def test_a_resumed_small_network_equals_one_that_never_stopped(
    small_data: None, tmp_path: Path, stops: tuple[int, ...]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(config(out=whole, **COMPACTED))
    train.run(config(out=parts, max_steps=stops[0], **COMPACTED))
    assert main(["--resume", str(parts), "--max-steps", str(stops[1])]) == 0
    assert main(["--resume", str(parts)]) == 0
    assert_same(state(whole), state(parts))
    assert metrics(whole) == metrics(parts)
    assert state(whole)["compacted"] is not None


def test_a_small_network_of_another_model_is_said(
    small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(config(out=tmp_path, max_steps=6, **COMPACTED))
    assert main(["--resume", str(tmp_path), "--model", "resnet32"]) == 1
    assert "model was resnet20 when it was compacted, and is resnet32" in capsys.readouterr().err


def test_the_small_network_trains_as_the_masked_one(images: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of it is one of the network with masks: batch norm makes the same of what is pruned, its own bias."""
    make_model, normalized = network.make_model, Trainer.normalized
    monkeypatch.setattr(network, "make_model", lambda *given: make_model(*given).double())
    monkeypatch.setattr(Trainer, "normalized", lambda trainer, images: normalized(trainer, images).double())
    settings = COMPACTED | {"decorrelation": "none", "feedback": "none", "weight_decay": 0.0}
    masked, small = (Trainer(config(**settings), images) for _ in range(2))
    for trainer in (masked, small):
        for _ in trainer.train_steps(STEPS):
            pass
        assert trainer.pruner is not None
        assert trainer.pruner.frozen
        for norm in trainer.model.modules():
            if isinstance(norm, nn.BatchNorm2d):  # what is pruned becomes 0, at the borders too
                nn.init.constant_(norm.bias, -0.05)
    assert small.compact_if_frozen()
    assert not small.compact_if_frozen(), "once"
    assert small.parameters() < masked.parameters()
    outputs, gradients = [], []
    for trainer in (masked, small):
        x = trainer.normalized(images.train_images[:16]).requires_grad_()
        outputs.append(trainer.model.train()(x))
        outputs[-1][:, 0].sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-9)
    assert all("momentum_buffer" in small.optimizer.state[p] for n, p in small.model.named_parameters() if "bn" in n)


# ---- going on ----

RESUMED = {
    "fp32, filters": {"precision": "fp32"},
    "bf16, filters": {"precision": "bf16", "decorrelation": "correlation", "include_pruned": False, "cutout": 4},
    "fp16, filters": {"precision": "fp16"},
    "fp32, single weights": {"prune_type": "unstructured", "importance": "taylor"},
    "fp32, batches in parts": {"accumulate": 3, "batch_size": 12},
}


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_equals_one_that_never_stopped(small_data: None, tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(config(out=whole, **changes))
    assert train.run(config(out=parts, max_steps=3, **changes)) == {}  # within the first epoch
    assert main(["--resume", str(parts), "--max-steps", "5"]) == 0  # within the second one
    assert main(["--resume", str(parts)]) == 0
    assert_same(state(whole), state(parts))
    assert metrics(whole) == metrics(parts)
    masks = [tensor for name, tensor in state(parts)["model"].items() if name.endswith(".mask")]
    assert len(masks) == 21
    assert not all(bool(mask.all()) for mask in masks)


def test_a_run_can_go_on_in_another_folder(small_data: None, two_threads: None, tmp_path: Path) -> None:
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    train.run(config(out=first, max_steps=6))
    before = {path.name: path.read_bytes() for path in first.iterdir()}
    assert main(["--resume", str(first), "--out", str(second)]) == 0
    train.run(config(out=whole))
    assert_same(state(second), state(whole))
    assert metrics(second) == metrics(whole)
    assert {path.name: path.read_bytes() for path in first.iterdir()} == before
    with pytest.raises(TrainingError, match="second holds a run"):
        train.run(config(out=second, resume=first))


def test_a_resumed_run_takes_new_settings(small_data: None, tmp_path: Path) -> None:
    train.run(config(out=tmp_path, epochs=1))
    line = ["--resume", str(tmp_path), "--epochs", "2", "--weight-decay", "0", "--momentum", "0.5"]
    assert main([*line, "--schedule", "constant", "--lr", "0.001"]) == 0
    assert [record["lr"] for record in metrics(tmp_path)][1] == 0.001
    stored = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (stored["epochs"], stored["weight_decay"]) == (2, 0.0)
    trainer = Trainer(config(weight_decay=0.25), data.load("embedded"))
    trainer.load_state_dict(state(tmp_path))
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "8"], "batch_size was 16 and is 8"),
        (["--limit-train", "40"], "train_images was 50 and is 40"),
        (["--accumulate", "4"], "steps_per_epoch was 4 and is 3"),
        (["--model", "resnet32"], "layer1.3"),
        (["--prune-rate", "0"], "mask"),
        (["--prune-type", "unstructured"], "mask"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_said(
    whole_run: tuple[Path, str], small_data: None, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["--resume", str(whole_run[0]), *flags]) == 1
    error = capsys.readouterr().err
    assert "the checkpoint is of another configuration or data set" in error
    assert message in error


def test_a_truncated_checkpoint_is_said_and_the_one_before_it_named(
    small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(config(out=tmp_path, epochs=2))
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["--resume", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{path} is truncated or damaged" in error
    assert "checkpoint.previous.safetensors" in error
    os.replace(checkpoint.previous_path(path), path)
    assert main(["--resume", str(tmp_path)]) == 0
    assert [record["epoch"] for record in metrics(tmp_path)] == [1, 2]


def test_a_run_killed_between_two_renames_is_not_written_over_and_goes_on(
    small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(config(out=tmp_path, epochs=2))
    expected = state(tmp_path)
    (tmp_path / CHECKPOINT).unlink()
    assert main(command(tmp_path)) == 1
    assert f"{tmp_path} holds a run: continue it with --resume {tmp_path}" in capsys.readouterr().err
    assert load_network(tmp_path)[0].out == tmp_path
    assert main(["--resume", str(tmp_path)]) == 0
    assert "after 4 steps" in capsys.readouterr().out
    assert_same(expected, state(tmp_path))


def test_damaged_metrics_of_a_run_to_resume_are_said(
    small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train.run(config(out=tmp_path, epochs=1))
    (tmp_path / "metrics.jsonl").write_text("?\n")
    assert main(["--resume", str(tmp_path), "--epochs", "2"]) == 1
    assert "the metrics of the run to resume cannot be read" in capsys.readouterr().err


# ---- signals ----


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_signal_saves_and_stops_and_the_run_goes_on(
    small_data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(config(out=whole, epochs=2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    train_step = Trainer.train_step

    def step_and_signal(trainer: Trainer, indices: Tensor) -> None:
        train_step(trainer, indices)
        if trainer.step == step:
            signal.raise_signal(signal.SIGTERM)
            assert {signal.getsignal(number) for number in handlers} == {signal.SIG_DFL}  # a second one ends it

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_and_signal)
        with pytest.raises(Interrupted, match="stopped by SIGTERM"):
            train.run(config(out=parts, epochs=2))
    assert {number: signal.getsignal(number) for number in handlers} == handlers
    assert state(parts)["step"] == step
    assert main(["--resume", str(parts)]) == 0
    assert_same(state(whole), state(parts))
    assert metrics(whole) == metrics(parts)


def image_folder(root: Path, images: ImageData) -> Path:
    """``images`` as PNG files, and their order that of the files."""
    for split in ("train", "test"):
        pictures, labels = getattr(images, f"{split}_images"), getattr(images, f"{split}_labels")
        for index, (picture, label) in enumerate(zip(pictures, labels)):
            folder = root / split / images.classes[int(label)]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return root


# The trainer as it is, but every step says that it is done, and takes `pause` seconds longer.
TALKING = """
import sys, time
from fastprune.train import main
from fastprune.trainer import Trainer
train_step, pause = Trainer.train_step, float(sys.argv[1])
def step_and_say(trainer, indices):
    train_step(trainer, indices)
    print("step", trainer.step, flush=True)
    time.sleep(pause)
Trainer.train_step = step_and_say
sys.exit(main(sys.argv[2:]))
"""


@contextmanager
def talking_run(pause: float, arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-c", TALKING, str(pause), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as here
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env=environment, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for printed in process.stdout:
        if printed.strip() == line:
            return
    raise AssertionError(f"{line!r} was never printed; the errors: {process.stderr and process.stderr.read()}")


def test_a_terminated_process_saves_and_tells_by_its_status(images: ImageData, no_plots: None, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set", images)
    common = {"data": folder, "data_root": tmp_path / "root", "epochs": 2}
    with talking_run(0.2, command(tmp_path / "parts", **common)) as process:
        wait_for(process, "step 2")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM: saving after this step" in errors
    assert f"continue with --resume {tmp_path / 'parts'}" in errors
    assert 2 <= state(tmp_path / "parts")["step"] < 8
    assert main(["--resume", str(tmp_path / "parts")]) == 0
    assert main(command(tmp_path / "whole", **common)) == 0
    assert_same(state(tmp_path / "whole"), state(tmp_path / "parts"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


def test_a_second_signal_stops_a_process_at_once(images: ImageData, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "set", images)
    with talking_run(100, command(tmp_path / "run", data=folder, data_root=tmp_path / "root")) as process:
        wait_for(process, "step 1")
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "SIGINT: saving" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM
    assert not (tmp_path / "run" / CHECKPOINT).exists()


# ---- what goes wrong ----


@pytest.mark.parametrize("prune_rate", [0, 0.6])
def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(
    small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], prune_rate: float
) -> None:
    assert main(command(tmp_path, epochs=1, prune_rate=prune_rate)) == 0
    before = (tmp_path / CHECKPOINT).read_bytes()
    assert main(["--resume", str(tmp_path), "--epochs", "3", "--lr", "1e30", "--schedule", "constant"]) == 1
    error = capsys.readouterr().err
    assert "no longer finite" in error or "NaN or Inf" in error
    assert f"the last good checkpoint is {tmp_path / CHECKPOINT}" in error
    assert "A lower --lr" in error
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert all_finite(state(tmp_path))
    assert len(metrics(tmp_path)) == 1


@pytest.mark.parametrize(
    ("steps", "place"), [(1, "weight"), (1, "momentum_buffer"), (4, "weight"), (4, "running_var")], ids=str
)
def test_a_broken_state_is_never_saved(
    small_data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, place: str
) -> None:
    """The loss of the last step before a checkpoint is fine, what the step left behind is not."""
    train_step = Trainer.train_step

    def step_and_break(trainer: Trainer, indices: Tensor) -> None:
        train_step(trainer, indices)
        if trainer.step == steps:
            weight = trainer.model.get_parameter("conv1.weight")
            broken = {
                "weight": weight.data,
                "momentum_buffer": trainer.optimizer.state[weight]["momentum_buffer"],
                "running_var": trainer.model.get_buffer("bn1.running_var"),
            }
            broken[place][0] = math.nan

    monkeypatch.setattr(Trainer, "train_step", step_and_break)
    with pytest.raises(TrainingError, match=r"finite.*no checkpoint was written yet"):
        train.run(config(out=tmp_path, max_steps=steps))
    assert not (tmp_path / CHECKPOINT).exists()


def test_errors_of_other_kinds_are_not_taken_for_divergence(
    small_data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trainer: Trainer, indices: Tensor) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(Trainer, "train_step", fail)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        train.run(config(out=tmp_path))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_the_run_and_leaves_the_checkpoint_before(
    small_data: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, epochs=2, max_steps=4)) == 0
    before = (tmp_path / CHECKPOINT).read_bytes()
    assert len(before) > 2_000_000
    with files_up_to(1_000_000):
        assert main(["--resume", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "fastprune.train: error:" in error
    assert "could not write the checkpoint" in error
    assert "Traceback" not in error
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert main(["--resume", str(tmp_path)]) == 0  # the disk is free again
    assert [record["epoch"] for record in metrics(tmp_path)] == [1, 2]


def test_an_interrupt_before_training_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> ImageData:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    assert main(command(tmp_path / "run")) == 128 + signal.SIGINT
    assert "stopped before training began" in capsys.readouterr().err


# ---- image folders ----


def save_images(folder: Path, sizes: list[tuple[int, int]], mode: str) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate(sizes):
        shape = (height, width) if mode == "L" else (height, width, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{index}.png")


def test_grey_images_of_odd_sizes_are_trained_on(
    no_plots: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        save_images(tmp_path / "set" / split / "grey", [(17, 23), (40, 31), (9, 9)], "L")
        save_images(tmp_path / "set" / split / "colour", [(21, 21), (33, 15), (19, 50)], "RGB")
    run = tmp_path / "run"
    assert main(command(run, data=tmp_path / "set", data_root=tmp_path / "root", epochs=1, batch_size=3)) == 0
    (record,) = metrics(run)
    assert record["test"]["top5"] == 100.0  # of two classes
    assert "2 classes, 6 train and 6 test images" in capsys.readouterr().out


def test_images_can_have_an_odd_side(no_plots: None, tmp_path: Path) -> None:
    for split in ("train", "test"):
        for name in ("a", "b"):
            save_images(tmp_path / "set" / split / name, [(30, 30)] * 2, "RGB")
    odd = {"image_size": 19, "epochs": 1, "batch_size": 2}
    assert main(command(tmp_path / "run", data=tmp_path / "set", data_root=tmp_path / "root", **odd)) == 0


def break_nothing(folder: Path) -> None:
    pass


def truncate(folder: Path) -> None:
    save_images(folder / "train" / "b", [(20, 20)], "RGB")
    save_images(folder / "test" / "b", [(20, 20)], "RGB")
    path = folder / "train" / "b" / "0.png"
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("damage", "message"), [(break_nothing, "at least two classes"), (truncate, "1 of 4 images cannot be read")]
)
def test_unusable_folders_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    for split in ("train", "test"):
        save_images(tmp_path / "set" / split / "a", [(20, 20)], "RGB")
    damage(tmp_path / "set")
    assert main(command(tmp_path / "run", data=tmp_path / "set", data_root=tmp_path / "root")) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path / "run", data=tmp_path / "nowhere")) == 1
    assert "nowhere" in capsys.readouterr().err
