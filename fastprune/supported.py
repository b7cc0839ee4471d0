"""What networks may be made of: each layer and function that is known, and what compact does with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .channel_rules import FOLLOWED, is_resized
from .layer_kinds import FUNCTIONS, METHODS, MODULES

__all__ = ["FOLLOWED_THROUGH", "SMALLER", "WHOLE", "Supported", "supported"]

SMALLER, FOLLOWED_THROUGH, WHOLE = "made smaller", "followed", "kept whole"


@dataclass(frozen=True)
class Supported:
    """A layer, a function or a method of tensors.

    Attributes:
        name: a class of torch.nn or of fastprune or torchvision; or ``torch.relu``, ``functional.relu``,
            ``operator.add``, ``Tensor.relu``.
        channels: ``made smaller``, ``followed`` or ``kept whole``.
        arguments: of a layer, those that are saved; None for a function.
    """

    name: str
    channels: str
    arguments: tuple[str, ...] | None = None


def supported() -> list[Supported]:
    """Everything that :func:`fastprune.save` takes, layers first; see :class:`Supported`."""
    layers = [
        Supported(name, SMALLER if is_resized(name) else _channels(name, kind.make), tuple(kind.arguments))
        for name, kind in MODULES.items()
    ]
    functions = [Supported(name, _channels(None, function)) for name, function in FUNCTIONS.items()]
    return layers + functions + [Supported(f"Tensor.{name}", _channels(name, None)) for name in sorted(METHODS)]


def _channels(name: str | None, kind: Any) -> str:
    return FOLLOWED_THROUGH if name in FOLLOWED or kind in FOLLOWED else WHOLE
