"""The small network: what is pruned is removed, and what it contributed is moved to where it stays."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.optim.swa_utils import update_bn

from . import onednn
from .channels import Analysis, Channels, Ids, Read, Sum, analyse, effective_weights, is_depthwise
from .graph import trace
from .scatter import Scatter

__all__ = ["CompactReport", "LayerChange", "carry_optimizer", "compact"]


@dataclass(frozen=True)
class LayerChange:
    """One convolution or linear layer.

    Attributes:
        name: in the model.
        filters: before.
        pruned: filters that are zero.
        kept: filters of the small network.
        inputs: channels (features) that it reads, before and after.
        why: why pruned filters are kept; empty where none is.
    """

    name: str
    filters: int
    pruned: int
    kept: int
    inputs: tuple[int, int]
    why: str


@dataclass(frozen=True)
class CompactReport:
    """What :func:`compact` did; prints as a table.

    Attributes:
        layers: of the network, in order.
        parameters: before and after.
        unsafe: layers whose training on this CPU runs into a fault of PyTorch's, see :mod:`fastprune.onednn`.
    """

    layers: tuple[LayerChange, ...]
    parameters: tuple[int, int]
    unsafe: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  filters  pruned   kept   inputs           pruned, but kept"]
        for row in self.layers:
            inputs = f"{row.inputs[0]:,} -> {row.inputs[1]:,}"
            lines.append(f"{row.name:<{width}}  {row.filters:7,}{row.pruned:8,}{row.kept:7,}   {inputs:<15}  {row.why}")
        before, after = self.parameters
        lines.append(f"parameters: {before:,} -> {after:,} ({after / max(before, 1):.1%})")
        if self.unsafe:
            lines.append(
                f"before training it here in float32 and channels_last, call fastprune.onednn.protect(model): "
                f"PyTorch's gradient of {', '.join(self.unsafe)} corrupts memory on this CPU (docs/known_problems.md)"
            )
        return "\n".join(lines)


class CompactModel(fx.GraphModule):
    """A small network made by :func:`compact`: ordinary layers and the graph that calls them.

    Attributes:
        report: what was done.
        origins: by parameter or buffer, the indices taken of each dimension of the one of its name; None for all.
            In a convolution with groups each filter has inputs of its own: ``[F, I]``.
    """

    report: CompactReport
    origins: dict[str, tuple[Tensor | None, ...]]


@torch.no_grad()
def compact(
    model: nn.Module,
    example_input: Tensor | tuple[Any, ...],
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
        example_input: for shapes; nothing is computed with it. The small network takes other batch and image sizes as
            far as the model does.
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
        ValueError: for a model that cannot be traced, unknown names in ``masks``, ``round_to`` below 1, and
            ``recalibrate`` with ``exact``.
    """
    if round_to < 1:
        raise ValueError(f"round_to must be at least 1, got {round_to}")
    if exact and recalibrate is not None:
        raise ValueError("recalibrate takes statistics anew, which is not exact: it is for exact=False")
    network = trace(model, example_input)
    layers = {name for name, module in network.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    if unknown := sorted((masks or {}).keys() - layers):
        raise ValueError(f"masks: {', '.join(unknown)} is no convolution or linear layer of this model")
    weights = effective_weights(network, masks or {})
    analysis = analyse(network, weights, exact)
    selected = _Selected(analysis, round_to)
    small = CompactModel(copy.deepcopy(network), copy.deepcopy(network.graph), type(model).__name__)
    origins: dict[str, tuple[Tensor | None, ...]] = {}
    rows = []
    for node in network.graph.nodes:
        if node.op == "call_module":
            module = network.get_submodule(str(node.target))
            made, rows_of = _Shrunk(selected, node, module).made()
            if made is not None:
                small.set_submodule(str(node.target), made)
                origins.update({f"{node.target}.{name}": index for name, index in rows_of.items()})
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    rows.append(_change(selected, node, module, made))
            elif isinstance(module, (nn.Conv2d, nn.Linear)):  # its branch is constant
                rows.append(_change(selected, node, module, None))
    _scatter_branches(selected, small)
    counts = [sum(p.numel() for p in net.parameters()) for net in (network, small)]
    unsafe = tuple(onednn.unsafe_layers(small))
    small.report, small.origins = CompactReport(tuple(rows), (counts[0], counts[1]), unsafe), origins
    if recalibrate is not None:
        update_bn(recalibrate, small, device=next(small.parameters()).device)
    return small


@dataclass
class _Selected:
    """Which channels stay, and why those that could have gone."""

    analysis: Analysis
    round_to: int
    kept: set[int] = field(default_factory=set)
    why: dict[int, str] = field(default_factory=dict)
    shifts: dict[fx.Node, Tensor] = field(default_factory=dict)  # that BatchNorms take over, see _Shrunk

    def __post_init__(self) -> None:
        for read in self.analysis.reads:
            self._keep_what_is_needed(read)
        for read in self.analysis.reads:
            if read.how == "padded":
                for group in np.unique(np.flatnonzero(self._weighed(read)) * read.groups // len(read.channels.ids)):
                    self._keep_a_carrier(read, int(group))
        layers = [node for node in self.analysis.network.graph.nodes if self._is_layer(node)]
        grouped = [read for read in self.analysis.reads if read.groups > 1]
        before = -1
        while before < len(self.kept):
            # Layers share channels: what one has to keep may bring another out of step.
            before = len(self.kept)
            for node in layers:
                self._keep_multiple(self.analysis.results[node])
            for node, own in self.analysis.sums.items():
                self._keep_what_a_branch_writes(node, own)
            for read in grouped:
                self._keep_groups_alike(read)

    def _is_layer(self, node: fx.Node) -> bool:
        if node.op != "call_module" or node not in self.analysis.results:
            return False
        return isinstance(self.analysis.network.get_submodule(str(node.target)), (nn.Conv2d, nn.Linear))

    def index(self, channels: Channels) -> Ids:
        """The positions, among these channels, of those that stay."""
        return np.flatnonzero([root in self.kept for root in self.analysis.roots(channels.ids).tolist()])

    def _keep(self, root: int, why: str) -> None:
        if root not in self.kept:
            self.kept.add(root)
            self.why[root] = why

    def _keep_what_is_needed(self, read: Read) -> None:
        computed = np.isnan(read.channels.constants)
        needed = computed & self._weighed(read) if read.how != "all" else np.ones_like(computed)
        if read.how == "all":
            target = read.node.target if isinstance(read.node.target, str) else read.node.name
            why = "the output" if read.node.op == "output" else f"read whole by {target}"
        else:
            why = f"not constant for {read.node.target}"
        for root in self.analysis.roots(read.channels.ids[needed]).tolist():
            self._keep(root, why)

    def _weighed(self, read: Read) -> NDArray[np.bool_]:
        """Which channels a layer multiplies by weights that are not 0 all: those of groups with a filter."""
        written = np.isnan(self.analysis.results[read.node].constants).reshape(read.groups, -1)
        return written.any(1).repeat(len(read.channels.ids) // read.groups)

    def carrier(self, read: Read, group: int = 0) -> int | None:
        """The position of the constant channel that carries the others' shares: the largest of those that stay."""
        sizes = np.abs(np.nan_to_num(read.channels.constants))
        stay = np.intersect1d(self.index(read.channels), _span(read.channels, group, read.groups))
        best = max(stay.tolist(), key=lambda i: sizes[i], default=None)
        return best if best is not None and sizes[best] > 0 else None

    def _keep_a_carrier(self, read: Read, group: int) -> None:
        constants, stays = read.channels.constants, self.index(read.channels)
        span = _span(read.channels, group, read.groups)
        gone = np.setdiff1d(span[np.nan_to_num(constants[span]) != 0], stays)
        if len(gone) and self.carrier(read, group) is None:
            best = gone[np.abs(constants[gone]).argmax()]
            self._keep(self.analysis.root(int(read.channels.ids[best])), f"carries constants to {read.node.target}")

    def _keep_multiple(self, channels: Channels) -> None:
        """Keep more until there is one channel, and a multiple."""
        stay = len(self.index(channels))
        wanted = min(-(-max(stay, 1) // self.round_to) * self.round_to, len(channels.ids))
        self._keep_more(channels.ids, wanted, "round_to" if self.round_to > 1 else "the last of its layer")

    def _keep_what_a_branch_writes(self, node: fx.Node, own: Sum) -> None:
        """Keep in the stream what a branch has for other reasons than that it is needed there."""
        if not own.is_constant:
            ids = self.analysis.results[node].ids[self.index(own.channels)]
            self._keep_more(ids, len(ids), f"added to by {own.branch.target}")

    def _keep_groups_alike(self, read: Read) -> None:
        """Keep as many inputs and filters in each group that has any."""
        sides = read.channels, self.analysis.results[read.node]
        spans = [[side.ids[_span(side, group, read.groups)] for group in range(read.groups)] for side in sides]
        counts = np.array([[self._count(ids) for ids in side] for side in spans])
        alive = counts.any(0)
        for side, most in zip(spans, counts.max(1), strict=True):
            for group in np.flatnonzero(alive):
                self._keep_more(side[group], max(int(most), 1), f"groups of {read.node.target} are alike")

    def _count(self, ids: Ids) -> int:
        return sum(root in self.kept for root in self.analysis.roots(ids).tolist())

    def _keep_more(self, ids: Ids, wanted: int, why: str) -> None:
        """Keep the first of those that would go until so many stay."""
        roots = self.analysis.roots(ids).tolist()
        stay = self._count(ids)
        for root in roots:
            if stay >= wanted:
                return
            if root not in self.kept:
                self._keep(root, why)
                stay += roots.count(root)


def _span(channels: Channels, group: int, groups: int) -> Ids:
    """The positions of a group's channels."""
    each = len(channels.ids) // groups
    return np.arange(group * each, (group + 1) * each)


class _Shrunk:
    """One module of the small network."""

    def __init__(self, selected: _Selected, node: fx.Node, module: nn.Module) -> None:
        self.selected, self.node, self.module = selected, node, module
        results = selected.analysis.results
        self.source = results.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        self.result = results.get(node)

    def made(self) -> tuple[nn.Module | None, dict[str, tuple[Tensor | None, ...]]]:
        """The module and, by parameter and buffer, the indices taken; None for one that stays as it is."""
        if self.source is None or self.result is None:
            return None, {}
        if isinstance(self.module, nn.Linear) and not self._pinned():
            return self._linear(self.module)
        if isinstance(self.module, nn.Conv2d):
            return self._convolution(self.module)
        if isinstance(self.module, (nn.BatchNorm1d, nn.BatchNorm2d)) and not self._pinned():
            return self._batch_norm(self.module)
        return None, {}

    def _pinned(self) -> bool:
        """Whether the analysis did not know what to make of it, so that it is as large as before."""
        assert self.source is not None
        return any(read.node is self.node and read.how == "all" for read in self.selected.analysis.reads)

    def _indices(self) -> tuple[Tensor, Tensor]:
        assert self.source is not None
        assert self.result is not None
        device = next(self.module.parameters()).device
        taken = (self.selected.index(channels) for channels in (self.result, self.source))
        rows, columns = (torch.from_numpy(index).to(device) for index in taken)
        return rows, columns

    def _weight_and_bias(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """The smaller weight, float64, and the bias, the constants of what is gone in them; the weight's origin."""
        assert self.source is not None
        (read,) = (read for read in self.selected.analysis.reads if read.node is self.node)
        full = self.selected.analysis.weights[str(self.node.target)].double()
        constants = torch.from_numpy(np.nan_to_num(self.source.constants)).to(full.device)
        constants[columns] = 0  # they are computed
        weights, shares, origins = [], [], []
        for group in range(read.groups):
            first, each = group * full.shape[1], len(full) // read.groups
            own_rows = rows[rows // each == group]
            if not len(own_rows):
                continue  # nor inputs
            own = columns[columns // full.shape[1] == group] - first
            block, gone = full[own_rows], constants[first : first + full.shape[1]]
            weight, share = block[:, own], torch.einsum("fc...,c->f...", block, gone)
            if read.how == "padded" and share.any():
                carrier = self.selected.carrier(read, group)
                assert carrier is not None
                weight[:, int((own == carrier - first).nonzero())] += share / float(self.source.constants[carrier])
                share = torch.zeros_like(share)
            weights.append(weight)
            shares.append(share.flatten(1).sum(1) if share.dim() > 1 else share)
            origins.append(own.expand(len(own_rows), -1))
        weight, total = torch.cat(weights), torch.cat(shares)
        origin = (rows, columns if read.groups == 1 else torch.cat(origins))
        bias = self.module.bias.detach().double()[rows] if isinstance(self.module.bias, Tensor) else None
        if bias is None and total.any() and (norm := self._norm_behind()) is not None:
            self.selected.shifts[norm] = total
            total = torch.zeros_like(total)
        if total.any():
            bias = total if bias is None else bias + total
        return weight, bias, origin

    def _norm_behind(self) -> fx.Node | None:
        """The BatchNorm that alone reads this layer: it subtracts its mean, and a bias before it would be of no use."""
        (user, *others) = self.node.users or (self.node,)
        if others or user.op != "call_module" or user not in self.selected.analysis.results:
            return None
        module = self.selected.analysis.network.get_submodule(str(user.target))
        calls = [node for node in self.node.graph.nodes if node.op == "call_module" and node.target == user.target]
        is_norm = isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)) and module.running_mean is not None
        pinned = any(read.node is user and read.how == "all" for read in self.selected.analysis.reads)
        return user if is_norm and len(calls) == 1 and not pinned else None

    def _linear(self, module: nn.Linear) -> tuple[nn.Module, dict[str, tuple[Tensor | None, ...]]]:
        rows, columns = self._indices()
        weight, bias, origin = self._weight_and_bias(rows, columns)
        made = nn.Linear(len(columns), len(rows), bias is not None, module.weight.device, module.weight.dtype)
        return _filled(made, module, weight, bias), {"weight": origin, "bias": (rows,)}

    def _convolution(self, module: nn.Conv2d) -> tuple[nn.Module, dict[str, tuple[Tensor | None, ...]]]:
        rows, columns = self._indices()
        groups = module.groups
        origin: tuple[Tensor | None, ...]
        if self._pinned() or is_depthwise(module):
            rows = torch.arange(module.out_channels) if self._pinned() else rows
            weight = self.selected.analysis.weights[str(self.node.target)].double()[rows]
            bias = None if module.bias is None else module.bias.detach().double()[rows]
            groups, origin = groups if self._pinned() else len(rows), (rows, None)
        else:
            weight, bias, origin = self._weight_and_bias(rows, columns)
            groups = len(torch.unique(rows // (module.out_channels // groups)))
        made = nn.Conv2d(
            weight.shape[1] * groups,
            len(weight),
            module.kernel_size,  # type: ignore[arg-type]
            module.stride,  # type: ignore[arg-type]
            module.padding,  # type: ignore[arg-type]
            module.dilation,  # type: ignore[arg-type]
            groups,
            bias is not None,
            module.padding_mode,
            module.weight.device,
            module.weight.dtype,
        )
        return _filled(made, module, weight, bias), {"weight": origin, "bias": (rows,)}

    def _batch_norm(
        self, module: nn.BatchNorm1d | nn.BatchNorm2d
    ) -> tuple[nn.Module, dict[str, tuple[Tensor | None, ...]]]:
        made = copy.deepcopy(module)
        rows = torch.from_numpy(self.selected.index(self.source))  # type: ignore[arg-type]
        made.num_features = len(rows)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.dim() == 1:
                getattr(made, name).data = tensor.detach()[rows.to(tensor.device)].clone()
        if self.node in self.selected.shifts:
            assert made.running_mean is not None
            made.running_mean -= self.selected.shifts[self.node]
        return made, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (rows,))


def _filled(made: nn.Module, module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with these values, laid out, frozen and in the mode as the one it comes of."""
    for name, value in (("weight", weight), ("bias", bias)):
        parameter = getattr(made, name)
        if value is not None:
            parameter.copy_(value)
            parameter.requires_grad_(module.weight.requires_grad)
    if _is_channels_last(module.get_parameter("weight")):
        made = made.to(memory_format=torch.channels_last)
    return made.train(module.training)


def _scatter_branches(selected: _Selected, small: CompactModel) -> None:
    """Let branches that have fewer channels than their streams be added to those; leave out what is constant."""
    analysis, parameter = selected.analysis, next(small.parameters())
    twins = dict(zip(analysis.network.graph.nodes, small.graph.nodes, strict=True))
    for node, own in analysis.sums.items():
        stay = selected.index(analysis.results[node])
        written = stay[:0] if own.is_constant else selected.index(own.channels)
        if len(written) == len(stay):
            continue
        constants = own.channels.constants[stay]
        constants[np.searchsorted(stay, written)] = 0  # they are computed
        scatter = Scatter(len(stay), len(written)).to(parameter.device, parameter.dtype)
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


def _change(selected: _Selected, node: fx.Node, module: nn.Module, made: nn.Module | None) -> LayerChange:
    weight = selected.analysis.weights[str(node.target)]
    zero = (weight.flatten(1) == 0).all(1).cpu().numpy()
    if made is None:
        return LayerChange(str(node.target), len(weight), int(zero.sum()), 0, (weight.shape[1], 0), "")
    before, after = (tuple(layer.get_parameter("weight").shape) for layer in (module, made))
    why: dict[str, int] = {}
    channels = selected.analysis.results[node]
    if not is_depthwise(module):
        for position in np.intersect1d(selected.index(channels), np.flatnonzero(zero)):
            reason = selected.why[selected.analysis.root(int(channels.ids[position]))]
            why[reason] = why.get(reason, 0) + 1
    text = ", ".join(f"{count}: {reason}" for reason, count in why.items())
    return LayerChange(str(node.target), before[0], int(zero.sum()), after[0], (before[1], after[1]), text)


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
    return value.clone(memory_format=torch.channels_last if _is_channels_last(old) else torch.contiguous_format)


def _is_channels_last(weight: Tensor) -> bool:
    """Whether it is so and not, as 1×1 kernels are, contiguous as well."""
    own = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return own and not weight.is_contiguous()
