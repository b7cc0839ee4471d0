"""Networks in one file, without pickle: tensors as safetensors, and the architecture as JSON in the header.

The tensors have the names of the network's `state_dict`, so that any reader of safetensors finds them. The header's
metadata has one key, `fastprune.network`: the architecture (see architecture), what the inputs look like, and what the
user added; with a checksum of the file, as checkpoints have it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from .architecture import ArchitectureError, build, describe, tensors_of
from .checkpoint import CheckpointError, plain, read_sealed, write_sealed
from .graph import trace
from .inputs import describe as describe_inputs
from .inputs import is_described, positional, zeros

__all__ = ["NetworkFileError", "example_inputs", "is_network_file", "load", "save"]

_KEY = "fastprune.network"
_VERSION = 1


class NetworkFileError(ValueError):
    """A saved network cannot be read; the message names the file and what is wrong with it."""


def save(
    model: nn.Module,
    path: str | Path,
    example_input: Any = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model`` to ``path``: what :func:`load` needs to make it again, without the code that defined it.

    What is saved is its graph (see :func:`fastprune.graph.trace`): layers of ``torch.nn``, :class:`MaskedConv2d` with
    their masks, functions and tensors; the list is ``fastprune/layer_kinds.py``. Hooks, and what :func:`compact`
    reports, are not.

    Args:
        model: any that torch.fx traces; a compact one, too. Not changed.
        path: of the file, in an existing folder; replaced if it is there.
        example_input: a tensor, or a tuple of positional inputs, each a tensor or a tuple, list or dict of them. Their
            shapes and dtypes are kept for exports, and inputs with a default that are among them stay inputs.
        info: JSON values to be kept with it, such as class names or the mean and deviation of the images.

    Raises:
        ValueError: if the model cannot be traced or run on the example input, has a part that no saved network may
            have, shares a parameter between layers, or if the inputs or tensors are such as no file can hold.
        TypeError: for info that JSON cannot hold.
        OSError: where writing fails; what was there before stays as it was.
    """
    inputs: list[Any] = []
    example = None if isinstance(example_input, tuple) and not example_input else example_input
    if example is not None:
        positional(example)
        inputs = describe_inputs(example)
    network = trace(model, example)
    try:
        tensors = _storable(tensors_of(network))
        architecture = describe(network)
        build(json.loads(json.dumps(architecture)), tensors)  # what cannot be loaded is not written
    except ArchitectureError as error:
        raise ValueError(f"{type(model).__name__} cannot be saved: {error}") from error
    frozen = [name for name, own in network.named_parameters() if own.is_floating_point() and not own.requires_grad]
    content = {"architecture": architecture, "inputs": inputs, "info": dict(info or {}), "frozen": frozen}
    write_sealed(Path(path), tensors, _KEY, {"version": _VERSION}, content, "saved network")


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file can hold them.

    Raises:
        ArchitectureError: for two that are one, and for one that no file can hold.
    """
    owners: dict[int, str] = {}
    for name, tensor in tensors.items():
        other = owners.setdefault(id(tensor), name)
        if other != name:
            raise ArchitectureError(f"{other} and {name} are one tensor, which the file would make two of")
    try:
        return {name: plain(tensor, name, "saved network") for name, tensor in tensors.items()}
    except TypeError as error:
        raise ArchitectureError(str(error)) from error


def load(path: str | Path, device: torch.device | str = "cpu") -> fx.GraphModule:
    """Return the network that :func:`save` wrote, in eval mode.

    Nothing that the file says is executed: it can only choose among known layers and functions. Memory is taken for the
    tensors that are in it and for nothing else.

    Returns:
        A ``GraphModule`` with the tensors, bit by bit, and what was frozen frozen; its ``meta`` has ``inputs`` and
        ``info`` as they were saved.

    Raises:
        NetworkFileError: for a missing, unreadable, truncated, damaged or foreign file, of another version or with a
            description that :func:`save` does not write.
    """
    try:
        stored, tensors = read_sealed(Path(path), _KEY, _VERSION, "saved network")
        network = build(stored.get("architecture"), tensors)
        inputs, info = stored.get("inputs"), stored.get("info")
        if not isinstance(info, dict) or not is_described(inputs):
            raise ArchitectureError("it does not say what its inputs are")
        _freeze(network, stored.get("frozen", []))  # files of before have none
    except CheckpointError as error:
        raise NetworkFileError(str(error)) from error
    except ArchitectureError as error:
        raise NetworkFileError(f"{path} is no network that fastprune saves: {error}") from error
    network.meta["inputs"], network.meta["info"] = inputs, info
    return network.to(device)


def _freeze(network: fx.GraphModule, frozen: Any) -> None:
    parameters = dict(network.named_parameters())
    if not isinstance(frozen, list) or not all(type(name) is str and name in parameters for name in frozen):
        raise ArchitectureError("it freezes what is no parameter")
    for name in frozen:
        parameters[name].requires_grad_(False)


def example_inputs(network: fx.GraphModule) -> tuple[Any, ...]:
    """Return zeros like the example input that a loaded network was saved with; () where it was saved without."""
    return tuple(zeros(network.meta.get("inputs", [])))


def is_network_file(path: Path) -> bool:
    """Whether it is a file that :func:`save` may have written, by its header."""
    try:
        with open(path, "rb") as file:
            return _KEY.encode() in file.read(200)
    except OSError:
        return False
