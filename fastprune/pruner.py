"""When masks change and what is kept: the pruning schedule around the ops."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import importance as importances
from . import ops
from .batchnorms import following_batchnorms
from .coupling import Coupling, written_channels
from .importance import ORDS, Importance
from .nn import MaskedConv2d, MaskedWeights, State, mask_convolutions, state_of
from .pruning_report import LayerReport, PruningReport
from .pruning_schedule import Ramp, check_schedule, is_due, ramp_length, risen
from .selection import Scope, Selection

Feedback = Literal["straight-through", "normalized", "none"]


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
        rate: float,
        every: int,
        until: int | None,
        period: int | None,
        update_now: bool = True,
    ) -> None:
        self.model, self.layers = model, layers
        self.rate, self.every, self.until, self.steps_per_epoch = rate, every, until, period
        self.steps = 0
        self._frozen = False
        if update_now:
            self._update_if_due()

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
        rows, kept = [], self.kept()
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Conv2d):
                mine = name in self.layers
                share = float(self.layers[name].mask.float().mean()) if mine else 1.0
                why = self._why(name, kept[name]) if mine else "left alone: in ignore, or not in include"
                rows.append(LayerReport(name, module.out_channels, kept.get(name, module.out_channels), share, why))
        return PruningReport(tuple(rows))

    def _why(self, name: str, kept: int) -> str:
        """What decided about a layer."""
        return f"rate {self.current_rate:g} of all weights"

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule; the masks are in the model's own state_dict."""
        return {"steps": self.steps, "frozen": self._frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.steps, self._frozen = int(state["steps"]), bool(state.get("frozen", False))


class FilterPruner(Pruner):
    """Dynamic filter pruning with feedback: thresholds over the filters of a model, renewed during training.

    ``pruner = FilterPruner(model, rate=0.6)``, then ``pruner.step()`` after every ``optimizer.step()``.

    Args:
        model: converted in place: its ``Conv2d`` become :class:`fastprune.nn.MaskedConv2d`.
        rate: the share of filters to prune, ``0 <= rate < 1``; see :func:`fastprune.ops.filter_mask`.
        importance: ``l1`` (mean ``|w|``), ``l2`` (mean ``w²``), ``fpgm`` (distance from the layer's geometric median)
            or a function of a layer's name and weight; see :func:`fastprune.importance.scores`.
        every: masks are renewed before every ``every``-th iteration.
        until: the number of iterations after which masks stay; None for never.
        feedback: the gradient of pruned filters. ``straight-through``: as it comes. ``normalized``: times ``√ε`` of the
            BatchNorm that follows the convolution; a pruned filter's output is constant, its batch variance 0, and
            BatchNorm's backward divides by ``√(0 + ε)``, so that with ε = 1e-5 pruned filters would be driven by
            gradients about 316 times those of live ones. 1 where no BatchNorm follows. ``none``: no gradient.
        steps_per_epoch: if given, ``every`` counts from the start of each epoch.
        ignore: names or modules to leave alone, see :func:`fastprune.nn.mask_convolutions`.
        include: if given, names or modules outside of which all is left alone.
        scope: ``global``: one threshold over all layers; ``layer``: one for each.
        min_kept: filters that every layer keeps, its most important ones. The global threshold alone prunes whole
            layers at high rates and the network with them; 0 is the rule as published.
        round_to: kept filters of each layer come in multiples of it, rounded up.
        couple: an input of the model, for shapes. If given, filters whose outputs are added up (those of all writers of
            a residual stream, channel by channel) have the mean of their scores, so that they stay or go together, and
            a depthwise filter with the one it reads. Only so :func:`fastprune.compact` can make a stream narrower.
        schedule: how the rate gets to ``rate`` within ``ramp_steps`` iterations: ``constant`` (at once), ``linear``, or
            ``cubic``, ``rate · (1 − (1 − t/T)³)`` (Zhu and Gupta, 2017).
        ramp_steps: ``T``; None: so many that the last update before ``until`` has the whole rate.

    Raises:
        ValueError, TypeError: for arguments out of range and models that cannot be converted. Nothing is changed then.

    Copies of the model have its masks: by ``deepcopy``, and kept up to date by ``torch.optim.swa_utils.AveragedModel``,
    but not with ``use_buffers=True``, which averages masks too.

    Source:
        Lin et al., "Dynamic Model Pruning with Feedback", ICLR 2020; Jo and Bae, dynamic filter pruning, KIBME 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        importance: Importance = "l1",
        every: int = 4,
        until: int | None = None,
        feedback: Feedback = "normalized",
        steps_per_epoch: int | None = None,
        ignore: Iterable[str | nn.Module] = (),
        *,
        include: Iterable[str | nn.Module] | None = None,
        scope: Scope = "global",
        min_kept: int = 1,
        round_to: int = 1,
        couple: Tensor | tuple[Any, ...] | None = None,
        schedule: Ramp = "constant",
        ramp_steps: int | None = None,
    ) -> None:
        importances.check_importance(importance)
        if feedback not in ("straight-through", "normalized", "none"):
            raise ValueError(f"feedback must be straight-through, normalized or none, got {feedback!r}")
        # All is checked before the model is changed.
        check_schedule(rate, every, until, steps_per_epoch)
        Selection((), scope, min_kept, round_to)
        self.importance, self.feedback = importance, feedback
        self.schedule, self.ramp_steps = schedule, ramp_length(schedule, ramp_steps, every, until, steps_per_epoch)
        norms = following_batchnorms(model) if feedback == "normalized" else {}
        written = None if couple is None else written_channels(model, couple)
        layers = mask_convolutions(model, ignore, include=include)
        filters = {name: len(layer.mask) for name, layer in layers.items()}
        self.coupling = None if written is None else Coupling(filters, written)
        for name, layer in layers.items():
            if feedback != "straight-through":
                scale = (norms[name].eps ** 0.5 if name in norms else 1.0) if feedback == "normalized" else 0.0
                layer.feedback = torch.full_like(layer.mask, scale, dtype=torch.float32)
        self.selection = Selection(tuple(filters.values()), scope, min_kept, round_to)
        # All masks in one vector, for the op; the layers' own are written from it, and change otherwise too.
        self._mask = torch.cat([layer.mask for layer in layers.values()])
        self._taken: tuple[Tensor, list[State]] | None = None
        self._masked_weights: MaskedWeights | None = None
        self._above: Tensor | None = None  # the threshold's part of the last update, for the report
        super().__init__(model, layers, rate, every, until, steps_per_epoch)

    @property
    def ord(self) -> int | None:
        """The importance as the ops number it; None for one that is no norm."""
        return ORDS.get(self.importance) if isinstance(self.importance, str) else None

    @property
    def masked_weights(self) -> MaskedWeights:
        """The masked weights that an optimizer keeps ready for the forward, made when they are first asked for."""
        if self._masked_weights is None:
            self._masked_weights = MaskedWeights(self.layers)
        return self._masked_weights

    def take_norms(self, norms: Tensor) -> None:
        """Take the norms of the weights as they are now, so that the next update need not read the weights.

        They serve until a weight changes, which its version counter tells (it does not see a write through ``.data``,
        nor the step of an optimizer with ``fused=True``).

        Args:
            norms: ``[N]`` float32 on the weights' device, as :func:`fastprune.ops.sgd_step_` writes them. Not copied.
        """
        self._taken = norms, self._versions()

    def _versions(self) -> list[State]:
        return [state_of(layer.weight) for layer in self.layers.values()]

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:  # noqa: D102
        super().set_masks(masks)
        self._above = None
        self._renew()

    @torch.no_grad()
    def _update(self) -> None:
        masks, rate = list(self.masks().values()), self.current_rate
        self._mask = torch.cat(masks)  # they may have been moved, set or loaded
        if rate == 0 and self.schedule != "constant":  # the ramp's beginning; rate 0 itself prunes the least filter
            self._above = self._mask.fill_(True)
        elif not self._update_from_norms(rate):
            self._update_from_weights(rate)
        torch._foreach_copy_(masks, self._mask.split([mask.numel() for mask in masks]))
        self._renew()

    def _renew(self) -> None:
        """Masked weights that are kept ready are those of the new masks, also for a CUDA graph that only replays."""
        if self._masked_weights is not None and self._masked_weights.in_use:
            self._masked_weights.renew()

    def _update_from_weights(self, rate: float) -> None:
        weights = self._weights()
        if self.ord is not None and self.selection.is_threshold and self.coupling is None:
            self._above = ops.update_filter_masks_(list(weights.values()), rate, self._mask, self.ord)
        else:
            self._select(importances.scores(weights, self.importance), rate)

    def _update_from_norms(self, rate: float) -> bool:
        """Write the mask from norms that are known; False if there are none, or one is NaN."""
        if self.ord is None or self._taken is None or self._taken[1] != self._versions():
            return False
        try:
            self._select(self._taken[0], rate)
        except RuntimeError:  # a NaN: measuring the weights themselves tells the layer
            return False
        return True

    def _select(self, scores: Tensor, rate: float) -> None:
        if self.coupling is not None:
            scores = self.coupling.together(scores)
        above = self.selection.by_threshold(scores, rate)
        # Where scores are not finite on a GPU, which nobody waits to see, the mask stays as it was.
        mask = torch.where(scores.isfinite().all(), self.selection.bring_back(scores, above), self._mask)
        self._above = above
        self._mask.copy_(mask)

    def _why(self, name: str, kept: int) -> str:
        mask, layer = self.layers[name].mask, list(self.layers).index(name)
        written = self._mask.split(self.selection.filters)[layer].to(mask.device)
        if self._above is None or not torch.equal(written, mask):
            return "as set, loaded or new"
        above = self._above.split(self.selection.filters)[layer]
        count = int(above.sum())
        coupled = ", scored with those they are added to" if self.coupling is not None else ""
        why = f"{count} above the {self.selection.scope} threshold{coupled}"
        if kept > count:
            rules = {"min_kept": count < self.selection.min_kept, "round_to": self.selection.round_to > 1}
            reasons = [f"{rule} {getattr(self.selection, rule)}" for rule, counts in rules.items() if counts]
            why += f", {kept - count} more for {' and '.join(reasons)}"
        return why


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
        check_schedule(rate, every, until, steps_per_epoch)
        self.importance, self.feedback = importance, feedback
        layers = mask_convolutions(model, ignore, by_weight=True)
        if feedback == "none":
            for layer in layers.values():
                layer.feedback = torch.zeros((), device=layer.weight.device)
        self._needs_gradients = importance in ("grad", "taylor")
        # Before the first backward there are none.
        super().__init__(model, layers, rate, every, until, steps_per_epoch, update_now=not self._needs_gradients)

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
