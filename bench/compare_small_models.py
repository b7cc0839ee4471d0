"""One network made small twice, by fastprune and by Torch-Pruning: accuracy, latency, and the time it took.

    python bench/compare_small_models.py --model resnet20 --data embedded --epochs 8 --fine-tune 4 --json small.json

Both start from the same trained network and train on for as many epochs, over the same batches with the same learning
rates: fastprune with masks that change while it trains, and removes the filters at the end; Torch-Pruning removes
channels first, as many as give the same number of multiply-accumulates, and trains what is left. Torch-Pruning
(`pip install torch-pruning`) is needed by nothing else; where it is missing, fastprune is measured alone.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

import fastprune
from fastprune import data, models
from fastprune.checkpoint import write_atomically
from fastprune.cost import cost
from fastprune.data import ImageData
from fastprune.latency import ENGINES, Engine, latency
from fastprune.precision import DTYPES, PrecisionOrAuto, choose
from fastprune.schedule import learning_rate


@dataclass(frozen=True)
class Options:
    """Compare the small networks of fastprune and Torch-Pruning."""

    model: str = "resnet20"
    data: str = "embedded"
    """As of python -m fastprune.train."""
    rate: float = 0.5
    """Share of filters that fastprune prunes; Torch-Pruning gets the MACs that come out."""
    epochs: int = 8
    """Of the dense network that both start from."""
    fine_tune: int = 4
    """Epochs that each trains on."""
    batch_size: int = 128
    lr: float = 0.1
    """Peak, of a one-cycle schedule; a fifth of it to fine-tune."""
    precision: PrecisionOrAuto = "auto"
    """Of the training and of the accuracies, as of python -m fastprune.train; latencies are measured in float32."""
    seed: int = 0
    limit_train: int | None = None
    limit_test: int | None = None
    image_size: int | None = None
    batches: tuple[int, ...] = (1, 128)
    """Batch sizes that are timed."""
    engines: tuple[Engine, ...] = ENGINES
    seconds: float = 3.0
    """For each timing."""
    json: Path | None = None
    """Write all of it there, too."""


@dataclass(frozen=True)
class Small:
    """A small network and how it came about. Accuracies are test top-1 in percent."""

    name: str
    macs: int
    parameters: int
    before: float  # as it came out of pruning
    after: float  # after the training that all get
    seconds_removing: float
    seconds_training: float


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Do the comparison, print it and return it as JSON values."""
    options = tyro.cli(Options, args=arguments)
    images = data.load(options.data, image_size=options.image_size, seed=options.seed)
    images = images.subset(options.limit_train, options.limit_test)
    print(images.source)
    example = torch.zeros(1, *images.train_images.shape[1:])
    torch.manual_seed(options.seed)
    dense = models.create(options.model, len(images.classes))
    if options.precision == "auto":
        shape = (options.batch_size, *images.train_images.shape[1:])
        choice = choose(dense, shape, torch.contiguous_format)
        options = replace(options, precision=choice.precision)
        print(f"precision: {choice.precision}, since {choice.why}")
    started = time.perf_counter()
    train(dense, images, options, options.epochs, options.lr)
    found = cost(dense, example)
    accuracy = test(dense, images, options)
    networks: dict[str, nn.Module] = {"dense": dense}
    rows = [Small("dense", found.macs, found.parameters, accuracy, accuracy, 0.0, time.perf_counter() - started)]
    for name, made in (("fastprune", by_fastprune), ("torch-pruning", by_torch_pruning)):
        if name == "torch-pruning" and find_spec("torch_pruning") is None:
            print("Torch-Pruning is not installed (pip install torch-pruning): fastprune is measured alone")
            continue
        networks[name], row = made(copy.deepcopy(dense), images, options, rows[-1].macs)
        rows.append(row)
    timings = latency(networks, example, options.batches, options.engines, options.seconds)
    result = {
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "torch": torch.__version__,
        "torch_pruning": metadata.version("torch-pruning") if "torch-pruning" in networks else None,
        "networks": [asdict(row) for row in rows],
        "latency": timings.to_json(),
    }
    for line in table(rows):
        print(line)
    print(timings)
    if options.json is not None:
        write_atomically(options.json, [(json.dumps(result, indent=2) + "\n").encode()], what="the comparison")
    return result


