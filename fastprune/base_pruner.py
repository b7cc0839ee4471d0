"""What pruners share: when masks are updated, and what can be done with them."""

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .nn import MaskedConv2d, along_filters, unmask_
from .pruning_plan import explain_missing_masks
from .pruning_report import LayerReport, PruningReport
from .pruning_schedule import Ramp, is_due, next_due, risen, why_never


class Pruner:
    """The schedule that :class:`FilterPruner` and :class:`WeightPruner` share, and what can be done with the masks.

    Attributes:
        layers: the masked convolutions by name, in model order.
        steps: iterations finished so far.
    """

    # What the rate does until it is what it shall be; FilterPruner sets them.
    schedule: Ramp = "constant"
    ramp_steps: int = 0

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, MaskedConv2d],
        schedule: tuple[float, int, int | None, int | None],
        update_now: bool = True,
    ) -> None:
        self.model, self.layers = model, layers
        self.rate, self.every, self.until, self.steps_per_epoch = schedule
        self.steps = 0
        self._frozen = False
        self._updated, self._by_hand = False, set[str]()  # where masks come from, for the report
        if update_now:
            self._update_if_due()
        never = why_never(*schedule[1:])
        if never and self.until != 0:
            warnings.warn(f"nothing will be pruned but by pruner.update(): {never}", stacklevel=3)
        self._hook = model.register_load_state_dict_post_hook(explain_missing_masks)

    def step(self) -> bool:
        """Count a finished iteration, and update the masks if the next one is due. Call it after ``optimizer.step()``.

        Iteration ``i`` of an epoch (0-based) starts with new masks when ``(i + 1) % every == 0``, until the schedule
        ends or the masks are frozen.

        Returns:
            Whether the masks were updated.

        Raises:
            RuntimeError: naming the layer, if a weight is NaN or Inf.
        """
        self.steps += 1
        return self._update_if_due()

    def _update_if_due(self) -> bool:
        if self.frozen:
            return False
        due = is_due(self.steps, self.every, self.steps_per_epoch)
        if due:
            self.update()
        return due

    @property
    def frozen(self) -> bool:
        """Whether the masks stay as they are from now on: the schedule has ended, or :meth:`freeze` was called."""
        return self._frozen or (self.until is not None and self.steps >= self.until)

    def freeze(self) -> None:
        """Let the masks stay, whatever the schedule says; :meth:`update` and :meth:`set_masks` still work."""
        self._frozen = True

    @property
    def current_rate(self) -> float:
        """The rate of an update now: ``rate``, or what its schedule has it at."""
        return self.rate * risen(self.schedule, self.steps, self.ramp_steps)

    def update(self) -> None:
        """Recompute the masks now, whatever the schedule says."""
        try:
            self._update()
        except RuntimeError as error:
            index = re.search(r"weights\[(\d+)\]", str(error))
            if index is None:
                raise
            raise RuntimeError(f"layer {list(self.layers)[int(index[1])]}: {error}") from error
        self._updated, self._by_hand = True, set()

    def _update(self) -> None:
        raise TypeError("use FilterPruner or WeightPruner")

    def _weights(self) -> dict[str, Tensor]:
        return {name: layer.weight.detach() for name, layer in self.layers.items()}

    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name; the tensors themselves, not copies."""
        return {name: layer.mask for name, layer in self.layers.items()}

    def export_masks(self) -> dict[str, Tensor]:
        """Copies of the masks on the CPU, by layer name: what :meth:`set_masks` takes."""
        return {name: mask.detach().cpu().clone() for name, mask in self.masks().items()}

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks of some or all layers. The next update that is due makes new ones: see :meth:`freeze`.

        Args:
            masks: by layer name, bool, of the shape of the layer's mask; True is kept.

        Raises:
            ValueError: for an unknown layer, or a mask of another shape or dtype. No mask is changed then.
        """
        own = self.masks()
        for name, mask in masks.items():
            if name not in own:
                raise ValueError(f"{name!r} is no masked layer: they are {', '.join(own)}")
            if mask.dtype != torch.bool or mask.shape != own[name].shape:
                raise ValueError(
                    f"the mask of {name} must be bool of shape {list(own[name].shape)}, "
                    f"got {mask.dtype} of {list(mask.shape)}"
                )
        for name, mask in masks.items():
            own[name].copy_(mask)
        self._by_hand.update(masks)

    def kept(self) -> dict[str, int]:
        """Kept filters per layer (those with a weight left). Reads the device."""
        masks = self.masks()
        counts = torch.stack(
            [mask.flatten(1).any(1).sum() if mask.dim() > 1 else mask.sum() for mask in masks.values()]
        )
        return dict(zip(masks, counts.tolist()))

    def sparsity(self) -> float:
        """Percent of all parameters of the model (weights and biases) that the expanded masks set to 0.

        Reads the device.
        """
        zeros = sum(
            (~layer.mask).sum() * (layer.weight.numel() // layer.mask.numel()) for layer in self.layers.values()
        )
        return 100 * float(zeros) / sum(parameter.numel() for parameter in self.model.parameters())

    def report(self) -> PruningReport:
        """What is kept of every convolution of the model, and why. Reads the device."""
        rows, nothing_yet = [], self._nothing_yet()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Conv2d):
                mask = module.mask if isinstance(module, MaskedConv2d) else torch.ones(module.out_channels)
                kept, share = int(mask.flatten(1).any(1).sum() if mask.dim() > 1 else mask.sum()), mask.float().mean()
                why = nothing_yet or self._why(name, kept) if name in self.layers else self._left(name)
                rows.append(LayerReport(name, module.out_channels, kept, float(share), why))
        return PruningReport(tuple(rows))

    def _left(self, name: str) -> str:
        """Why a layer is left alone."""
        return "left alone: in ignore, or not in include"

    def _why(self, name: str, kept: int) -> str:
        """Where a layer's mask comes from."""
        if not self._is_own(name) or not (self._updated or name in self._by_hand):
            return "as loaded, or changed by others than this pruner"
        return "as set by set_masks()" if name in self._by_hand else self._decided(name, kept)

    def _nothing_yet(self) -> str:
        """When masks are made for the first time; empty if there are some."""
        if self._updated or self._by_hand or not all(bool(mask.all()) for mask in self.masks().values()):
            return ""
        due = None if self._frozen else next_due(self.steps + 1, self.every, self.until, self.steps_per_epoch)
        if due is None:
            never = "the masks are frozen" if self.frozen else why_never(self.every, self.until, self.steps_per_epoch)
            return f"nothing pruned: {never}; pruner.update() makes masks now"
        return f"nothing pruned yet: the first update comes before iteration {due + 1}; pruner.update() makes it now"

    def _is_own(self, name: str) -> bool:
        """Whether a layer's mask is what this pruner wrote last, as far as can be told."""
        return True

    def _decided(self, name: str, kept: int) -> str:
        """What decided in an update."""
        return f"rate {self.current_rate:g} of all weights"

    def remove(self, bake: bool = True) -> None:
        """Turn the masked convolutions back into ordinary ``Conv2d``, in place.

        Parameters keep their identity, so optimizers stay valid (of a :class:`fastprune.optim.PrunedSGD` set ``pruner``
        to None), and ``state_dict`` has the keys that it had before the model was converted. The pruner is of no use
        any more. Call :func:`fastprune.onednn.protect` again if the model needs it.

        Args:
            bake: whether pruned weights become 0; False keeps the dense weights.
        """
        with torch.no_grad():
            for layer in self.layers.values():
                if isinstance(layer, MaskedConv2d):  # else another pruner of the same model has been here
                    if bake:
                        layer.weight.masked_fill_(~along_filters(layer.mask, layer.weight), 0)
                    unmask_(layer)
        self._hook.remove()
        vars(self).clear()
        self.__class__ = _Removed

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule; the masks are in the model's own state_dict."""
        return {"steps": self.steps, "frozen": self._frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.steps, self._frozen = int(state["steps"]), bool(state.get("frozen", False))


class _Removed(Pruner):
    """What a pruner becomes when it has been removed."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__"):
            return super().__getattribute__(name)
        raise RuntimeError(
            "this pruner has been removed from its model, whose convolutions are ordinary ones again: make another "
            "pruner, and set the pruner of a PrunedSGD to None"
        )
