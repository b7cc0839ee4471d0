"""Which filters a pruner may prune, how a model is converted or left as it was, and how it is converted back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from .coupling import Ids, Written, written_channels
from .nn import MaskedConv2d, is_listed, listed, mask_convolutions
from .output_layers import output_layers

Entries = Iterable[str | nn.Module]


def unwrapped(model: nn.Module) -> tuple[nn.Module, str]:
    """The model itself, and what the names of its modules begin with in DistributedDataParallel and the like.

    Raises:
        TypeError: for an average of another model.
    """
    prefix = ""
    while True:
        if isinstance(model, AveragedModel):
            raise TypeError(
                "an AveragedModel is a copy that is not trained: prune the model that is, before AveragedModel(model) "
                "copies it, masks and all"
            )
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model, prefix = model.module, f"{prefix}module."
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # of torch.compile
            model, prefix = inner, f"{prefix}_orig_mod."
        else:
            return model, prefix


@dataclass(frozen=True)
class Plan:
    """What is masked of a model.

    Attributes:
        ignore, include: as given.
        left: by name, convolutions that are left alone although they are not in ``ignore``, and why.
        pinned: by name of a masked one, ``[F]``: filters that always stay.
        notes: by name of a masked one, what is to be said about filters that cannot be removed.
        written: by name, the channels that filters write; None where that is not known.
    """

    ignore: list[str | nn.Module]
    include: list[str | nn.Module] | None
    left: dict[str, str] = field(default_factory=dict)
    pinned: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    written: dict[str, Ids] | None = None

    def mask(self, model: nn.Module, by_weight: bool = False) -> dict[str, MaskedConv2d]:
        """Convert the model; see :func:`fastprune.nn.mask_convolutions`."""
        return mask_convolutions(model, [*self.ignore, *self.left], by_weight, self.include)

    def pinned_among(self, filters: Mapping[str, int]) -> list[int]:
        """Positions among the filters of all masked layers, in order, of those that always stay."""
        layers = [self.pinned.get(name, np.zeros(count, np.bool_)) for name, count in filters.items()]
        return np.flatnonzero(np.concatenate(layers)).tolist()


def plan(
    model: nn.Module,
    ignore: Entries = (),
    include: Entries | None = None,
    example_input: Tensor | tuple[Any, ...] | None = None,
    removable_only: bool = True,
) -> Plan:
    """What :class:`fastprune.FilterPruner` masks of a model, with its arguments.

    Raises:
        ValueError: if nothing is left to be pruned, or if a model cannot be traced with ``example_input``.
        TypeError: for arguments of another kind.
    """
    made = Plan(listed("ignore", ignore), None if include is None else listed("include", include))
    inner, prefix = unwrapped(model)
    if lazy := [name for name, parameter in model.named_parameters() if is_lazy(parameter)]:
        raise TypeError(f"{lazy[0]} has no shape yet: call the model once on an input, then make its pruner")
    written = None if example_input is None else written_channels(inner, example_input)
    if written is not None:
        made = Plan(made.ignore, made.include, written={f"{prefix}{name}": own.ids for name, own in written.items()})
    if removable_only:
        stays = _stays(inner, written)
        _settle(made, model, {f"{prefix}{name}".rstrip("."): own for name, own in stays.items()})
    return made


# Which filters of a convolution cannot be removed, None for all of them; and why.
Stays = tuple[NDArray[np.bool_] | None, str]


def _stays(model: nn.Module, written: Mapping[str, Written] | None) -> dict[str, Stays]:
    """By name of a convolution, which of its filters cannot be removed, as far as can be told."""
    if isinstance(model, nn.Conv2d):
        return {"": (None, "writes the output")}
    if written is None:
        return dict.fromkeys(_output_layers(model), (None, "writes the output"))
    stays: dict[str, Stays] = {name: (~own.removable, own.why) for name, own in written.items() if own.why}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name not in written:
            stays[name] = None, "not called"
    return stays


def _settle(made: Plan, model: nn.Module, stays: Mapping[str, Stays]) -> None:
    """Leave alone what cannot be removed, unless it is asked for by its very name."""
    asked = made.include or []
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and not is_listed(name, module, made.ignore)
        and (made.include is None or is_listed(name, module, asked))
    }
    for name, module in chosen.items():
        which, why = stays.get(name, (None, ""))
        if any(name == entry if isinstance(entry, str) else module is entry for entry in asked):
            made.notes[name] = why and f"asked for in include, though not all of it can be removed: {why}"
        elif why and (which is None or which.all()):
            made.left[name] = why
        elif why and which is not None:
            made.pinned[name] = which
            made.notes[name] = f"{int(which.sum())} cannot be removed: {why}"
    if chosen and len(made.left) == len(chosen):
        reasons = [f"{name or 'the model'}: {why}" for name, why in made.left.items()]
        if len(reasons) > 3:
            reasons[3:] = [f"and {len(reasons) - 3} more"]
        raise ValueError(
            f"there is nothing to prune that could be removed ({'; '.join(reasons)}): name layers one by one in "
            f"include to prune them all the same, or pass removable_only=False"
        )


def check_alike(layers: Mapping[str, nn.Conv2d]) -> None:
    """Raise ValueError for weights of several dtypes or devices: they are ranked together."""
    kinds = {name: f"{layer.weight.dtype} on {layer.weight.device}" for name, layer in layers.items()}
    first, *others = kinds
    if odd := next((name for name in others if kinds[name] != kinds[first]), None):
        raise ValueError(
            f"layers are ranked together, which takes one dtype and one device: {first} is {kinds[first]}, {odd} is "
            f"{kinds[odd]}; convert or move the model, or list layers in ignore"
        )


def _output_layers(model: nn.Module) -> set[str]:
    """Those that write the output, as far as can be told; and a warning of what cannot be told."""
    try:
        found = output_layers(model)
    except ValueError as error:
        _warn_once(
            f"{error}. So FilterPruner can tell neither which layers write the output nor which filters compact() can "
            f"remove, and prunes all of them: list the output layers (heads, classifiers) in ignore"
        )
        return set()
    _warn_once(
        "without example_input, FilterPruner cannot know which filters compact() can remove, and may prune others for "
        "nothing: pass example_input=torch.zeros(1, 3, H, W), or what else your model takes. (removable_only=False "
        "prunes every convolution, and does not warn.)"
    )
    return found


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=6)  # where FilterPruner is called


def explain_missing_masks(model: nn.Module, keys: Any) -> None:
    """Say what to do with a ``state_dict`` of a dense model; a hook of masked ones, behind ``load_state_dict``."""
    names = tuple(f"{name}.mask" for name, module in model.named_modules() if isinstance(module, MaskedConv2d))
    without = [key for key in keys.missing_keys if key.endswith(names)]
    dense = [key for key in without if f"{key.removesuffix('mask')}weight" not in keys.missing_keys]
    if dense:
        warnings.warn(
            f"the state_dict has weights without masks ({dense[0]}), so that the model keeps the masks that it has: "
            f"load a dense model's weights before a pruner converts the model; or with strict=False, and then call "
            f"pruner.update()",
            stacklevel=4,  # where load_state_dict is called
        )
