"""Two processes train as one: what they compute, agree on, write, survive."""

import contextlib
import copy
import io
import json
import math
import os
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from test_train import assert_same, command, config, state
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastprune import (
    Decorrelation,
    FilterPruner,
    WeightPruner,
    budget,
    checkpoint,
    data,
    distributed,
    models,
    network,
    precision,
    report,
    train,
)
from fastprune.data import DataUnavailableError, ImageData
from fastprune.optim import PrunedSGD
from fastprune.run_lock import held
from fastprune.sync_batchnorm import SyncBatchNorm2d, synchronise_batchnorms
from fastprune.train import CHECKPOINT, MODEL, main
from fastprune.trainer import Trainer, TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")

# Two processes differ from one by the order of summation. In float64 that is 3e-14 of a tensor's norm after two epochs
# (measured, at most 3e-13 over ten seeds), and in no mask. In float32 it is 4e-6 after a step; then it happens that
# rounding decides on a ReLU or a mask, and they part as runs on two machines do.
IN_FLOAT64, A_STEP_IN_FLOAT32 = 1e-10, 1e-4


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.close()


def small_images() -> ImageData:
    return data.embedded(0, train=50, test=21).resize(8)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """The trainer's arithmetic in float64."""
    make_model, normalized = network.make_model, Trainer.normalized
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "make_model", lambda *given: make_model(*given).double())
        patch.setattr(Trainer, "normalized", lambda trainer, images: normalized(trainer, images).double())
        yield


def difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest of all tensors, relative to the tensor's norm; infinite where a mask or counter differs."""
    assert left.keys() == right.keys()
    worst = 0.0
    for name, tensor in left.items():
        if not tensor.is_floating_point():
            worst = worst if torch.equal(tensor, right[name]) else math.inf
        else:
            worst = max(worst, float((tensor - right[name]).norm() / right[name].norm().clamp_min(1e-6)))
    return worst


# ---- as one process ----


