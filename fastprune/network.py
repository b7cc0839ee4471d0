"""What a run trains: the network, and its pruner, regulariser and optimizer, as a configuration asks for them."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import distributed, models
from .decorrelation import Decorrelation
from .onednn import protect
from .optim import PrunedSGD
from .precision import DTYPES
from .pruner import FilterPruner, Pruner, WeightPruner
from .pruning_schedule import why_never
from .recipes import Config
from .sync_batchnorm import synchronise_batchnorms


def choose_device(config: Config) -> torch.device:
    """The device asked for; of several processes each has a GPU of its own.

    Raises:
        ValueError: where there is no such device.
    """
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if name == "cuda" and distributed.size() > 1:
        return torch.device("cuda", distributed.local_rank())
    return torch.device(name)


def memory_format(config: Config) -> torch.memory_format:
    """That of images and weights."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def make_model(config: Config, classes: int, device: torch.device) -> nn.Module:
    """The network, its weights drawn from the seed, on the device.

    Raises:
        ValueError: for a network that does not exist in this form.
    """
    torch.manual_seed(config.seed)
    model = models.create(config.model, classes, config.stem)
    return model.to(device, memory_format=memory_format(config))  # type: ignore[call-overload]


def make_pruner(config: Config, model: nn.Module, steps_per_epoch: int) -> Pruner | None:
    """The pruner of ``model``, which it converts in place; None where nothing is pruned."""
    if not config.prunes:
        return None
    common: dict[str, Any] = {
        "rate": config.prune_rate,
        "importance": config.importance,
        "every": config.prune_every,
        "until": round(config.prune_until * config.epochs) * steps_per_epoch,
        "feedback": config.feedback,
        # As published, iterations count from the start of each epoch.
        "steps_per_epoch": steps_per_epoch if config.recipe == "faithful" else None,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "nothing will be pruned")  # said by never_pruned, once
        if config.prune_type == "unstructured":
            return WeightPruner(model, **common)
        example = torch.zeros(1, 3, 32, 32, device=next(model.parameters()).device)  # of any size
        return FilterPruner(
            model,
            **common,
            scope=config.prune_scope,
            min_kept=config.min_kept,
            round_to=config.round_to,
            example_input=example if config.couple else None,
            removable_only=config.couple,
        )


def never_pruned(pruner: Pruner | None) -> str:
    """Why a run prunes nothing; empty if it does, or is not meant to."""
    why = why_never(pruner.every, pruner.until, pruner.steps_per_epoch) if pruner is not None else ""
    return why and f"nothing will be pruned: {why} (--prune-every, --prune-until, --batch-size)"


class Network:
    """A model with what belongs to it.

    Attributes:
        model: where the parameters are, its batch norm over all processes if so configured.
        pruner, decorrelation: of the model; None where there is none.
        optimizer: of all parameters.
        forward, test_forward: the model as it is called to train, compiled if so configured, its gradients averaged
            over the processes; and as it is called to test.
        compacted: if the model is a small one, what it takes to make it again, see :mod:`fastprune.compaction`.

    Args:
        config: of the run.
        model: on its device. Edited in place.
        pruner: of ``model``.
        several: False for a network of this process alone.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        pruner: Pruner | None,
        compacted: dict[str, Any] | None = None,
        several: bool | None = None,
    ) -> None:
        self.config, self.pruner, self.compacted = config, pruner, compacted
        several = distributed.size() > 1 if several is None else several
        self.model = synchronise_batchnorms(model) if several and config.sync_batchnorm else model
        protect(self.model)
        self.decorrelation = None
        if config.decorrelation != "none":
            options = (config.alpha, config.include_diagonal, config.include_pruned)
            self.decorrelation = Decorrelation(self.model, config.decorrelation, *options)
        filters = pruner if isinstance(pruner, FilterPruner) else None
        self.optimizer = PrunedSGD(
            self.model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            pruner=filters,
            # Nothing here writes weights through .data. A compiled forward masks them itself.
            masked_dtype=DTYPES[config.precision] if filters and not config.compile else None,
        )
        forward: nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore[assignment]
        self.test_forward, self.forward = forward, _parallel(forward) if several else forward

    def settle(self) -> None:
        """Make the state the same in every process, before it is tested or saved.

        Without ``sync_batchnorm`` the running statistics of batch norm are each process's own; they become their mean.
        """
        if not self.config.sync_batchnorm:
            norms = [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]
            statistics = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
            distributed.average_([tensor for tensor in statistics if tensor is not None])

    def not_finite(self) -> str | None:
        """What of the state is no longer finite, the first of it."""
        momenta = {
            f"momentum of {name}": self.optimizer.state[parameter].get("momentum_buffer")
            for name, parameter in self.model.named_parameters()
        }
        named: dict[str, Tensor | None] = {**self.model.state_dict(), **momenta}
        floats = {name: tensor for name, tensor in named.items() if tensor is not None and tensor.is_floating_point()}
        finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
        return None if all(finite) else list(floats)[finite.index(False)]

    def figures(self) -> dict[str, Any]:
        """What is kept of the convolutions, for an epoch's record; of a small network, when it was made."""
        if self.compacted is not None:
            return dict(self.compacted["figures"])
        layers = {name: module for name, module in self.model.named_modules() if isinstance(module, nn.Conv2d)}
        filters = {name: layer.out_channels for name, layer in layers.items()}
        kept = filters | (self.pruner.kept() if self.pruner is not None else {})
        return {
            "sparsity": self.pruner.sparsity() if self.pruner is not None else 0.0,
            "kept_filters": sum(kept.values()),
            "filters": sum(filters.values()),
            "kept_per_layer": list(kept.values()),
            "layers": list(filters),
            "filters_per_layer": list(filters.values()),
        }

    def state_dict(self) -> dict[str, Any]:
        """The model's, the optimizer's and the pruner's."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "pruner": self.pruner.state_dict() if self.pruner is not None else None,
            "compacted": self.compacted,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the optimizer's settings are those of this configuration.

        Raises:
            RuntimeError, ValueError, KeyError, TypeError: if it is of another network.
        """
        self.model.load_state_dict(state["model"])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        if self.pruner is not None:
            self.pruner.load_state_dict(state["pruner"])


def _parallel(forward: nn.Module) -> DistributedDataParallel:
    device = next(forward.parameters()).device
    parallel = DistributedDataParallel(forward, device_ids=[device] if device.type == "cuda" else None)
    # Running statistics of batch norm stay each process's own within an epoch, and masks are verified, not overwritten.
    parallel.broadcast_buffers = False  # the argument of this name is deprecated in newer releases of torch
    return parallel
