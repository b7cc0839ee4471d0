"""Mistakes that fastprune has made, or could make, to be found by the random networks."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import nn

from fastprune import channel_rules, channels, graph, in_place, layer_kinds, shrink, tracer
from fastprune.channel_state import Channels
from fastprune.inputs import positional
from fastprune.keep import Selected

from .checks import check
from .draw import draw

Wrapper = Callable[..., Any]
compacting = sys.modules["fastprune.compact"]  # whose name in the package is the function's


def _wrapped(owner: Any, name: str, wrapper: Wrapper) -> Callable[[], Any]:
    """A context in which a function is the wrapper, which is called with the function itself first."""
    own = getattr(owner, name)
    return lambda: patch.object(owner, name, lambda *args, **kwargs: wrapper(own, *args, **kwargs))


def _listed(name: str, kind: type[nn.Module]) -> Callable[[], Any]:
    """A context in which a list of channel_rules has one kind more."""
    return lambda: patch.object(channel_rules, name, (*getattr(channel_rules, name), kind))


def _changed(module: nn.Module, **settings: Any) -> Any:
    """A copy with other settings."""
    other = copy.copy(module)
    other._parameters = dict(module._parameters)
    for name, value in settings.items():
        setattr(other, name, value)
    return other


# ---------------------------------------------------------------------------- what is in their place


def _modules_not_followed(own: Wrapper, self: Any, node: Any) -> Any:
    target = own(self, node)
    return None if node.op == "call_module" else target


def _without_divisor(own: Wrapper, found: Any, module: Any, source: Channels) -> Any:
    return own(found, _changed(module, divisor_override=None), source)


def _without_border(own: Wrapper, found: Any, module: Any, source: Channels) -> Any:
    plain = isinstance(module, nn.AvgPool2d)
    return own(found, _changed(module, padding=0, ceil_mode=False) if plain else module, source)


def _default_eps(own: Wrapper, module: Any, constants: Any) -> Any:
    return own(_changed(module, eps=1e-5), constants)


def _linear_unmasked(own: Wrapper, self: Any) -> Any:
    return None if isinstance(self.module, nn.Linear) else own(self)


def _nothing_kept(own: Wrapper, selected: Any, name: str, module: nn.Module, made: Any) -> Any:
    """Of a layer that stays whole."""
    return own(
        selected,
        name,
        module,
        None if type(module) is nn.Linear and made is not None and _is_whole(selected, name) else made,
    )


def _is_whole(selected: Any, name: str) -> bool:
    return any(read.how == "all" and read.node.target == name for read in selected.analysis.reads)


def _flag_of_weight(own: Wrapper, made: nn.Module, module: Any, weight: Any, bias: Any) -> Any:
    made = own(made, module, weight, bias)
    if made.bias is not None:
        made.bias.requires_grad_(module.weight.requires_grad)
    return made


def _first_input_only(own: Wrapper, self: Any, model: nn.Module, example_input: Any) -> None:
    own(self, model, None if example_input is None else positional(example_input)[:1])


def _sizes(read: Any, group: int) -> tuple[Any, Any]:
    """The positions of a group's channels, and the sizes of their constants; 0 for one that is computed."""
    each = len(read.channels.ids) // read.groups
    span = np.arange(group * each, (group + 1) * each)
    return span, np.abs(np.nan_to_num(read.channels.constants[span]))


def _least_carrier(self: Selected, read: Any, group: int = 0) -> int | None:
    span, sizes = _sizes(read, group)
    stay = np.isin(span, self.index(read.channels)) & (sizes > 0)
    return int(span[np.where(stay, sizes, np.inf).argmin()]) if stay.any() else None


def _keep_least(self: Selected, read: Any, group: int) -> None:
    span, sizes = _sizes(read, group)
    if sizes.any():
        least = span[np.where(sizes > 0, sizes, np.inf).argmin()]
        self._keep(self.analysis.root(int(read.channels.ids[least])), "carries constants")


