"""Filter pruning in Transformers: a callback for ``Trainer(model, callbacks=[FilterPruning(model, rate=0.6)])``."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..pruner import FilterPruner

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fastprune.integrations.transformers needs Transformers: pip install 'fastprune[integrations]'"
    ) from error


class FilterPruning(TrainerCallback):
    """Prunes a model's filters while the ``Trainer`` trains it.

    Make it before the ``Trainer``, with the same model: its convolutions are converted at once, so that a checkpoint
    of a pruned model, whose masks are buffers, can be loaded. Masks are due by optimizer steps, whatever the
    accumulation of gradients is; ``resume_from_checkpoint`` goes on at the step of the checkpoint. After each epoch the
    sparsity, in percent of all parameters, is in ``state.log_history``.

    Args:
        model: converted in place.
        rate: see :class:`fastprune.FilterPruner`.
        options: the other arguments of :class:`fastprune.FilterPruner`.

    Attributes:
        pruner: of the model.
    """

    def __init__(self, model: nn.Module, rate: float, **options: Any) -> None:
        self.pruner = FilterPruner(model, rate, **options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin at the step of the checkpoint, or at 0."""
        self.pruner.steps = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step of the optimizer."""
        self.pruner.step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the sparsity."""
        state.log_history.append({"sparsity": self.pruner.sparsity(), "epoch": state.epoch, "step": state.global_step})
