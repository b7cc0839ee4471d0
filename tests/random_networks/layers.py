"""Modules as other libraries write them, which fastprune takes apart or makes plain ones of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * kept / (1 - self.drop_prob)


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm's: with dropout and an activation behind it."""

    def __init__(self, num_features: int, act: nn.Module, drop: nn.Module | None = None, **options: float) -> None:
        super().__init__(num_features, **options)  # type: ignore[arg-type]
        self.drop = drop or nn.Identity()
        self.act = act

    def forward(self, input: Tensor) -> Tensor:
        weights = (self.running_mean, self.running_var, self.weight, self.bias)
        x = functional.batch_norm(input, *weights, self.training, self.momentum or 0.0, self.eps)
        return self.act(self.drop(x))


class RenamedBatchNorm2d(nn.BatchNorm2d):
    """A subclass that computes what its base does."""


class LayerNorm2d(nn.LayerNorm):
    """As timm's: over the channels of an image."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        x = functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Block(nn.Module):
    """A block of its own, whose layers have names with dots."""

    def __init__(self, channels: int, width: int, act: nn.Module) -> None:
        super().__init__()
        self.act = act
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv2(self.act(self.norm1(self.conv1(x))))
        out += identity
        return self.act(out)


class SqueezeExcitation(nn.Module):
    """A gate for each channel, made of the means of all."""

    def __init__(self, channels: int, width: int, scale: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        return x * self.scale(self.expand(functional.relu(self.reduce(gate), inplace=True)))


class Attention(nn.Module):
    """Of tokens ``[B, T, C]``, as timm's without heads."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v))