def _without_alpha(own: Wrapper, found: Any, node: Any) -> Any:
    given = node.kwargs
    node.kwargs = {name: value for name, value in given.items() if name != "alpha"}
    try:
        return own(found, node)
    finally:
        node.kwargs = given


def _one_group(own: Wrapper, found: Any, node: Any, module: Any, source: Channels) -> Any:
    result = own(found, node, module, source)
    for read in found.reads:
        read.groups = 1
    return result


def _zeros_around(own: Wrapper, self: Any, module: Any) -> Any:
    made, origins = own(self, module)
    made.padding_mode = "zeros"
    return made, origins


def _depthwise_without_bias(own: Wrapper, found: Any, node: Any, module: Any, source: Channels) -> Any:
    return own(found, node, _changed(module, bias=None) if channel_rules.is_depthwise(module) else module, source)


def _numbers_forgotten(own: Wrapper, node: Any, source: Channels) -> Any:
    return source if node.target in channel_rules._MULTIPLY else own(node, source)


def _other_order(own: Wrapper, found: Any, node: Any) -> Any:
    result = own(found, node)
    return None if result is None else Channels(result.ids, np.roll(result.constants, 1))


def _channels_last(own: Wrapper, node: Any, source: Channels) -> Any:
    result = own(node, source)
    each = len(result.ids) // len(source.ids)
    return Channels(result.ids, np.tile(source.constants, each))


def _padding_mode_lost(own: Wrapper, self: Any, module: nn.Module) -> Any:
    return {name: "zeros" if name == "padding_mode" else value for name, value in own(self, module).items()}


FAULTS: dict[str, Callable[[], Any]] = {
    "in-place statements are dead code": _wrapped(graph, "redirect_readers", lambda own, *args: None),
    "modules that write to their input are not followed": _wrapped(in_place._Writers, "add", _modules_not_followed),
    "divisor_override is ignored": _wrapped(channel_rules, "_pooled", _without_divisor),
    "averages at the border are taken for others": _wrapped(channel_rules, "_pooled", _without_border),
    "eps of norms is taken for the default": _wrapped(channel_rules, "_normalised", _default_eps),
    "masks of linear layers that stay whole are ignored": _wrapped(shrink.Shrunk, "_masked_for_good", _linear_unmasked),
    "the report says that nothing is kept of what stays whole": _wrapped(compacting, "_change", _nothing_kept),
    "biases are frozen as their weights": _wrapped(shrink, "_filled", _flag_of_weight),
    "a second input with a default is dropped": _wrapped(tracer.Settled, "__init__", _first_input_only),
    "the least constant carries the others": lambda: patch.multiple(
        Selected, carrier=_least_carrier, _keep_a_carrier=_keep_least
    ),
    "alpha of a sum is forgotten": _wrapped(channel_rules, "_combined", _without_alpha),
    "PReLU leaves constants as they are": _listed("_IDENTITIES", nn.PReLU),
    "groups are forgotten": _wrapped(channel_rules, "_convolution", _one_group),
    "padding_mode is lost": _wrapped(shrink.Shrunk, "_convolution", _zeros_around),
    "biases of depthwise filters are forgotten": _wrapped(channel_rules, "_convolution", _depthwise_without_bias),
    "layers that are called twice count as called once": _wrapped(channels, "_shared", lambda own, network: set()),
    "factors are forgotten": _wrapped(channel_rules, "_elementwise", _numbers_forgotten),
    "the parts of a concatenation are confused": _wrapped(channel_rules, "_concatenated", _other_order),
    "flattened channels are confused": _wrapped(channel_rules, "_flattened", _channels_last),
    "padding_mode is not saved": _wrapped(layer_kinds.ModuleKind, "read", _padding_mode_lost),
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Fastprune with one mistake."""
    with FAULTS[name]():
        yield


def found_after(name: str, networks: int, seed: int = 0) -> int | None:
    """How many networks it takes to find a mistake; None where that many do not."""
    for number in range(networks):
        program = draw(seed + number)
        with planted(name):
            findings = check(program).findings
        if findings and not check(program).findings:
            return number + 1
    return None
