"""A convolution whose weights are generated for the widths chosen, and the batch norm behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from ..onednn import safe_operands
from .description import Conv
from .encoding import CHOICES, Width

_DIFFERENCE = 0.1  # of the weights of different encodings at the beginning


class HyperConv2d(nn.Module):
    """A convolution whose weights two fully connected layers generate from scales of widths.

    ``(fc2(relu(fc1(scales)))).view(O, I, k, k)[:out, :in]``, of which no more is computed than the slice: see
    :func:`fastprune.ops.hyper_weight`.

    Args:
        conv: its widest form.
        scales: the widths whose scales the weights are generated from.
        genes: of the network.
        hidden: units of the first layer.

    Attributes:
        encoding: the choice of every gene, to be set before ``forward``.
        table: ``[genes + 1]`` float32: the scale of every gene, then 1; likewise.
    """

    table: Tensor
    positions: Tensor

    def __init__(self, conv: Conv, scales: Sequence[Width], genes: int, hidden: int) -> None:
        super().__init__()
        self.conv = conv
        self.shape = (conv.outputs.maximum, 1 if conv.depthwise else conv.inputs.maximum, conv.kernel, conv.kernel)
        self.fc1 = nn.Linear(len(scales), hidden)
        self.fc2 = nn.Linear(hidden, math.prod(self.shape))
        positions = [genes if width.gene is None else width.gene for width in scales]
        self.register_buffer("positions", torch.tensor(positions), persistent=False)
        self.encoding: Sequence[int] = ()
        # All encodings begin with the weights of one network, Kaiming normal, give or take a little. From layers as
        # PyTorch initialises them they begin so far apart that they learn much later.
        fan_out = (1 if conv.depthwise else conv.outputs.maximum) * conv.kernel**2
        std = (2 / fan_out) ** 0.5
        nn.init.normal_(self.fc2.bias, std=std)
        nn.init.normal_(self.fc2.weight, std=_DIFFERENCE * std)

    def generate(self, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """The weight ``[out, in, k, k]`` (``[out, 1, k, k]`` where it is depthwise) of the encoding that was set."""
        conv = self.conv
        with torch.autocast(self.fc1.weight.device.type, enabled=False):
            hidden = functional.relu(self.fc1(self.table[self.positions]))
        return ops.hyper_weight(
            hidden,
            self.fc2.weight,
            self.fc2.bias,
            out_channels=conv.outputs.channels(self.encoding),
            in_channels=1 if conv.depthwise else conv.inputs.channels(self.encoding),
            shape=self.shape,
            dtype=dtype,
            memory_format=memory_format,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``[B, in, H, W]``, in autocast's dtype where that is on."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        weight = self.generate(dtype, torch.channels_last if last else torch.contiguous_format)
        groups = x.shape[1] if self.conv.depthwise else 1
        x, weight = safe_operands(x, weight, (self.conv.stride,))
        return functional.conv2d(x, weight, None, self.conv.stride, self.conv.kernel // 2, groups=groups)


class WidthBatchNorm2d(nn.Module):
    """Batch norm without weight and bias that keeps running statistics for each choice of its width.

    Args:
        width: the channels; where they are fixed there is one set of statistics.

    Attributes:
        encoding: the choice of every gene, to be set before ``forward``.
        running_mean, running_var: float32 ``[31, C]`` (``[1, C]``); a row's first channels are those of its choice.
    """

    running_mean: Tensor
    running_var: Tensor
    momentum, eps = 0.1, 1e-5

    def __init__(self, width: Width) -> None:
        super().__init__()
        self.width = width
        rows = 1 if width.gene is None else CHOICES
        self.register_buffer("running_mean", torch.zeros(rows, width.maximum))
        self.register_buffer("running_var", torch.ones(rows, width.maximum))
        self.encoding: Sequence[int] = ()

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Running mean and variance of the encoding that was set, as views ``[channels]``."""
        row = 0 if self.width.gene is None else self.encoding[self.width.gene]
        channels = self.width.channels(self.encoding)
        return self.running_mean[row, :channels], self.running_var[row, :channels]

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        mean, var = self.statistics()
        return functional.batch_norm(x, mean, var, None, None, self.training, self.momentum, self.eps)