def trained(steps: int, changes: dict[str, Any], exact: bool = True) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The state after some steps, and the records of the epochs in them; ``exact``: in float64."""
    records = []
    with in_float64() if exact else contextlib.nullcontext():
        trainer = Trainer(config(**changes), small_images())
        while trainer.step < steps:
            trainer.compact_if_frozen()
            list(trainer.train_steps(steps))
            trainer.network.settle()
            if trainer.step % trainer.steps_per_epoch == 0:
                records.append(trainer.finish_epoch())
    return copy.deepcopy(trainer.state_dict()), records


ALIKE: dict[str, dict[str, Any]] = {
    "last batch of two": {},
    "three parts, odd shares": {"batch_size": 15, "accumulate": 3, "decorrelation": "correlation", "cutout": 3},
    "single weights": {"prune_type": "unstructured", "importance": "taylor", "prune_every": 4},
    "compacted after an epoch": {"compact_when_frozen": True, "prune_until": 0.5, "couple": True},
    "dense, no momentum": {"prune_rate": 0.0, "momentum": 0.0, "nesterov": False, "channels_last": False},
}


@pytest.mark.parametrize("changes", ALIKE.values(), ids=ALIKE)
def test_two_processes_train_as_one(pair: Processes, changes: dict[str, Any]) -> None:
    steps = 8 if changes == {} or "compact_when_frozen" in changes else 4
    (expected, expected_records), (first, second) = trained(steps, changes), pair.run(trained, steps, changes)
    assert_same(first[0], second[0])
    assert difference(first[0]["model"], expected["model"]) < IN_FLOAT64
    assert first[0]["step"] == expected["step"] == steps
    assert len(first[1]) == len(expected_records)
    for ours, theirs, record in zip(first[1], second[1], expected_records):
        for figure in ("step", "sparsity", "kept_per_layer", "lr"):
            assert ours[figure] == theirs[figure] == record[figure]
        for split in ("train", "test"):
            assert ours[split] == theirs[split] == pytest.approx(record[split], rel=IN_FLOAT64)
        assert ours["penalty"] == pytest.approx(record["penalty"], rel=IN_FLOAT64)


def test_two_processes_take_a_step_in_float32_as_one(pair: Processes) -> None:
    (expected, _), (first, second) = trained(1, {}, False), pair.run(trained, 1, {}, False)
    assert_same(first[0], second[0])
    assert difference(first[0]["model"], expected["model"]) < A_STEP_IN_FLOAT32
    momenta = [{str(i): entry["momentum_buffer"] for i, entry in s["optimizer"].items()} for s in (first[0], expected)]
    assert difference(*momenta) < A_STEP_IN_FLOAT32


def test_both_take_part(pair: Processes) -> None:
    """Each sees its half of the batch, and they do not see the same."""
    shares = pair.run(seen_images)
    assert [len(share) for share in shares] == [8, 8]
    order = torch.randperm(50, generator=Trainer(config(), small_images()).generator("cpu", 0, 0))[:16]
    plain = small_images().train_images[order].float()
    assert torch.equal(torch.cat(shares), plain)


def seen_images() -> Tensor:
    trainer = Trainer(config(pad=0, flip=False), small_images())
    seen: list[Tensor] = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    list(trainer.train_steps(1))
    mean, std = (torch.tensor(values)[:, None, None] for values in (trainer.mean, trainer.std))
    return ((seen[0] * std + mean) * 255).round().contiguous()


def test_without_sync_batchnorm_the_state_is_the_same_in_both_all_the_same(pair: Processes) -> None:
    (first, records), (second, _) = pair.run(trained, 3, {"sync_batchnorm": False})
    assert_same(first, second)
    assert records[0]["step"] == 3  # the last batch of two images would leave one to each: it has no variance
    (own, settled), (others, _) = pair.run(running_means)
    assert not torch.equal(own, others)
    torch.testing.assert_close(settled, (own + others) / 2)


def running_means() -> tuple[Tensor, Tensor]:
    """Those of the last batch norm, before and after they are settled."""
    trainer = Trainer(config(sync_batchnorm=False), small_images())
    list(trainer.train_steps(2))
    norm = trainer.model.get_buffer("layer3.2.bn2.running_mean")
    before = norm.clone()
    trainer.network.settle()
    return before, norm


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_in_two_processes(pair: Processes, precision: str) -> None:
    (first, records), (second, _) = pair.run(trained, 4, {"precision": precision}, False)
    assert_same(first, second)
    assert math.isfinite(records[0]["train"]["loss"])


@pytest.mark.slow
def test_a_compiled_model_trains_alike_in_two_processes(pair: Processes) -> None:
    (compiled, _), _ = pair.run(trained, 1, {"compile": True}, False)
    (plain, _), _ = pair.run(trained, 1, {}, False)
    assert difference(compiled["model"], plain["model"]) < 0.05  # of the fused ops' rounding


def test_a_batch_must_have_an_image_for_each(pair: Processes) -> None:
    for error in pair.attempt(trained, 1, {"batch_size": 3, "accumulate": 2}):
        assert isinstance(error, TrainingError)
        assert "--batch-size 3, of all processes together, is too small for 2 of them" in str(error)


# ---- parts of a batch ----


def plain_trainer(**changes: Any) -> Trainer:
    """Its batch norm does not look at the batch."""
    trainer = Trainer(config(**changes), small_images().subset(48))  # no last batch that would be left out
    for module in trainer.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = types.MethodType(lambda self, mode=True: self, module)  # type: ignore[method-assign]
    return trainer


@pytest.mark.parametrize("parts", [2, 3, 16])
def test_a_batch_in_parts_is_that_batch(parts: int) -> None:
    with in_float64():
        whole, cut = plain_trainer(), plain_trainer(accumulate=parts)
        for trainer in (whole, cut):
            list(trainer.train_steps(3))
    assert difference(cut.model.state_dict(), whole.model.state_dict()) < IN_FLOAT64
    assert float(cut.penalty) == pytest.approx(float(whole.penalty), rel=IN_FLOAT64)
    assert cut.scores.read() == pytest.approx(whole.scores.read(), rel=IN_FLOAT64)


def test_parts_reach_the_network_one_by_one() -> None:
    trainer = Trainer(config(accumulate=3), small_images())
    sizes: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    list(trainer.train_steps(1))
    assert sizes == [6, 5, 5]


def exchanges_of_a_step(parts: int) -> int:
    trainer = Trainer(config(accumulate=parts, sync_batchnorm=False), small_images())
    count = 0
    parallel = trainer.network.forward
    assert isinstance(parallel, DistributedDataParallel)

    def counted(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal count
        count += 1
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    parallel.register_comm_hook(None, counted)
    trainer.train_step(torch.arange(16))
    return count


def test_gradients_are_exchanged_once_a_step(pair: Processes) -> None:
    assert pair.run(exchanges_of_a_step, 4) == pair.run(exchanges_of_a_step, 1)


# ---- batch norm ----


def norm_of_shares(dtype: torch.dtype, affine: bool, momentum: float | None) -> tuple[Tensor, ...]:
    """Output, gradients (those of the parameters as DistributedDataParallel takes them) and statistics of a share."""
    norm = nn.BatchNorm2d(3, affine=affine, momentum=momentum).to(torch.promote_types(dtype, torch.float32))
    if distributed.size() > 1:
        assert synchronise_batchnorms(nn.Sequential(norm))[0] is norm
        assert type(norm) is SyncBatchNorm2d
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x = x * torch.tensor([1.0, 10.0, 0.1])[:, None, None] + torch.tensor([0.0, 1e3, -1.0])[:, None, None]
    x, target = (
        (tensor.to(dtype).tensor_split([3])[distributed.rank()] for tensor in (x, target))
        if (distributed.size() > 1)
        else (x.to(dtype), target.to(dtype))
    )
    x.requires_grad_()
    for parameter in norm.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=torch.Generator().manual_seed(2))
    output = norm(x)
    (output * target).sum().backward()
    gradients = [distributed.total(p.grad) for p in norm.parameters() if p.grad is not None]
    assert x.grad is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    again = norm.eval()(x)
    return tuple(t.detach() for t in (output, x.grad, again, *gradients, norm.running_mean, norm.running_var))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3), (torch.bfloat16, 5e-2)], ids=str
)
@pytest.mark.parametrize(("affine", "momentum"), [(True, 0.1), (False, None)])
def test_batch_norm_over_shares_is_that_over_the_batch(
    pair: Processes, dtype: torch.dtype, tolerance: float, affine: bool, momentum: float | None
) -> None:
    """Three images in one process and two in the other; a channel far from zero, for sums that would cancel."""
    expected = norm_of_shares(dtype, affine, momentum)
    first, second = pair.run(norm_of_shares, dtype, affine, momentum)
    for i, tensor in enumerate(expected):
        ours = torch.cat([first[i], second[i]]) if i < 3 else first[i]
        assert ours.dtype == tensor.dtype
        torch.testing.assert_close(ours, tensor, rtol=tolerance, atol=tolerance)
        assert i < 3 or torch.equal(first[i], second[i])


def one_value_each() -> Tensor:
    (norm,) = synchronise_batchnorms(nn.Sequential(nn.BatchNorm2d(2, affine=False)))
    return norm(torch.tensor([3.0 + 4 * distributed.rank(), 5.0])[None, :, None, None]).flatten()


def test_batch_norm_over_shares_of_a_single_value(pair: Processes) -> None:
    first, second = pair.run(one_value_each)
    torch.testing.assert_close(first, torch.tensor([-1.0, 0.0]))
    torch.testing.assert_close(second, torch.tensor([1.0, 0.0]))


def test_a_lone_process_keeps_its_batch_norm() -> None:
    trainer = Trainer(config(), small_images())
    assert not any(isinstance(module, SyncBatchNorm2d) for module in trainer.model.modules())
    plain, lone = nn.BatchNorm2d(3), synchronise_batchnorms(nn.Sequential(nn.BatchNorm2d(3)))
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(plain(x), lone(x))


# ---- masks ----


def loop_of_a_user(wrapped: bool, changed: bool) -> dict[str, Tensor]:
    """A loop as in the README, under DistributedDataParallel; ``changed``: one process writes to a mask."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    parallel = DistributedDataParallel(model)
    options: dict[str, Any] = {"every": 2, "feedback": "straight-through", "removable_only": False}
    pruner = FilterPruner(parallel if wrapped else parallel.module, rate=0.4, **options)
    decorrelation = Decorrelation(model, "covariance", alpha=0.1)
    optimizer = PrunedSGD(parallel.parameters(), lr=0.1, momentum=0.9, pruner=pruner, masked_dtype=torch.float32)
    generator = torch.Generator().manual_seed(distributed.rank())
    for _ in range(5):
        images = torch.randn(4, 3, 8, 8, generator=generator)
        loss = parallel(images).square().mean() + decorrelation()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if changed and distributed.is_first():
            nn.init.ones_(model[3].weight[2:5])  # a bug of the user's, in one process
        if pruner.step():
            distributed.verify_masks(pruner)
    return {**{f"{name}.mask": mask for name, mask in pruner.masks().items()}, **model.state_dict()}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_users_loop_keeps_its_masks_equal(pair: Processes, wrapped: bool) -> None:
    first, second = pair.run(loop_of_a_user, wrapped, False)
    masks = [name for name in first if name.endswith(".mask")]
    assert all(torch.equal(first[name], second[name]) for name in masks)
    assert not all(bool(first[name].all()) for name in masks)
    assert torch.equal(first["3.weight"], second["3.weight"])


