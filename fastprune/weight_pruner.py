"""Unstructured pruning: masks over single weights."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from . import ops
from .base_pruner import Pruner
from .pruning_plan import check_alike, plan
from .pruning_schedule import check_schedule
from .untouched import unchanged_on_error


class WeightPruner(Pruner):
    """Unstructured pruning: the same rule and schedule over all single weights.

    Args:
        model, rate, every, until, steps_per_epoch, ignore: as for :class:`FilterPruner`.
        importance: ``l1``, ``l2``, ``grad`` or ``taylor``; the last two read ``weight.grad``, so call ``step()`` before
            ``zero_grad()``. See :func:`fastprune.ops.weight_mask`.
        feedback: ``straight-through`` or ``none``.

    Raises:
        ValueError, TypeError: as :class:`FilterPruner`.
        RuntimeError: from ``step()``, if a gradient is needed and missing.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        importance: Literal["l1", "l2", "grad", "taylor"] = "l1",
        every: int = 4,
        until: int | None = None,
        feedback: Literal["straight-through", "none"] = "straight-through",
        steps_per_epoch: int | None = None,
        ignore: Iterable[str | nn.Module] = (),
    ) -> None:
        if importance not in ("l1", "l2", "grad", "taylor"):
            raise ValueError(f"importance must be l1, l2, grad or taylor, got {importance!r}")
        if feedback not in ("straight-through", "none"):
            raise ValueError(f"feedback must be straight-through or none for single weights, got {feedback!r}")
        schedule = check_schedule(rate, every, until, steps_per_epoch)
        self.importance, self.feedback = importance, feedback
        self._needs_gradients = importance in ("grad", "taylor")
        made = plan(model, ignore, removable_only=False)
        with unchanged_on_error(model):
            layers = made.mask(model, by_weight=True)
            check_alike(layers)
            if feedback == "none":
                for layer in layers.values():
                    layer.fill_feedback(0.0)
            # Before the first backward there are no gradients.
            super().__init__(model, layers, schedule, update_now=not self._needs_gradients)

    @torch.no_grad()
    def _update(self) -> None:
        grads: list[Tensor] = []
        if self._needs_gradients:
            for name, layer in self.layers.items():
                if layer.weight.grad is None:
                    raise RuntimeError(
                        f"layer {name} has no gradient, which importance {self.importance!r} needs: "
                        f"call step() after backward() and before zero_grad()"
                    )
                # The op reads both side by side in memory.
                grads.append(torch.empty_like(layer.weight).copy_(layer.weight.grad))
        masks = ops.weight_mask(list(self._weights().values()), self.rate, self.importance, grads)
        torch._foreach_copy_(list(self.masks().values()), masks)
