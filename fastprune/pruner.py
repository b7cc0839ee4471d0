"""Filter pruning: thresholds over the filters of a model, renewed during training."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import importance as importances
from . import ops
from .base_pruner import Pruner
from .batchnorms import following_batchnorms
from .coupling import Coupling
from .importance import ORDS, Importance
from .nn import MaskedWeights, State, state_of
from .pruning_plan import check_alike, plan, unwrapped
from .pruning_schedule import Ramp, check_schedule, ramp_length
from .selection import Scope, Selection
from .untouched import unchanged_on_error
from .weight_pruner import WeightPruner

__all__ = ["FilterPruner", "Pruner", "WeightPruner"]

Feedback = Literal["straight-through", "normalized", "none"]


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
        example_input: an input of the model, or a tuple of them, for shapes. It tells which filters
            :func:`fastprune.compact` can remove: see ``removable_only``. And filters whose outputs are added up (those
            of all writers of a residual stream, channel by channel) have the mean of their scores, so that they stay or
            go together, and a depthwise filter with the one it reads. Only so a stream can become narrower.
        removable_only: whether filters that cannot be removed are left alone: they keep their outputs, count neither
            for the rate nor for thresholds, and :meth:`report` names them. Without ``example_input`` those are the
            layers that write the output, and a warning says that others are not known. Layers that ``include`` names
            one by one are pruned all the same. False prunes every convolution, as published.
        schedule: how the rate gets to ``rate`` within ``ramp_steps`` iterations: ``constant`` (at once), ``linear``, or
            ``cubic``, ``rate · (1 − (1 − t/T)³)`` (Zhu and Gupta, 2017).
        ramp_steps: ``T``; None: so many that the last update before ``until`` has the whole rate.

    Raises:
        ValueError, TypeError: for arguments out of range and models that cannot be converted.
        RuntimeError: naming the layer, if masks are made at once (``every=1``) and a weight is NaN or Inf.

    After an error the model is as it was.

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
        example_input: Tensor | tuple[Any, ...] | None = None,
        removable_only: bool = True,
        schedule: Ramp = "constant",
        ramp_steps: int | None = None,
    ) -> None:
        importances.check_importance(importance)
        if feedback not in ("straight-through", "normalized", "none"):
            raise ValueError(f"feedback must be straight-through, normalized or none, got {feedback!r}")
        plain = check_schedule(rate, every, until, steps_per_epoch)
        Selection((), scope, min_kept, round_to)
        self.importance, self.feedback = importance, feedback
        self.schedule, self.ramp_steps = schedule, ramp_length(schedule, ramp_steps, *plain[1:])
        self._plan = plan(model, ignore, include, example_input, removable_only)
        inner, prefix = unwrapped(model)
        norms = following_batchnorms(inner) if feedback == "normalized" else {}
        with unchanged_on_error(model):
            layers = self._plan.mask(model)
            check_alike(layers)
            for name, layer in layers.items():
                if feedback != "straight-through":
                    norm = norms.get(name.removeprefix(prefix))
                    scale = 0.0 if feedback == "none" else norm.eps**0.5 if norm is not None else 1.0
                    layer.fill_feedback(scale)
            filters = {name: len(layer.mask) for name, layer in layers.items()}
            self.coupling = None if self._plan.written is None else Coupling(filters, self._plan.written)
            pinned = tuple(self._plan.pinned_among(filters))
            self.selection = Selection(tuple(filters.values()), scope, min_kept, round_to, pinned)
            # All masks in one vector, for the op; the layers' own are written from it, and change otherwise too.
            self._mask = torch.cat([layer.mask for layer in layers.values()])
            self._taken: tuple[Tensor, list[State]] | None = None
            self._masked_weights: MaskedWeights | None = None
            self._above: Tensor | None = None  # the threshold's part of the last update, for the report
            super().__init__(model, layers, plain)

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
        self._mask = torch.cat(list(self.masks().values()))
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
        mask, self._above = self.selection.select(scores, rate)
        # Where scores are not finite on a GPU, which nobody waits to see, the mask stays as it was.
        self._mask.copy_(torch.where(scores.isfinite().all(), mask, self._mask))

    def _left(self, name: str) -> str:
        why = self._plan.left.get(name)
        return super()._left(name) if why is None else f"left alone: its filters cannot be removed ({why})"

    def _part(self, vector: Tensor, name: str) -> Tensor:
        """A layer's part of a vector of all filters."""
        return vector.split(self.selection.filters)[list(self.layers).index(name)]

    def _is_own(self, name: str) -> bool:
        mask = self.layers[name].mask
        return torch.equal(self._part(self._mask, name).to(mask.device), mask)

    def _decided(self, name: str, kept: int) -> str:
        assert self._above is not None
        count = int(self._part(self._above, name).sum())
        pinned = int(self._plan.pinned[name].sum()) if name in self._plan.pinned else 0
        why = f"{count - pinned} above the {self.selection.scope} threshold"
        if self.coupling is not None and self._part(self.coupling.coupled, name).any():
            why += ", scored with those that write the same channels"
        if kept > count:
            rules = {"min_kept": count < self.selection.min_kept, "round_to": self.selection.round_to > 1}
            reasons = [f"{rule} {getattr(self.selection, rule)}" for rule, counts in rules.items() if counts]
            why += f", {kept - count} more for {' and '.join(reasons)}"
        note = self._plan.notes.get(name)
        return f"{why}; {note}" if note else why