def test_masks_that_differ_are_named_in_both(pair: Processes) -> None:
    for error in pair.attempt(loop_of_a_user, False, True):
        assert isinstance(error, distributed.MismatchError)
        assert "the masks are not the same in 0, 3: process 1 differs from process 0 (of 2)" in str(error)


def one_flipped_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    pruner = WeightPruner(model, rate=0.0)
    distributed.verify_masks(pruner)
    pruner.masks()["1"][3, 3, 2, distributed.rank()] = False
    distributed.verify_masks(pruner)


def test_one_weight_is_enough_to_differ(pair: Processes) -> None:
    for error in pair.attempt(one_flipped_weight):
        assert isinstance(error, distributed.MismatchError)
        assert "not the same in 1: process 1" in str(error)


def updates_verified(steps: int) -> tuple[int, int]:
    verified = 0

    def counted(pruner: FilterPruner) -> None:
        nonlocal verified
        verified += 1
        original(pruner)

    original, distributed.verify_masks = distributed.verify_masks, counted
    try:
        trainer = Trainer(config(prune_every=2), small_images())
        list(trainer.train_steps(steps))
    finally:
        distributed.verify_masks = original
    return verified, distributed.size()


def test_the_trainer_verifies_every_update(pair: Processes) -> None:
    assert pair.run(updates_verified, 4) == [(2, 2), (2, 2)]  # before the second and the fourth iteration


