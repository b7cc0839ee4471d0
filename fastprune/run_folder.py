"""What a run folder holds, as a network to be used: its configuration and its checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import checkpoint, compaction, network
from .checkpoint import CheckpointError
from .memory import is_out_of_memory
from .recipes import Config, read_config
from .train import CHECKPOINT

__all__ = ["RunError", "dense_network", "image_shape", "image_statistics", "load_network"]

_SIDES = {"cifar10": 32, "cifar100": 32, "embedded": 32}  # pixels, of data sets that have one size


class RunError(ValueError):
    """A run folder cannot be used; the message says what is missing."""


def load_network(run: Path) -> tuple[Config, nn.Module]:
    """Return a run's configuration, and its network as the checkpoint has it, in eval mode on the CPU.

    Masks are in it, or what is pruned has been removed already, see ``--compact-when-frozen``.

    Raises:
        RunError: for a folder that is none of a run, and a checkpoint that cannot be read or does not fit.
    """
    try:
        config = read_config(run)
        stored = checkpoint.load(checkpoint.latest(run / CHECKPOINT))
        state = stored["model"]
        if stored.get("compacted") is not None:
            return config, compaction.restored(config, stored["compacted"], state, several=False).model.eval()
        model = network.make_model(config, _count_classes(config, state), torch.device("cpu"))
        network.make_pruner(config, model, steps_per_epoch=1)
        model.load_state_dict(state)
    except (CheckpointError, ValueError) as error:
        raise RunError(str(error)) from error
    except (RuntimeError, KeyError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"{run / CHECKPOINT} does not fit to {run / 'config.json'}: {error}") from error
    return config, model.eval()


def dense_network(config: Config, model: nn.Module) -> nn.Module:
    """The network of :func:`load_network` as large as at first, untrained, in eval mode on the CPU."""
    return network.make_model(config, _count_classes(config, model.state_dict()), torch.device("cpu")).eval()


def _count_classes(config: Config, state: dict[str, Any]) -> int:
    """The outputs of the last linear layer, which is where every network of ours ends."""
    with torch.device("meta"):
        model = network.models.create(config.model, 10, config.stem)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    return len(state[f"{last}.weight"])


def image_shape(run: Path, config: Config, side: int | None = None) -> tuple[int, int, int]:
    """Return `(3, H, W)` of the images that a run was trained on; `side` overrides it.

    Raises:
        RunError: where it is not known.
    """
    found = side or config.image_size or _SIDES.get(str(_described(run).get("data")))
    if found is None:
        raise RunError(f"{run / 'config.json'} does not say how large its images are: give --image-size")
    return 3, found, found


def image_statistics(run: Path, config: Config) -> dict[str, Any]:
    """Return what is known of how images become inputs: `mean`, `std` (of values in [0, 1]) and `classes`."""
    known = {"mean": [0.5] * 3, "std": [0.5] * 3} if config.normalize == "half" else {}
    described = _described(run)
    return {**{name: described[name] for name in ("mean", "std", "classes") if name in described}, **known}


def _described(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "config.json").read_text(encoding="utf-8")))
