"""Residual networks: the CIFAR ones of He et al. (2015), section 4.2, and torchvision's with a CIFAR stem."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut: `[B, C, H, W]` to `[B, channels, ⌈H/stride⌉, ⌈W/stride⌉]`.

    Where the shape changes the shortcut is a 1×1 convolution with BatchNorm (option B of the paper).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return `relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))`."""
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-(6n + 2): a 3×3 stem and three stages of n blocks with 16, 32 and 64 channels."""

    def __init__(self, blocks_per_stage: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = _stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = _stage(32, 64, blocks_per_stage, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _initialise(module)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[B, 3, H, W]` to logits `[B, num_classes]`."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _initialise(conv: nn.Conv2d) -> None:
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")


def cifar_resnet(depth: int, num_classes: int) -> CifarResNet:
    """Return the CIFAR ResNet of that depth, which must be 6n + 2 with n ≥ 1 (20, 32, 44, 56, 110, …)."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"the depth of a CIFAR ResNet is 6n + 2 (8, 14, 20, …), not {depth}")
    return CifarResNet((depth - 2) // 6, num_classes)


def torchvision_resnet(name: str, num_classes: int, cifar_stem: bool) -> nn.Module:
    """Return torchvision's network, untrained; with `cifar_stem` a 3×3 first convolution, no max-pool."""
    from torchvision.models import get_model  # takes seconds to load, and most models are not torchvision's

    model = get_model(name, weights=None, num_classes=num_classes)
    if cifar_stem:
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        _initialise(model.conv1)
        model.maxpool = nn.Identity()
    return model