# ---- what all agree on ----


def fail_in(failing: list[int], error: type[Exception]) -> str:
    with distributed.together():
        if distributed.rank() in failing:
            raise error(f"of {distributed.rank()}")
    return "passed"


def test_a_block_is_passed_by_all_or_none(pair: Processes) -> None:
    assert pair.run(fail_in, [], ValueError) == ["passed", "passed"]
    first, second = pair.attempt(fail_in, [1], ValueError)
    assert isinstance(first, distributed.PeerError)
    assert "process 1 failed" in str(first)
    assert type(second) is ValueError
    first, second = pair.attempt(fail_in, [0, 1], ValueError)
    assert type(first) is ValueError
    assert isinstance(second, distributed.PeerError)
    with pytest.raises(OSError, match="of 0"):
        fail_in([0], OSError)  # alone


def test_a_lone_process_is_the_first_of_one() -> None:
    assert (distributed.rank(), distributed.size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_first()
    assert distributed.largest(-3) == -3
    tensor = torch.ones(2)
    total = distributed.total(tensor)
    assert torch.equal(total, tensor)
    assert total is not tensor
    distributed.average_([tensor])
    distributed.verify_same({"a": b"1"}, "nothing")
    with distributed.joined("cpu"):
        assert distributed.size() == 1


def exchanged() -> tuple[int, list[float], list[list[float]]]:
    rank = distributed.rank()
    tensors = [torch.full((2, 1), float(rank)), torch.tensor([1.0 + rank])]
    distributed.average_(tensors)
    return (
        distributed.largest(rank * 5),
        distributed.total(torch.tensor([rank, 1.0])).tolist(),
        [tensor.flatten().tolist() for tensor in tensors],
    )


def test_what_is_exchanged(pair: Processes) -> None:
    assert pair.run(exchanged) == [(5, [1.0, 2.0], [[0.5, 0.5], [1.5]])] * 2


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    places = {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = r"process 3 .* no GPU of its own \(torch finds 2\)"
    with pytest.raises(distributed.LaunchError, match=message), distributed.joined("cuda"):
        pass


def differing_choices() -> tuple[str, str]:
    """Each process would come to another precision."""
    rank = distributed.rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "native_bf16", lambda device: f"rank {rank}")
        patch.setattr(precision, "time_both", lambda *_: {"fp32": 1.0, "bf16": [0.5, 8.0][rank]})
        choice = precision.choose(models.create("resnet20"), (16, 3, 8, 8), torch.channels_last)
    return choice.precision, choice.why


def test_the_first_process_decides_on_the_precision(pair: Processes) -> None:
    first, second = pair.run(differing_choices)
    assert first == second
    assert first[0] == "bf16"
    assert "rank 0" in first[1]


def differing_clocks() -> float:
    """That of the second process goes a thousand seconds at each look."""
    trainer = Trainer(config(minutes=10), small_images())
    ticks = iter(range(0, 10**9, 1000))
    with pytest.MonkeyPatch.context() as patch:
        if not distributed.is_first():
            patch.setattr(budget.time, "perf_counter", lambda: float(next(ticks)))
        return budget.seconds_per_step(trainer)


def test_the_first_process_decides_how_long_a_step_takes(pair: Processes) -> None:
    first, second = pair.run(differing_clocks)
    assert first == second < 100


# ---- runs ----


def run_of(arguments: list[str], stop: tuple[int, int] | None = None, breaks: str = "") -> dict[str, Any]:
    """``main`` on the small images, in float64, and what came of it here.

    ``stop``: a process that gets SIGTERM, and the step in which it does. ``breaks``: what goes wrong.
    """
    patch = pytest.MonkeyPatch()
    train_step = Trainer.train_step

    def step(trainer: Trainer, indices: Tensor) -> None:
        train_step(trainer, indices)
        if stop == (distributed.rank(), trainer.step):
            signal.raise_signal(signal.SIGTERM)
        if breaks == "loss in process 1" and distributed.rank() == 1 and trainer.step == 2:
            trainer.scores.sums[0] = math.nan

    def load(*_: Any, **__: Any) -> ImageData:
        offline.append(os.environ.get("FASTPRUNE_OFFLINE"))
        if breaks == "no data in process 1" and distributed.rank() == 1:
            raise DataUnavailableError("nothing here")
        return small_images().subset(49 if breaks == "other data" and distributed.rank() == 1 else None)

    def save(path: Path, tree: Any) -> None:
        if breaks == "full disk":
            raise OSError(28, "could not write the checkpoint: No space left on device", str(path))
        original_save(path, tree)

    offline: list[str | None] = []
    original_save = checkpoint.save
    patch.setattr(Trainer, "train_step", step)
    patch.setattr(data, "load", load)
    patch.setattr(checkpoint, "save", save)
    patch.setattr(train.plots, "plot_run", lambda run: [])
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), in_float64():
            status = main(arguments)
    finally:
        patch.undo()
    return {"status": status, "out": out.getvalue(), "err": err.getvalue(), "offline": offline}


