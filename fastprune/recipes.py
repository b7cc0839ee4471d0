"""What a training run is made of, the presets, and the command line that chooses among them."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from . import models
from .arguments import finite_number, whole_number
from .precision import PrecisionOrAuto
from .schedule import Schedule

RecipeName = Literal["fast", "quick", "faithful", "description"]


@dataclass(frozen=True)
class Config:
    """Train a network while pruning and decorrelating its filters, and report what came out.

    Every field of the chosen recipe can be overridden by its flag.
    """

    recipe: RecipeName = "fast"
    """Preset: fast (modern recipe, ResNet-50), quick (ResNet-20, minutes on a CPU), faithful (what the authors' code
    ran: ResNet-56, constant learning rate), description (what their text says: ResNet-50, batch 128)."""
    out: Path = Path("runs/latest")
    """Folder of the run: configuration, metrics, checkpoint, plots."""
    resume: Path | None = None
    """Folder of a run to continue, with its configuration; other flags override it."""

    model: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(models.NAMES) + "}")] = "resnet50"
    """The network."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First convolution: 3×3 without max-pool, or 7×7 of stride 2 with it (ResNet-18 to -152)."""

    data: str = "auto"
    """auto (CIFAR-10 if on disk or to be had, else embedded), cifar10, cifar100, embedded, or an image folder with
    train/<class>/* and test|val/<class>/*."""
    data_root: Path | None = None
    """Where data sets are kept; $FASTPRUNE_DATA or ~/.cache/fastprune if not given."""
    image_size: int | None = None
    """Side of the images in pixels; their own if not given."""
    limit_train: int | None = None
    """Use only so many training images."""
    limit_test: int | None = None
    """Use only so many test images."""
    normalize: Literal["data", "half"] = "data"
    """Mean and deviation of the training images, or 0.5 for both."""
    pad: int = 4
    """Random crops after padding by so many pixels."""
    flip: bool = True
    """Random horizontal flips."""
    cutout: int = 0
    """Side of a random square set to 0, in pixels; 0 for none."""

    epochs: int = 40
    batch_size: int = 256
    """Images of a step, of all processes together."""
    accumulate: int = 1
    """Pass each batch through the network in so many parts, for less memory: their gradients are added up. Batch norm
    takes each part by itself."""
    lr: float = 0.2
    """Peak learning rate."""
    schedule: Schedule = "one-cycle"
    warmup_epochs: float = 1.0
    """Linear warm-up, in epochs."""
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1

    prune_type: Literal["structured", "unstructured", "none"] = "structured"
    """Prune whole filters, single weights, or nothing."""
    prune_rate: float = 0.6
    """Share of filters (or weights) below the global threshold; 0 trains the dense network."""
    importance: Literal["l1", "l2", "fpgm", "grad", "taylor"] = "l1"
    """fpgm (distance from the geometric median) is for filters; grad and taylor are for single weights."""
    prune_scope: Literal["global", "layer"] = "global"
    """One threshold over the filters of all layers, or one for each layer."""
    min_kept: int = 1
    """Filters that every layer keeps, whatever the threshold; 0 lets whole layers be pruned."""
    couple: bool = False
    """Keep or prune filters together whose outputs are added up, and prune only what can be removed: residual streams
    get narrower, and the small network faster."""
    compact_when_frozen: bool = False
    """When the masks stay, train on without what is pruned: a small network, which at first computes the same but near
    the borders of images. Batch norm and the regulariser no longer count what was pruned."""
    round_to: int = 1
    """Keep filters in multiples of this."""
    prune_every: int = 4
    """Update the masks every N iterations (recipe faithful: counted from the start of each epoch, as published)."""
    prune_until: float = 226 / 300
    """Share of the epochs after which the masks stay."""
    feedback: Literal["normalized", "straight-through", "none"] = "normalized"
    """The gradient of pruned filters: corrected for BatchNorm's amplification, as it comes, or none."""

    decorrelation: Literal["none", "covariance", "kernel-covariance", "correlation", "orthogonality"] = "covariance"
    """The regulariser."""
    alpha: float = 0.01
    """Its factor in the loss."""
    include_diagonal: bool = True
    """Whether covariances count variances."""
    include_pruned: bool = True
    """Whether the regulariser counts pruned filters."""

    precision: PrecisionOrAuto = "auto"
    """Of the convolutions. auto: bf16 where this machine is faster in it, which takes a moment to try, else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    channels_last: bool = True
    sync_batchnorm: bool = True
    """Under torchrun: batch norm takes its statistics over all processes, so that the run is that of a single one.
    Without, each takes its share of the batch by itself, which is faster."""
    compile: bool = False
    """Compile the model (torch.compile)."""
    seed: int = 0
    minutes: float | None = None
    """Time for a fresh run. A few steps are tried first; if they take too long for it, the run has fewer epochs, or
    images, and says so. None (--minutes None): no limit."""
    max_steps: int | None = None
    """Stop when the run has done so many steps, with a checkpoint to resume from."""
    target_accuracy: float | None = None
    """Stop after the epoch that reaches this test top-1, in percent."""

    def __post_init__(self) -> None:
        if not models.exists(self.model):
            raise ValueError(f"--model must be one of {', '.join(models.NAMES)}; got {self.model!r}")
        self._check_numbers()
        counts = ("epochs", "batch_size", "accumulate", "prune_every", "max_steps", "limit_train", "limit_test")
        for name in (*counts, "round_to", "image_size", "lr", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{flag(name)} must be above 0, got {value}")
        for name in ("warmup_epochs", "momentum", "weight_decay", "alpha", "min_kept", "pad", "cutout", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{flag(name)} must not be negative, got {getattr(self, name)}")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"--accumulate cuts a batch into parts: at most --batch-size {self.batch_size}, got {self.accumulate}"
            )
        if not 0 <= self.prune_rate < 1:
            raise ValueError(f"--prune-rate must be in [0, 1), got {self.prune_rate}")
        for name, most in (("prune_until", 1), ("label_smoothing", 1), ("target_accuracy", 100)):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= most:
                raise ValueError(f"{flag(name)} must be in [0, {most}], got {value}")
        if self.couple and not (self.prunes and self.prune_type == "structured"):
            raise ValueError("--couple is for filters: it needs --prune-type structured and a --prune-rate above 0")
        if self.compact_when_frozen and not (self.prunes and self.prune_type == "structured"):
            raise ValueError(
                "--compact-when-frozen removes pruned filters: it needs --prune-type structured and a --prune-rate "
                "above 0"
            )
        if self.seed >= 2**31:
            raise ValueError(f"--seed must be below 2**31, got {self.seed}")
        if self.nesterov and self.momentum == 0:
            raise ValueError("--nesterov needs a --momentum above 0; add --no-nesterov to do without")
        by_gradient = self.importance in ("grad", "taylor")
        if self.prune_type == "structured" and by_gradient:
            raise ValueError(
                f"--importance {self.importance} is for --prune-type unstructured; filters take l1, l2 or fpgm"
            )
        if self.prune_type == "unstructured" and self.importance == "fpgm":
            raise ValueError("--importance fpgm is for filters; single weights take l1, l2, grad or taylor")
        if self.prunes and by_gradient and self.precision == "fp16":
            raise ValueError(
                f"--importance {self.importance} cannot rank the gradients of fp16, which overflow now and then; "
                "use --precision bf16 or fp32"
            )
        if self.prune_type == "unstructured" and self.feedback == "normalized":
            # BatchNorm's amplification is of filters without variance: single weights have no such correction.
            object.__setattr__(self, "feedback", "straight-through")

    def _check_numbers(self) -> None:
        """Whole numbers where only those make sense, finite ones elsewhere, as plain numbers, which JSON takes."""
        for name, hint in get_type_hints(Config).items():
            value, kinds = getattr(self, name), {hint, *get_args(hint)}
            if value is None and type(None) in kinds:
                continue
            if int in kinds:
                object.__setattr__(self, name, whole_number(flag(name), value))
            elif float in kinds:
                number = finite_number(flag(name), value)
                object.__setattr__(self, name, value if isinstance(value, int) else number)

    @property
    def prunes(self) -> bool:
        """Whether anything is pruned."""
        return self.prune_type != "none" and self.prune_rate > 0

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON takes them; paths as text."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}


def flag(name: str) -> str:
    """A field's flag."""
    return "--" + name.replace("_", "-")


