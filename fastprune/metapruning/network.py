"""Networks built from their description: the modules are the caller's, the way through them is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .description import Block, Conv, Description
from .encoding import check_encoding
from .networks import describe

MakeConv = Callable[[str, Conv, Block], tuple[nn.Module, nn.Module]]
"""From a convolution's name and what is known of it: the module that convolves, and the batch norm behind it."""


class DescribedBlock(nn.Module):
    """One block of a description: ``[B, C, H, W]`` to what its convolutions and its shortcut make of it."""

    def __init__(self, description: Description, block: Block, make: MakeConv) -> None:
        super().__init__()
        self.block = block
        _fill(self, description, block, make)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return _run(self, self.block, x)


class DescribedNetwork(nn.Module):
    """A network as its description says: images ``[B, 3, H, W]`` to logits ``[B, classes]``.

    The modules' names are those of torchvision's ResNets, and of :mod:`fastprune.models.resnet` for CIFAR.

    Args:
        description: of the network.
        make: makes its convolutions and batch norms.
        classifier: from the features to the logits.
    """

    def __init__(self, description: Description, make: MakeConv, classifier: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.description = description
        self.order: list[Block | str] = []  # what runs: a block of the network itself, or a module's name
        for block in description.blocks:
            if block.name:
                group, _, _ = block.name.partition(".")
                if group not in self._modules:
                    self.add_module(group, nn.Sequential())
                    self.order.append(group)
                blocks = self.get_submodule(group)
                assert isinstance(blocks, nn.Sequential)
                blocks.append(DescribedBlock(description, block, make))
            else:
                _fill(self, description, block, make)
                self.order.append(block)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = classifier()

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        for part in self.order:
            x = self._modules[part](x) if isinstance(part, str) else _run(self, part, x)  # type: ignore[misc]
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _fill(module: nn.Module, description: Description, block: Block, make: MakeConv) -> None:
    """Give ``module`` the modules of the block."""
    prefix = f"{block.name}." if block.name else ""
    for number, conv in enumerate(block.convs, start=block.first):
        convolution, norm = make(f"{prefix}conv{number}", conv, block)
        module.add_module(f"conv{number}", convolution)
        module.add_module(f"bn{number}", norm)
    if isinstance(block.shortcut, Conv):
        name = description.shortcut_name
        module.add_module(name, nn.Sequential(*make(f"{prefix}{name}.0", block.shortcut, block)))
    # It writes over its input, which is a batch norm's output or a sum: no one else reads those.
    module.add_module("relu", {"relu": nn.ReLU, "relu6": nn.ReLU6}[description.activation](inplace=True))
    if block.pooled:
        module.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))


def _run(module: nn.Module, block: Block, x: Tensor) -> Tensor:
    y = x
    for number, conv in enumerate(block.convs, start=block.first):
        y = getattr(module, f"bn{number}")(getattr(module, f"conv{number}")(y))
        if conv.activated:
            y = module.relu(y)  # type: ignore[operator]
    if isinstance(block.shortcut, Conv):
        y = y + getattr(module, _shortcut_name(module))(x)
    elif block.shortcut == "identity":
        y = y + x
    if block.activated:
        y = module.relu(y)  # type: ignore[operator]
    return module.maxpool(y) if block.pooled else y  # type: ignore[operator]


def _shortcut_name(module: nn.Module) -> str:
    return "shortcut" if "shortcut" in module._modules else "downsample"


class PlainNetwork(DescribedNetwork):
    """The ordinary network of an encoding, freshly initialised: convolutions Kaiming normal by their fan-out.

    Args:
        network: a name, see :func:`fastprune.metapruning.describe`, or a description.
        encoding: the choice of every gene, 0 to 30; the widest network by default.
        num_classes: number of logits; as the network is made for by default.

    Raises:
        ValueError: for an unknown network, another number of genes, genes out of range, or no class.
    """

    def __init__(
        self, network: str | Description, encoding: Sequence[int] | None = None, num_classes: int | None = None
    ) -> None:
        description = describe(network) if isinstance(network, str) else network
        genes = len(description.genes)
        chosen = check_encoding([30] * genes if encoding is None else encoding, genes, description.name)
        classes = description.num_classes if num_classes is None else num_classes
        if classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {classes}")
        features = description.features.channels(chosen)
        super().__init__(
            description, lambda _, conv, __: _make_plain(conv, chosen), lambda: nn.Linear(features, classes)
        )
        self.encoding = chosen
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)


def plain_convolution(conv: Conv, encoding: Sequence[int], device: torch.device | str | None = None) -> nn.Conv2d:
    """The ``Conv2d`` of an encoding, initialised as PyTorch does; on the meta device it costs nothing."""
    inputs, outputs = conv.inputs.channels(encoding), conv.outputs.channels(encoding)
    return nn.Conv2d(
        inputs,
        outputs,
        conv.kernel,
        conv.stride,
        padding=conv.kernel // 2,
        groups=inputs if conv.depthwise else 1,
        bias=False,
        device=device,
    )


def _make_plain(conv: Conv, encoding: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    convolution = plain_convolution(conv, encoding)
    return convolution, nn.BatchNorm2d(convolution.out_channels)