def test_one_saves_and_tells(pair: Processes, tmp_path: Path) -> None:
    first, second = pair.run(run_of, command(tmp_path / "two"))
    assert (first["status"], second["status"]) == (0, 0)
    assert (second["out"], second["err"]) == ("", "")
    assert "on 2 processes" in first["out"]
    assert first["out"].count("epoch 2/2") == 1
    assert (first["offline"], second["offline"]) == ([None], ["1"])  # one downloads
    names = ["checkpoint.previous.safetensors", CHECKPOINT, "compaction.txt", "config.json", "metrics.jsonl", MODEL]
    names.append("summary.json")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2
    one = run_of(command(tmp_path / "one"))
    assert one["status"] == 0
    assert difference(state(tmp_path / "two")["model"], state(tmp_path / "one")["model"]) < IN_FLOAT64
    for ours, theirs in zip(report.read_metrics(tmp_path / "two"), report.read_metrics(tmp_path / "one"), strict=True):
        assert ours["kept_per_layer"] == theirs["kept_per_layer"]
        assert ours["train"]["top1"] == theirs["train"]["top1"]


def test_a_folder_in_use_is_refused_once(pair: Processes, tmp_path: Path) -> None:
    with held(tmp_path):
        first, second = pair.run(run_of, command(tmp_path))
    assert (first["status"], second["status"]) == (1, 1)
    assert f"fastprune.train: error: {tmp_path} is in use by process {os.getpid()} on " in first["err"]
    assert second["err"] == ""