_FAITHFUL = Config(
    recipe="faithful",
    model="resnet56",
    normalize="half",
    flip=False,
    epochs=300,
    batch_size=256,
    lr=0.2,
    schedule="constant",
    warmup_epochs=0,
    nesterov=False,
    weight_decay=1e-4,
    label_smoothing=0,
    min_kept=0,
    feedback="straight-through",
    decorrelation="none",
    alpha=0.7,
    precision="fp32",
    channels_last=False,
    seed=777,
)

RECIPES: Mapping[str, Config] = {
    "fast": Config(),
    "quick": Config(recipe="quick", model="resnet20", epochs=6, batch_size=128, minutes=10, out=Path("runs/quick")),
    "faithful": _FAITHFUL,
    "description": dataclasses.replace(
        _FAITHFUL, recipe="description", model="resnet50", batch_size=128, decorrelation="covariance"
    ),
}

# The original program's flags, and the values that are spelt otherwise here.
_ORIGINAL_FLAGS = {
    "--layers": "--model",
    "--prune-imp": "--importance",
    "--reg": "--decorrelation",
    "--odecay": "--alpha",
    "--wd": "--weight-decay",
}
_ORIGINAL_VALUES = {
    "--decorrelation": {"reg_cov": "covariance", "reg_orth": "orthogonality", "None": "none"},
    "--prune-type": {"None": "none"},
    "--importance": {"L1": "l1", "L2": "l2", "syn": "taylor"},
}


