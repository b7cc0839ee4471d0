"""When masks change and what is kept: the pruning schedule around the ops."""

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import ops
from .nn import MaskedConv2d, following_batchnorms, mask_convolutions

Feedback = Literal["straight-through", "normalized", "none"]
_ORDS = {"l1": 1, "l2": 2}


class Pruner:
    """The schedule that :class:`FilterPruner` and :class:`WeightPruner` share, and what can be read of the masks.

    Attributes:
        layers: the masked convolutions by name, in model order.
        steps: iterations finished so far.
    """

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
        if not 0 <= rate < 1:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        for name, value in (("every", every), ("steps_per_epoch", period)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.model, self.layers = model, layers
        self.rate, self.every, self.until, self.steps_per_epoch = rate, every, until, period
        self.steps = 0
        if update_now:
            self._update_if_due()

    def step(self) -> bool:
        """Count a finished iteration, and update the masks if the next one is due. Call it after ``optimizer.step()``.

        Iteration ``i`` of an epoch (0-based) starts with new masks when ``(i + 1) % every == 0``, until the schedule
        ends.

        Returns:
            Whether the masks were updated.

        Raises:
            RuntimeError: naming the layer, if a weight is NaN or Inf.
        """
        self.steps += 1
        return self._update_if_due()

    def _update_if_due(self) -> bool:
        if self.until is not None and self.steps >= self.until:
            return False
        iteration = self.steps % self.steps_per_epoch if self.steps_per_epoch else self.steps
        due = (iteration + 1) % self.every == 0
        if due:
            self.update()
        return due

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

    def _weights(self) -> list[Tensor]:
        return [layer.weight.detach() for layer in self.layers.values()]

    def masks(self) -> dict[str, Tensor]:
        """The masks by layer name; the tensors themselves, not copies."""
        return {name: layer.mask for name, layer in self.layers.items()}

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

    def state_dict(self) -> dict[str, int]:
        """The position in the schedule; the masks are in the model's own state_dict."""
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.steps = int(state["steps"])


class FilterPruner(Pruner):
    """Dynamic filter pruning with feedback: one global threshold over the filters of a model, renewed during training.

    ``pruner = FilterPruner(model, rate=0.6)``, then ``pruner.step()`` after every ``optimizer.step()``.

    Args:
        model: converted in place: its ``Conv2d`` become :class:`fastprune.nn.MaskedConv2d`.
        rate: the share of filters to prune, ``0 <= rate < 1``; see :func:`fastprune.ops.filter_mask`.
        importance: ``l1`` (mean ``|w|``) or ``l2`` (mean ``w²``).
        every: masks are renewed before every ``every``-th iteration.
        until: the number of iterations after which masks stay; None for never.
        feedback: the gradient of pruned filters. ``straight-through``: as it comes. ``normalized``: times ``√ε`` of the
            BatchNorm that follows the convolution; a pruned filter's output is constant, its batch variance 0, and
            BatchNorm's backward divides by ``√(0 + ε)``, so that with ε = 1e-5 pruned filters would be driven by
            gradients about 316 times those of live ones. 1 where no BatchNorm follows. ``none``: no gradient.
        steps_per_epoch: if given, ``every`` counts from the start of each epoch.
        ignore: names or modules to leave alone, see :func:`fastprune.nn.mask_convolutions`.

    Raises:
        ValueError, TypeError: for arguments out of range and models that cannot be converted.

    Source:
        Lin et al., "Dynamic Model Pruning with Feedback", ICLR 2020; Jo and Bae, dynamic filter pruning, KIBME 2020.
    """

    def __init__(
        self,
        model: nn.Module,
        rate: float,
        importance: Literal["l1", "l2"] = "l1",
        every: int = 4,
        until: int | None = None,
        feedback: Feedback = "normalized",
        steps_per_epoch: int | None = None,
        ignore: Iterable[str | nn.Module] = (),
    ) -> None:
        if importance not in _ORDS:
            raise ValueError(f"importance must be l1 or l2, got {importance!r}")
        if feedback not in ("straight-through", "normalized", "none"):
            raise ValueError(f"feedback must be straight-through, normalized or none, got {feedback!r}")
        self.importance, self.feedback = importance, feedback
        norms = following_batchnorms(model) if feedback == "normalized" else {}
        layers = mask_convolutions(model, ignore)
        for name, layer in layers.items():
            if feedback != "straight-through":
                scale = (norms[name].eps ** 0.5 if name in norms else 1.0) if feedback == "normalized" else 0.0
                layer.feedback = torch.full_like(layer.mask, scale, dtype=torch.float32)
        # All masks in one vector, for the op; the layers' own are written from it.
        self._mask = torch.cat([layer.mask for layer in layers.values()])
        self._taken: tuple[Tensor, list[tuple[int, ...]]] | None = None
        super().__init__(model, layers, rate, every, until, steps_per_epoch)

    @property
    def ord(self) -> int:
        """The importance as the ops number it."""
        return _ORDS[self.importance]

    def take_norms(self, norms: Tensor) -> None:
        """Take the norms of the weights as they are now, so that the next update need not read the weights.

        They serve until a weight changes, which its version counter tells (a write through ``.data`` it does not see).

        Args:
            norms: ``[N]`` float32 on the weights' device, as :func:`fastprune.ops.sgd_step_` writes them. Not copied.
        """
        self._taken = norms, self._versions()

    def _versions(self) -> list[tuple[int, ...]]:
        weights = [layer.weight for layer in self.layers.values()]
        return [(id(weight), weight.data_ptr(), weight._version) for weight in weights]

    @torch.no_grad()
    def _update(self) -> None:
        masks = list(self.masks().values())
        if self._mask.device != masks[0].device:  # the model was moved
            self._mask = torch.cat(masks)
        if not self._update_from_norms():
            ops.update_filter_masks_(self._weights(), self.rate, self._mask, self.ord)
        torch._foreach_copy_(masks, self._mask.split([mask.numel() for mask in masks]))

    def _update_from_norms(self) -> bool:
        """Write the mask from norms that are known; False if there are none, or one is NaN."""
        if self._taken is None or self._taken[1] != self._versions():
            return False
        norms = self._taken[0]
        try:
            threshold = ops.kth_threshold(norms, int(norms.numel() * self.rate))
        except RuntimeError:  # a NaN: measuring the weights themselves tells the layer
            return False
        torch.gt(norms, threshold, out=self._mask)
        return True


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
        masks = ops.weight_mask(self._weights(), self.rate, self.importance, grads)
        torch._foreach_copy_(list(self.masks().values()), masks)
