"""The layers of the small network, with the constants of what is gone in their biases and weights."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, fx, nn

from .channels import is_convolution, is_depthwise, is_layer, is_norm
from .graph import read_by_forward
from .keep import Selected
from .nn import MaskedConv2d, unmask_

__all__ = ["Origins", "Shrunk", "is_channels_last"]

# By parameter or buffer, the indices taken of each dimension; None for all.
Origins = dict[str, tuple[Tensor | None, ...]]


class Shrunk:
    """One layer or BatchNorm of the small network."""

    def __init__(self, selected: Selected, node: fx.Node, module: nn.Module) -> None:
        self.selected, self.node, self.module = selected, node, module
        results = selected.analysis.results
        self.source = results.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        self.result = results.get(node)

    def made(self) -> tuple[nn.Module | None, Origins]:
        """The module and, by parameter and buffer, the indices taken; None for one that stays as it is."""
        if self.result is None or self.source is None or self._is_pinned():
            return self._masked_for_good(), {}
        if type(self.module) is nn.Linear:
            return self._linear(self.module)
        if is_convolution(self.module):
            return self._convolution(self.module)  # type: ignore[arg-type]
        return self._batch_norm() if is_norm(self.module) else (None, {})

    def _is_pinned(self) -> bool:
        """Whether the analysis did not know what to make of it, so that it is as large as before."""
        return any(read.node is self.node and read.how == "all" for read in self.selected.analysis.reads)

    def _masked_for_good(self) -> nn.Module | None:
        """A layer as large as before, with zeros where its mask has them; None for one that has no mask."""
        name = str(self.node.target)
        if not is_layer(self.module) or name in read_by_forward(self.node.graph):  # the dense weight, or the mask
            return None
        weight, own = self.selected.analysis.weights[name], _weight_of(self.module)
        if type(self.module) is not MaskedConv2d and weight.data_ptr() == own.data_ptr():
            return None
        made = copy.deepcopy(self.module)
        if isinstance(made, nn.Conv2d):
            unmask_(made)
        made.weight = nn.Parameter(weight.clone(), own.requires_grad)
        return made

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
        pinned = any(read.node is user and read.how == "all" for read in self.selected.analysis.reads)
        return user if is_norm(self.selected.analysis.network.get_submodule(str(user.target))) and not pinned else None

    def _linear(self, module: nn.Linear) -> tuple[nn.Module, Origins]:
        rows, columns = self._indices()
        weight, bias, origin = self._weight_and_bias(rows, columns)
        made = nn.Linear(len(columns), len(rows), bias is not None, module.weight.device, module.weight.dtype)
        return _filled(made, module, weight, bias), {"weight": origin, "bias": (rows,)}

    def _convolution(self, module: nn.Conv2d) -> tuple[nn.Module, Origins]:
        rows, columns = self._indices()
        groups = module.groups
        origin: tuple[Tensor | None, ...]
        if is_depthwise(module):
            weight = self.selected.analysis.weights[str(self.node.target)].double()[rows]
            bias = None if module.bias is None else module.bias.detach().double()[rows]
            groups, origin = len(rows), (rows, None)
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

    def _batch_norm(self) -> tuple[nn.Module, Origins]:
        made = copy.deepcopy(self.module)
        rows = torch.from_numpy(self.selected.index(self.source))  # type: ignore[arg-type]
        if hasattr(made, "num_features"):
            made.num_features = len(rows)  # type: ignore[assignment]
        tensors = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        taken = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 1}
        for name, tensor in taken.items():
            getattr(made, name).data = tensor.detach()[rows.to(tensor.device)].clone()
        if self.node in self.selected.shifts:
            made.get_buffer("running_mean").sub_(self.selected.shifts[self.node])
        return made, dict.fromkeys(taken, (rows,))


def _weight_of(layer: nn.Module) -> Tensor:
    """A parameter, or what a hook has made of others."""
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _filled(made: nn.Module, module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The layer with these values, laid out, frozen and in the mode as the one it comes of."""
    for name, value in (("weight", weight), ("bias", bias)):
        own = module.weight if getattr(module, name) is None else getattr(module, name)  # a new bias is as its weight
        if value is not None:
            getattr(made, name).copy_(value)
            getattr(made, name).requires_grad_(own.requires_grad)
    if is_channels_last(module.get_parameter("weight")):
        made = made.to(memory_format=torch.channels_last)
    return made.train(module.training)


def is_channels_last(weight: Tensor) -> bool:
    """Whether it is so and not, as 1×1 kernels are, contiguous as well."""
    own = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return own and not weight.is_contiguous()
