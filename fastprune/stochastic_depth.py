"""torchvision's StochasticDepth, for which networks that have none do not wait: torchvision takes seconds to load."""

from __future__ import annotations

import sys

from torch import nn

__all__ = ["is_stochastic_depth", "stochastic_depth"]


def is_stochastic_depth(module: nn.Module) -> bool:
    """Whether it is one. While torchvision is not loaded, nothing is."""
    kind = getattr(sys.modules.get("torchvision.ops.stochastic_depth"), "StochasticDepth", None)
    return kind is not None and isinstance(module, kind)


def stochastic_depth() -> type[nn.Module]:
    """Load torchvision and return the class, whose arguments are `p` and `mode`."""
    from torchvision.ops import StochasticDepth

    return StochasticDepth
