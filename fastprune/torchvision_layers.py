"""torchvision's layers, for which networks that have none do not wait: torchvision takes seconds to load."""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["frozen_batch_norm", "is_frozen_batch_norm", "is_stochastic_depth", "stochastic_depth"]


def is_stochastic_depth(module: nn.Module) -> bool:
    """Whether it is a ``StochasticDepth``. While torchvision is not loaded, nothing is."""
    return _is_one("torchvision.ops.stochastic_depth", "StochasticDepth", module)


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """Whether it is a ``FrozenBatchNorm2d``. While torchvision is not loaded, nothing is."""
    return _is_one("torchvision.ops.misc", "FrozenBatchNorm2d", module)


def _is_one(file: str, name: str, module: nn.Module) -> bool:
    kind = getattr(sys.modules.get(file), name, None)
    return kind is not None and type(module) is kind


def stochastic_depth() -> type[nn.Module]:
    """Load torchvision and return the class, whose arguments are `p` and `mode`."""
    from torchvision.ops import StochasticDepth

    return StochasticDepth


def frozen_batch_norm() -> type[nn.Module]:
    """Load torchvision and return the class, whose arguments are `num_features` and `eps`."""
    from torchvision.ops import FrozenBatchNorm2d

    return FrozenBatchNorm2d