@pytest.mark.parametrize("process", [0, 1])
def test_a_signal_to_one_stops_both_and_they_go_on(pair: Processes, tmp_path: Path, process: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pair.run(run_of, command(whole))
    first, second = pair.run(run_of, command(parts), (process, 3))
    assert first["status"] == second["status"] == 128 + signal.SIGTERM
    assert f"stopped by SIGTERM; continue with --resume {parts}" in first["err"]
    assert second["err"] == ""
    assert state(parts)["step"] == 3
    assert [answer["status"] for answer in pair.run(run_of, ["--resume", str(parts)])] == [0, 0]
    assert_same(state(whole), state(parts))


def test_the_number_of_processes_may_change_on_the_way(pair: Processes, tmp_path: Path) -> None:
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    run_of(command(whole))
    pair.run(run_of, command(alone, max_steps=3))
    assert run_of(["--resume", str(alone)])["status"] == 0
    assert difference(state(alone)["model"], state(whole)["model"]) < IN_FLOAT64
    first_epochs = [report.read_metrics(run)[0]["train"] for run in (alone, whole)]
    assert first_epochs[0] == pytest.approx(first_epochs[1], rel=IN_FLOAT64)


BROKEN = {
    "loss in process 1": (0, "the loss is no longer finite at step 2; no checkpoint was written yet"),
    "no data in process 1": (1, "nothing here"),
    "other data": (0, "the data is not the same: training labels, classes and pixels: process 1 differs"),
    "full disk": (0, "could not write the checkpoint: No space left"),
}


@pytest.mark.parametrize("breaks", BROKEN)
def test_what_breaks_one_ends_both_and_is_told_once(pair: Processes, tmp_path: Path, breaks: str) -> None:
    teller, message = BROKEN[breaks]
    answers = pair.run(run_of, command(tmp_path / "run"), None, breaks)
    assert [answer["status"] for answer in answers] == [1, 1]
    assert message in answers[teller]["err"]
    assert answers[1 - teller]["err"] == ""
    assert not (tmp_path / "run" / CHECKPOINT).exists()


# ---- torchrun ----


def workers(agent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]


def test_torchrun_stops_by_a_signal_to_one_process_and_another_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.plots, "plot_run", lambda run: [])
    flags = {"image_size": 8, "limit_train": 48, "limit_test": 20, "epochs": 400}  # no end before the signal
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*torchrun, "-m", "fastprune.train", *command(tmp_path / "two", **flags)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as agent:
        try:
            assert agent.stdout is not None
            told = list(iter_until(agent.stdout, "epoch 2/400"))
            os.kill(workers(agent.pid)[1], signal.SIGTERM)
            _, errors = agent.communicate(timeout=60)
        finally:
            agent.kill()
    assert "".join(told).count("epoch 1/400") == 1
    assert f"stopped by SIGTERM; continue with --resume {tmp_path / 'two'}" in errors
    assert "train.py" not in errors  # that torchrun's agent ends with a traceback of its own is its way
    steps = state(tmp_path / "two")["step"]
    assert main(["--resume", str(tmp_path / "two"), "--max-steps", str(steps + 2)]) == 0
    assert state(tmp_path / "two")["step"] == steps + 2
    assert main(command(tmp_path / "one", **flags, max_steps=3)) == 0
    first_epochs = [report.read_metrics(tmp_path / run)[0]["train"]["loss"] for run in ("two", "one")]
    assert first_epochs[0] == pytest.approx(first_epochs[1], rel=1e-2)


@pytest.mark.parametrize("killed", [0, 1])
def test_those_that_lose_a_process_say_which_and_how_to_go_on(tmp_path: Path, killed: int) -> None:
    flags = {"image_size": 8, "limit_train": 48, "limit_test": 20, "epochs": 400}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*torchrun, "-m", "fastprune.train", *command(tmp_path, **flags)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes) as agent:
        try:
            assert agent.stdout is not None
            list(iter_until(agent.stdout, "epoch 2/400"))
            os.kill(workers(agent.pid)[killed], signal.SIGKILL)
            _, errors = agent.communicate(timeout=60)
        finally:
            agent.kill()
    assert (
        f"fastprune.train: error: process {killed} is gone (of 2): it was killed, or its machine failed. "
        f"The last checkpoint is whole: continue with --resume {tmp_path}\n"
    ) in errors
    assert "train.py" not in errors
    steps = state(tmp_path)["step"]
    assert main(["--resume", str(tmp_path), "--max-steps", str(steps + 1)]) == 0


def iter_until(stream: IO[str], beginning: str) -> Iterator[str]:
    for line in stream:
        yield line
        if line.startswith(beginning):
            return
    raise AssertionError(f"{beginning!r} was never printed")
