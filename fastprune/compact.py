"""The small network: what is pruned is removed, and what it contributed is moved to where it stays."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.optim.swa_utils import update_bn

from . import onednn
from .channels import analyse, effective_weights, is_depthwise, is_layer
from .compact_report import CompactReport, LayerChange
from .graph import read_by_forward, trace
from .inputs import positional
from .keep import Selected
from .nn import MaskedConv2d
from .scatter import Scatter
from .shrink import Origins, Shrunk, is_channels_last

__all__ = ["CompactModel", "CompactReport", "LayerChange", "carry_optimizer", "compact"]


class CompactModel(fx.GraphModule):
    """A small network made by :func:`compact`: ordinary layers and the graph that calls them.

    Copies and pickles of it have both attributes; what :func:`torch.jit.script` or :func:`fastprune.save` make of it
    has none.

    Attributes:
        report: what was done.
        origins: by parameter or buffer, the indices taken of each dimension of the one of its name; None for all.
            In a convolution with groups each filter has inputs of its own: ``[F, I]``.
    """

    __jit_unused_properties__ = [*fx.GraphModule.__jit_unused_properties__, "report", "origins"]  # noqa: RUF012

    @property
    def report(self) -> CompactReport:  # noqa: D102
        return self.meta["report"]

    @property
    def origins(self) -> Origins:  # noqa: D102
        return self.meta["origins"]

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.__class__.__name__, self.meta, *super().__reduce__())


def _restored(
    name: str, meta: dict[str, Any], build: Callable[..., fx.GraphModule], parts: tuple[Any, ...]
) -> CompactModel:
    network = build(*parts)
    restored = CompactModel(network, network.graph, name)
    for path, module in network.named_modules():
        restored.get_submodule(path).training = module.training
    restored.meta = meta
    return restored


@torch.no_grad()
def compact(
    model: nn.Module,
    example_input: Any,
    round_to: int = 1,
    masks: Mapping[str, Tensor] | None = None,
    *,
    exact: bool = True,
    recalibrate: Iterable[Any] | None = None,
) -> CompactModel:
    """The network without its pruned filters, which computes what the masked one does in eval mode.

    A pruned filter's output is constant, and so is what BatchNorms and activations make of it. Such a channel is
    removed if whoever reads it can do without: its share goes into the reader's bias (or into the running mean of the
    BatchNorm behind it), or, where zeros around the image make it depend on the place, is carried by one constant
    channel that stays. A channel of a residual stream goes when every branch has it constant; a branch that has few of
    the channels that stay is added to those alone (:class:`~fastprune.scatter.Scatter`), where that saves more than it
    costs, and one that has none goes with its layers. Groups of a convolution stay alike, and empty ones go. What
    cannot be removed exactly stays, and ``report`` says why.

    In train mode batch norm takes other statistics, so that constants are others there: train with masks first and
    compact last, or let the small network train on from here as one of its own.

    Args:
        model: masked by fastprune (or with filters of zeros); not changed. Its forward must be one that torch.fx
            traces, see :func:`fastprune.graph.trace`.
        example_input: for shapes; nothing is computed with it. A tensor, or a tuple of positional inputs, which are
            those of the small network, see :func:`fastprune.graph.trace`. It takes other batch and image sizes as far
            as the model does.
        round_to: channels of each layer come in multiples of it, by keeping pruned ones.
        masks: by name of a convolution or linear layer, bool ``[F]`` or of the weight's shape, True is kept; instead
            of those in the model.
        exact: False, the approximate mode, removes the constant channels that zeros around the image would have kept:
            what is computed differs near the border, wherever a pruned filter's constant is not 0.
        recalibrate: batches of inputs (or tuples that begin with one) on which the running statistics of BatchNorms are
            taken anew, as :func:`torch.optim.swa_utils.update_bn` does; for the approximate mode.

    Returns:
        In the mode the model is in, on its device, in its dtype. ``state_dict`` has the model's keys without masks, and
        biases where constants went.

    Raises:
        ValueError: for a model that cannot be traced, an example that it does not take, weights that are not finite,
            masks that fit no layer, ``round_to`` below 1, and ``recalibrate`` with ``exact``.

    Warns:
        If the model is masked and no filter is pruned.
    """
    if type(round_to) is not int or round_to < 1:
        raise ValueError(f"round_to must be an integer of at least 1, got {round_to!r}")
    if exact and recalibrate is not None:
        raise ValueError("recalibrate takes statistics anew, which is not exact: it is for exact=False")
    positional(example_input)  # None is no example here
    network = trace(model, example_input)
    _check_masks(model, network, masks or {})
    weights = effective_weights(network, masks or {})
    _check_weights(network, weights)
    _warn_if_unpruned(network, masks)
    selected = Selected(analyse(network, weights, exact), round_to)
    made_by_hooks = {
        id(value): value.detach().clone()
        for module in network.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf  # which cannot be copied, and is made anew when it is called
    }
    small = CompactModel(copy.deepcopy(network, made_by_hooks), copy.deepcopy(network.graph), type(model).__name__)
    all_origins: Origins = {}
    for node in network.graph.nodes:
        if node.op == "call_module":
            made, origins = Shrunk(selected, node, network.get_submodule(str(node.target))).made()
            if made is not None:
                small.set_submodule(str(node.target), made)
                all_origins.update({f"{node.target}.{name}": index for name, index in origins.items()})
    _scatter_branches(selected, small)
    small.meta["report"], small.meta["origins"] = _report(selected, network, small), all_origins
    if recalibrate is not None:
        update_bn(recalibrate, small, device=next(small.parameters()).device)
    return small


def _check_masks(model: nn.Module, network: fx.GraphModule, masks: Mapping[str, Tensor]) -> None:
    modules = {**dict(model.named_modules()), **dict(network.named_modules())}  # some of which the forward may not call
    read = read_by_forward(network.graph)
    for name, mask in masks.items():
        if name not in modules or not is_layer(modules[name]):
            kind = f"a {type(modules[name]).__name__}" if name in modules else "no layer of this model"
            raise ValueError(f"masks: {name} is {kind}, and masks are for its Conv2d and Linear layers")
        if name in read:
            raise ValueError(f"masks: the forward also reads the weights of {name} by itself, which no mask reaches")
        weight = modules[name]._parameters.get("weight")
        if weight is None:
            raise ValueError(f"masks: the weight of {name} is made of others by a hook, which no mask reaches")
        shape = weight.shape
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape not in (shape, shape[:1]):
            came = f"{mask.dtype} of {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"masks: the mask of {name} must be bool of shape {list(shape[:1])} or {list(shape)}, got {came}"
            )


def _check_weights(network: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        bias = network.get_submodule(name)._parameters.get("bias")
        if weight.is_meta:
            raise ValueError(f"{name} is on the device meta, without values: load its weights first")
        if not weight.isfinite().all() or (bias is not None and not bias.isfinite().all()):
            raise ValueError(
                f"{name} has weights that are NaN or infinite: the network computes nothing that could be kept; "
                f"go back to a checkpoint from before"
            )


def _warn_if_unpruned(network: fx.GraphModule, masks: Mapping[str, Tensor] | None) -> None:
    layers = [module for module in network.modules() if isinstance(module, MaskedConv2d)]
    if layers and not masks and all(bool(layer.mask.all()) for layer in layers):
        warnings.warn(
            "compact: the masks keep every filter, so that nothing is removed. A pruner updates them before every "
            "`every`-th step; pruner.update() does it now",
            stacklevel=4,
        )


def _report(selected: Selected, network: fx.GraphModule, small: CompactModel) -> CompactReport:
    """What became of each layer, read off the small network itself."""
    before, after = dict(network.named_modules()), dict(small.named_modules())
    called = dict.fromkeys(str(node.target) for node in network.graph.nodes if node.op == "call_module")
    rows = [_change(selected, name, before[name], after.get(name)) for name in called if is_layer(before[name])]
    counts = [sum(p.numel() for p in net.parameters()) for net in (network, small)]
    return CompactReport(tuple(rows), (counts[0], counts[1]), tuple(onednn.unsafe_layers(small)))


def _change(selected: Selected, name: str, module: nn.Module, made: nn.Module | None) -> LayerChange:
    weight, analysis = selected.analysis.weights[name], selected.analysis
    zero = (weight.flatten(1) == 0).all(1).cpu().numpy()
    if made is None:  # its branch is constant
        return LayerChange(name, len(weight), int(zero.sum()), 0, (weight.shape[1], 0), "")
    before, after = tuple(weight.shape), tuple(made.state_dict().get("weight", weight).shape)
    why: dict[str, int] = {}
    node = next(node for node in analysis.network.graph.nodes if node.op == "call_module" and node.target == name)
    channels = analysis.results.get(node)
    if channels is not None and len(channels.ids) == len(zero) and not is_depthwise(module):
        kept = range(len(zero)) if after[0] == before[0] else selected.index(channels).tolist()
        for position in (position for position in kept if zero[position]):
            reason = selected.why.get(analysis.root(int(channels.ids[position])), f"{name} stays whole")
            why[reason] = why.get(reason, 0) + 1
    text = ", ".join(f"{count}: {reason}" for reason, count in why.items())
    return LayerChange(name, before[0], int(zero.sum()), after[0], (before[1], after[1]), text)


def _scatter_branches(selected: Selected, small: CompactModel) -> None:
    """Let branches that have fewer channels than their streams be added to those; leave out what is constant."""
    analysis = selected.analysis
    twins = dict(zip(analysis.network.graph.nodes, small.graph.nodes, strict=True))
    for node, own in analysis.sums.items():
        stay = selected.index(analysis.results[node])
        written = stay[:0] if own.is_constant else selected.index(own.channels)
        if len(written) == len(stay):
            continue
        constants = own.channels.constants[stay]
        constants[np.searchsorted(stay, written)] = 0  # they are computed
        scatter = Scatter(len(stay), len(written)).to(_device_of(own.branch, analysis.network), node.meta["dtype"])
        scatter.index.copy_(torch.from_numpy(np.searchsorted(stay, written)))
        scatter.constant.copy_(torch.from_numpy(constants).view(-1, 1, 1))
        name = next(f"scatter_{i}" for i in itertools.count() if not hasattr(small, f"scatter_{i}"))
        small.add_submodule(name, scatter.train(small.training))
        with small.graph.inserting_before(twins[node]):
            args = (twins[own.stream],) if own.is_constant else (twins[own.stream], twins[own.branch])
            twins[node].replace_all_uses_with(made := small.graph.call_module(name, args))
        small.graph.erase_node(twins[node])
        twins[node] = made
    small.graph.eliminate_dead_code()
    small.delete_all_unused_submodules()
    small.recompile()


def _device_of(node: fx.Node, network: fx.GraphModule) -> torch.device:
    """Where a node computes: where the layers before it are."""
    waiting = [node]
    for source in waiting:
        if source.op == "call_module":
            for tensor in network.get_submodule(str(source.target)).parameters():
                return tensor.device
        waiting += [before for before in source.all_input_nodes if before not in waiting]
    return torch.device("cpu")


def carry_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, small: CompactModel) -> torch.optim.Optimizer:
    """The optimizer of the small network: of the same class and settings, with the state of what was kept.

    A bias that :func:`compact` made starts without state, in the group of its weight.

    Args:
        optimizer: of ``model``'s parameters; any whose state has the shape of its parameter or none (SGD, Adam, AdamW,
            :class:`fastprune.optim.PrunedSGD`, which then has no pruner). Not changed.
        model: which ``small`` was made of.
        small: of :func:`compact`.

    Raises:
        ValueError: for an optimizer with a parameter that the model does not have.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    theirs = dict(small.named_parameters())
    groups: list[dict[str, Any]] = []
    states: dict[Tensor, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        params: list[Tensor] = []
        for old in group["params"]:
            if old not in names:
                raise ValueError("the optimizer has a parameter that the model does not have: was it made for another?")
            name = names[old]
            if name not in theirs:
                continue  # the forward does not use it
            params.append(theirs[name])
            states[theirs[name]] = (
                {key: _taken(value, old, small.origins.get(name, ())) for key, value in optimizer.state[old].items()}
                if old in optimizer.state
                else {}
            )
            layer, _, kind = name.rpartition(".")
            bias = theirs.get(f"{layer}.bias")
            if kind == "weight" and bias is not None and f"{layer}.bias" not in set(names.values()):
                params.append(bias)
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": params})
    made = type(optimizer)(groups)  # type: ignore[call-arg]
    made.state.update({param: state for param, state in states.items() if state})
    return made


def _taken(value: Any, old: Tensor, origin: Iterable[Tensor | None]) -> Any:
    """The part of an optimizer's state that belongs to what was kept of a parameter."""
    if not isinstance(value, Tensor) or value.shape != old.shape:
        return copy.deepcopy(value)
    for dim, index in enumerate(origin):
        if index is not None and index.dim() == 1:
            value = value.index_select(dim, index.to(value.device))
        elif index is not None:
            value = value.take_along_dim(index.to(value.device).view(*index.shape, *[1] * (value.dim() - 2)), dim)
    return value.clone(memory_format=torch.channels_last if is_channels_last(old) else torch.contiguous_format)
