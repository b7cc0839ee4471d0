"""PruningNets: one network that generates the weights of every encoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .description import Block, Conv, Description
from .encoding import SCALES, Encoding, check_encoding
from .hyper import HyperConv2d, WidthBatchNorm2d
from .network import DescribedNetwork, plain_convolution
from .networks import describe


class PruningNet(DescribedNetwork):
    """The network of every encoding: its weights are generated, its batch norms keep statistics for each width.

    Args:
        network: a name, see :func:`fastprune.metapruning.describe`, or a description.
        num_classes: number of logits; as the network is made for by default.

    Raises:
        ValueError: for an unknown network, or no class.

    Source:
        Liu et al., "MetaPruning: Meta Learning for Automatic Neural Network Channel Pruning", ICCV 2019.
    """

    def __init__(self, network: str | Description, num_classes: int | None = None) -> None:
        description = describe(network) if isinstance(network, str) else network
        classes = description.num_classes if num_classes is None else num_classes
        if classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {classes}")

        def make(_: str, conv: Conv, block: Block) -> tuple[nn.Module, nn.Module]:
            hyper = HyperConv2d(conv, block.scales, len(description.genes), description.hidden)
            return hyper, WidthBatchNorm2d(conv.outputs)

        super().__init__(description, make, lambda: _WideLinear(description.features.maximum, classes))
        self.encoding: Encoding | None = None

    def choose(self, encoding: Sequence[int]) -> None:
        """Take this encoding from now on.

        Raises:
            ValueError: for another number of genes, and for genes out of range.
        """
        self.encoding = check_encoding(encoding, len(self.description.genes), self.description.name)
        table = torch.tensor(
            [*(SCALES[choice] for choice in self.encoding), 1.0], device=next(self.parameters()).device
        )
        for module in self.modules():
            if isinstance(module, (HyperConv2d, WidthBatchNorm2d)):
                module.encoding = self.encoding
            if isinstance(module, HyperConv2d):
                module.table = table

    def forward(self, x: Tensor, encoding: Sequence[int] | None = None) -> Tensor:
        """Map images ``[B, 3, H, W]`` to logits ``[B, classes]``, by the network of ``encoding`` or the last one."""
        if encoding is not None:
            self.choose(encoding)
        elif self.encoding is None:
            raise RuntimeError("choose an encoding first: network.choose(encoding), or network(images, encoding)")
        return super().forward(x)

    @torch.no_grad()
    def candidate(
        self,
        encoding: Sequence[int],
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        with_statistics: bool = False,
    ) -> DescribedNetwork:
        """The network of an encoding with its weights generated once, for evaluation.

        An ordinary network of ``Conv2d`` and ``BatchNorm2d`` (without weight and bias). Forwards in training mode
        recalibrate it: its batch norms take the mean over all batches since they were made. The classifier's weights
        are this network's own.

        Args:
            encoding: the choice of every gene.
            dtype, memory_format: of the weights.
            with_statistics: start from the statistics of batch norm that training left for these widths, not from none.
        """
        self.choose(encoding)
        chosen = self.encoding
        assert chosen is not None

        def make(name: str, conv: Conv, _: Block) -> tuple[nn.Module, nn.Module]:
            hyper, norm = self.get_submodule(name), self.get_submodule(_norm_of(name))
            assert isinstance(hyper, HyperConv2d)
            assert isinstance(norm, WidthBatchNorm2d)
            convolution = plain_convolution(conv, chosen, "meta")
            convolution.weight = nn.Parameter(hyper.generate(dtype, memory_format), requires_grad=False)
            device = norm.running_var.device
            batch_norm = nn.BatchNorm2d(convolution.out_channels, norm.eps, None, affine=False, device=device)
            if with_statistics:
                mean, var = norm.statistics()
                batch_norm.running_mean, batch_norm.running_var = mean.clone(), var.clone()
            return convolution, batch_norm

        return DescribedNetwork(self.description, make, lambda: self.fc)


class _WideLinear(nn.Linear):
    """A linear layer of the widest features, of which narrower ones take the first columns."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight[:, : input.shape[1]], self.bias)


def _norm_of(convolution: str) -> str:
    """The name of the batch norm behind a convolution."""
    head, _, last = convolution.rpartition(".")
    return f"{head}.1" if last == "0" else f"{head}.{last.replace('conv', 'bn')}".removeprefix(".")