def table(rows: list[Small]) -> list[str]:
    """The lines of what is printed."""
    lines = [
        f"{'network':<14}{'MACs':>14}{'parameters':>12}{'pruned %':>10}{'trained %':>11}{'remove s':>10}{'train s':>9}"
    ]
    for row in rows:
        accuracies = f"{row.before:>10.2f}{row.after:>11.2f}"
        times = f"{row.seconds_removing:>10.2f}{row.seconds_training:>9.1f}"
        lines.append(f"{row.name:<14}{row.macs:>14,}{row.parameters:>12,}{accuracies}{times}")
    return lines


def by_fastprune(model: nn.Module, images: ImageData, options: Options, _: int) -> tuple[nn.Module, Small]:
    """Masks that change during three quarters of the training, coupled where outputs are added up; then they go."""
    example = torch.zeros(1, *images.train_images.shape[1:])
    steps = options.fine_tune * steps_per_epoch(images, options)
    until = max(round(0.75 * steps), 1)
    pruner = fastprune.FilterPruner(model, rate=options.rate, until=until, example_input=example)
    pruner.update()
    before = test(model, images, options)
    training = seconds(lambda: train(model, images, options, options.fine_tune, options.lr / 5, pruner.step))
    small: list[nn.Module] = []
    removing = seconds(lambda: small.append(fastprune.compact(model, example)))
    found = cost(small[0], example)
    row = Small("fastprune", found.macs, found.parameters, before, test(small[0], images, options), removing, training)
    return small[0], row


def by_torch_pruning(model: nn.Module, images: ImageData, options: Options, macs: int) -> tuple[nn.Module, Small]:
    """Channels of the whole network ranked by the L1 norm of their groups, so many removed that `macs` are left."""
    example = torch.zeros(1, *images.train_images.shape[1:])
    low, high = 0.0, 1.0
    for _ in range(12):  # the share of channels that leaves as many MACs, from above
        ratio = (low + high) / 2
        low, high = (ratio, high) if cost(_removed(model, example, ratio), example).macs > macs else (low, ratio)
    removing = seconds(lambda: _removed(model, example, high))
    small = _removed(model, example, high)
    found, before = cost(small, example), test(small, images, options)
    training = seconds(lambda: train(small, images, options, options.fine_tune, options.lr / 5))
    return small, Small(
        "torch-pruning", found.macs, found.parameters, before, test(small, images, options), removing, training
    )


def _removed(model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    import torch_pruning

    small = copy.deepcopy(model)
    last = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
    pruner = torch_pruning.pruner.BasePruner(
        small, example, importance, global_pruning=True, pruning_ratio=ratio, ignored_layers=[last]
    )
    pruner.step()
    return small


def seconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def steps_per_epoch(images: ImageData, options: Options) -> int:
    """Whole batches only."""
    return max(len(images.train_labels) // options.batch_size, 1)


def train(
    model: nn.Module,
    images: ImageData,
    options: Options,
    epochs: int,
    peak: float,
    after_step: Callable[[], Any] = lambda: None,
) -> None:
    """Cross entropy, SGD with Nesterov momentum, crops and flips; the same batches for every network."""
    generator = torch.Generator().manual_seed(options.seed)
    augment = data.Augment(pad=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=peak, momentum=0.9, nesterov=True, weight_decay=5e-4)
    total, step = epochs * steps_per_epoch(images, options), 0
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images.train_labels), generator=generator)
        for indices in order.split(options.batch_size)[: steps_per_epoch(images, options)]:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate("one-cycle", step, total, peak, 0)
            batch = data.normalize(augment(images.train_images[indices], generator), images.mean, images.std)
            with autocast(options):
                loss = functional.cross_entropy(model(batch).float(), images.train_labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step()
            step += 1


def autocast(options: Options) -> torch.autocast:
    """The compute dtype."""
    dtype = DTYPES[options.precision]
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


@torch.no_grad()
def test(model: nn.Module, images: ImageData, options: Options) -> float:
    """Test top-1, in percent."""
    model.eval()
    right = 0
    for batch, labels in zip(images.test_images.split(500), images.test_labels.split(500)):
        with autocast(options):
            logits = model(data.normalize(batch, images.mean, images.std))
        right += int((logits.argmax(1) == labels).sum())
    return 100 * right / len(images.test_labels)


if __name__ == "__main__":
    main(sys.argv[1:])