def translate(arguments: Sequence[str]) -> list[str]:
    """The command line with the original program's flags and values replaced by ours; the rest as it is."""
    words = [word for argument in arguments for word in _split(argument)]
    translated: list[str] = []
    for word in words:
        last = translated[-1] if translated else ""
        name = word.replace("_", "-")
        if name in _ORIGINAL_FLAGS:
            translated.append(_ORIGINAL_FLAGS[name])
        elif last == "--model" and word.isdigit():
            translated.append(f"resnet{word}")
        else:
            spelt = _ORIGINAL_VALUES.get(last.replace("_", "-"), {})
            translated.append(spelt.get(word, word))
    return translated


def _split(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if equals and name.startswith("--") else [argument]


def read_config(run: Path) -> Config:
    """The configuration that a run folder was trained with.

    Raises:
        ValueError: if there is none, or it is not ours; the message names the file.
    """
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"{run} is not the folder of a run: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["config"]
        for name in ("out", "resume", "data_root"):
            values[name] = Path(values[name]) if values[name] is not None else None
        return Config(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a run's configuration: {error}") from error


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that a command line asks for: a recipe (or a run to resume), and what overrides it.

    A resumed run goes on in its own folder, and to its end: ``out`` and ``max_steps`` are not taken over.
    Unknown flags and bad values end the program with a message and exit status 2, as ``--help`` does with 0.
    """
    words = translate(arguments)
    resume, recipe = _value(words, "--resume"), _value(words, "--recipe")
    default = RECIPES.get(recipe or "fast", Config())
    if resume is not None:
        try:
            run = read_config(Path(resume))
            if recipe not in (None, run.recipe):
                raise ValueError(f"--recipe {recipe} cannot be had with --resume of a {run.recipe!r} run: leave it out")
        except ValueError as error:
            print(f"fastprune.train: error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        default = dataclasses.replace(run, out=Path(resume), resume=Path(resume), max_steps=None)
    return tyro.cli(Config, args=words, default=default, prog="python -m fastprune.train")


def _value(words: Sequence[str], name: str) -> str | None:
    positions = [i for i, word in enumerate(words[:-1]) if word == name]
    return words[positions[-1] + 1] if positions else None
