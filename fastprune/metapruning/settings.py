"""What a search is made of, its recipes, and the command line that chooses among them."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..precision import PrecisionOrAuto
from ..recipes import flag
from ..schedule import Schedule, learning_rate
from .networks import NAMES, describe
from .space import METRICS, Space, quantity

Stage = Literal["all", "train", "evolve", "final"]


@dataclass(frozen=True)
class SearchConfig:
    """Train a PruningNet, evolve encodings of its network within a budget, and train the best from scratch.

    Every field of the chosen recipe can be overridden by its flag. Limits are numbers such as 330M, 1.5G or 200k, or
    shares of the widest network such as 50%.
    """

    recipe: Literal["paper", "quick"] = "paper"
    """Preset: paper (what the method's authors ran), quick (all three stages in minutes on a CPU)."""
    out: Path = Path("runs/search")
    """Folder of the search: configuration, PruningNet, state of the evolution, the final run, plots."""
    resume: Path | None = None
    """Folder of a search to continue, with its configuration; other flags override it."""
    stage: Stage = "all"
    """all three, or one alone, which goes on from those before it: train (the PruningNet), evolve, final."""
    pruning_net: Path | None = None
    """Folder of another search whose PruningNet is taken, for a search within another budget."""
    init_from: Path | None = None
    """Folder of a run of fastprune.train that pruned filters: what it keeps begins the evolution."""

    network: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(NAMES) + "}")] = "resnet50"
    """The network whose widths are searched."""
    data: str = "auto"
    """As of fastprune.train: auto, cifar10, cifar100, embedded, or an image folder."""
    data_root: Path | None = None
    """Where data sets are kept; $FASTPRUNE_DATA or ~/.cache/fastprune if not given."""
    image_size: int | None = None
    """Side of the images in pixels; their own if not given."""
    limit_train: int | None = None
    """Use only so many training images."""
    limit_test: int | None = None
    """Use only so many test images."""
    validation: float = 0.1
    """Share of the training images that is held out and that fitness is measured on; the test images never are."""
    pad: int = 4
    """Random crops after padding by so many pixels."""
    flip: bool = True
    """Random horizontal flips."""

    epochs: int = 32
    """Of the PruningNet."""
    batch_size: int = 256
    lr: float = 0.1
    """Peak learning rate."""
    schedule: Literal["quarters", "constant", "cosine", "one-cycle", "multistep"] = "quarters"
    """quarters: divided by 10 at a quarter, half and three quarters."""
    momentum: float = 0.9
    weight_decay: float = 1e-4
    """Of the weights of convolutions' and classifier's layers, not of biases."""
    label_smoothing: float = 0.1

    algorithm: Literal["evolution", "nsga2"] = "evolution"
    """evolution: the original one. nsga2: a Pareto front of accuracy against cost (needs pymoo)."""
    population: int = 50
    iterations: int = 20
    mutations: int = 25
    """Of each generation; with the crossovers at most the population, random encodings fill up."""
    crossovers: int = 25
    parents: int = 10
    """The best of all seen, from which mutations and crossovers come."""
    mutation_probability: float = 0.1
    """Of each gene."""
    objective: Literal["flops", "macs", "parameters", "latency_ms"] = "macs"
    """What nsga2 weighs against accuracy."""
    recalibration: int = 25_600
    """Training images on which batch norm is recalibrated before an encoding is evaluated."""
    evaluation_batch: int = 256
    """Images at a time; halved where memory runs out."""
    workers: int = 0
    """Evaluate encodings in so many processes at once, through Ray; 0 for none. RAY_ADDRESS names a cluster."""

    min_flops: str | None = None
    """In the original system's FLOPs; ResNet-50 1950M and MobileNets none if no limit at all is given."""
    max_flops: str | None = None
    """Likewise; ResNet-50 2050M, MobileNets 330M, the others half of the widest network's MACs."""
    min_macs: str | None = None
    max_macs: str | None = None
    min_parameters: str | None = None
    max_parameters: str | None = None
    min_latency_ms: str | None = None
    max_latency_ms: str | None = None
    """Milliseconds of a forward pass, from a table measured on this device."""
    latency_batch: int = 1
    """Images of that forward pass."""

    final_epochs: int = 120
    """Of the best encoding's network, trained from scratch."""
    final_batch_size: int = 256
    final_lr: float = 0.2
    final_schedule: Schedule = "one-cycle"
    final_weight_decay: float = 5e-4

    precision: PrecisionOrAuto = "auto"
    """As of fastprune.train; decided once, for the whole search."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    channels_last: bool = True
    seed: int = 0
    max_steps: int | None = None
    """Stop the training of the PruningNet when it has done so many steps, with a checkpoint to resume from."""

    def __post_init__(self) -> None:
        describe(self.network)
        least_one = ("epochs", "batch_size", "iterations", "evaluation_batch", "final_epochs", "final_batch_size")
        for name in (
            *least_one,
            "latency_batch",
            "lr",
            "final_lr",
            "limit_train",
            "limit_test",
            "image_size",
            "max_steps",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{flag(name)} must be above 0, got {value}")
        for name in ("momentum", "weight_decay", "final_weight_decay", "pad", "seed", "recalibration", "workers"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{flag(name)} must not be negative, got {getattr(self, name)}")
        if not 0 < self.validation < 1:
            raise ValueError(f"--validation must be above 0 and below 1, got {self.validation}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"--label-smoothing must be in [0, 1], got {self.label_smoothing}")
        if self.seed >= 2**31:
            raise ValueError(f"--seed must be below 2**31, got {self.seed}")
        for name in METRICS:
            for end in ("min", "max"):
                if (text := getattr(self, f"{end}_{name}")) is not None:
                    quantity(text, None if name == "latency_ms" else 1.0)

    @property
    def needs_latency(self) -> bool:
        """Whether the budget limits it, or the algorithm weighs it."""
        limited = self.min_latency_ms is not None or self.max_latency_ms is not None
        return limited or (self.algorithm == "nsga2" and self.objective == "latency_ms")

    def budget(self, resolution: int, num_classes: int) -> dict[str, tuple[float | None, float | None]]:
        """The limits in numbers; the original search's where none is given, else half of the MACs."""
        description = describe(self.network)
        widest = Space(description, resolution, num_classes)
        whole = {metric: widest.costs_of((30,) * widest.genes)[metric] for metric in METRICS[:3]}
        limits = {}
        for metric in METRICS:
            texts = getattr(self, f"min_{metric}"), getattr(self, f"max_{metric}")
            low, high = (None if text is None else quantity(text, whole.get(metric)) for text in texts)
            if (low, high) != (None, None):
                limits[metric] = low, high
        if limits:
            return limits
        return {"flops": description.flops} if description.flops else {"macs": (None, whole["macs"] / 2)}

    def learning_rate(self, step: int, total: int) -> float:
        """Of step ``step`` (0-based) of ``total``."""
        if self.schedule == "quarters":
            return self.lr * 0.1 ** min(4 * step // total, 3)
        return learning_rate(self.schedule, step, total, self.lr, warmup=0)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON takes them; paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


RECIPES: Mapping[str, SearchConfig] = {
    "paper": SearchConfig(),
    "quick": SearchConfig(
        recipe="quick",
        out=Path("runs/search-quick"),
        network="resnet20",
        image_size=16,
        pad=0,
        flip=False,
        epochs=18,
        batch_size=64,
        lr=0.1,
        schedule="one-cycle",
        population=20,
        iterations=5,
        mutations=8,
        crossovers=8,
        parents=6,
        recalibration=512,
        evaluation_batch=256,
        min_macs="40%",
        max_macs="50%",
        final_epochs=12,
        final_batch_size=64,
        final_lr=0.1,
    ),
}
# What the authors ran for the MobileNets.
_PAPER_MOBILENETS: dict[str, Any] = {"epochs": 64, "lr": 0.25}


def recipe(name: str, network: str | None) -> SearchConfig:
    """The recipe for a network; ``None`` for the recipe's own."""
    config = RECIPES.get(name, RECIPES["paper"])
    if network is None or network not in NAMES:
        return config
    special = _PAPER_MOBILENETS if name == "paper" and network.startswith("mobilenet") else dict[str, Any]()
    return dataclasses.replace(config, network=network, **special)


def read_config(run: Path) -> SearchConfig:
    """The configuration that a search's folder was made with.

    Raises:
        ValueError: if there is none, or it is not ours; the message names the file.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{run} is not the folder of a search: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["search"]
        for name in ("out", "resume", "pruning_net", "init_from", "data_root"):
            values[name] = Path(values[name]) if values[name] is not None else None
        return SearchConfig(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a search's configuration: {error}") from error


def parse(arguments: Sequence[str]) -> SearchConfig:
    """The configuration that a command line asks for: a recipe (or a search to resume), and what overrides it.

    Unknown flags and bad values end the program with a message and exit status 2, as ``--help`` does with 0.
    """
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    resume, name = _value(words, "--resume"), _value(words, "--recipe")
    default = recipe(name or "paper", _value(words, "--network"))
    if resume is not None:
        try:
            run = read_config(Path(resume))
            if name not in (None, run.recipe):
                raise ValueError(
                    f"--recipe {name} cannot be had with --resume of a {run.recipe!r} search: leave it out"
                )
        except ValueError as error:
            print(f"fastprune.search: error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        default = dataclasses.replace(run, out=Path(resume), resume=Path(resume), stage="all", max_steps=None)
    return tyro.cli(SearchConfig, args=words, default=default, prog="python -m fastprune.search")


def _value(words: Sequence[str], name: str) -> str | None:
    positions = [i for i, word in enumerate(words[:-1]) if word == name]
    return words[positions[-1] + 1] if positions else None
