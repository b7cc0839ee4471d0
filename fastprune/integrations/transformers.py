"""Filter pruning in Transformers: a callback for ``Trainer(model, callbacks=[FilterPruning(model, rate=0.6)])``."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from .. import distributed
from ..pruner import FilterPruner

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fastprune.integrations.transformers needs Transformers: pip install 'fastprune[integrations]'"
    ) from error

# Not an ExportableState: those the Trainer makes anew from their arguments when it restores them, and ours has a model.
_STATE = "fastprune.FilterPruning"


def _states(state: TrainerState) -> dict[str, Any]:
    """What checkpoints keep of callbacks, by name; Transformers declares it as the list that it makes it of."""
    return cast("dict[str, Any]", state.stateful_callbacks)


class FilterPruning(TrainerCallback):
    """Prunes a model's filters while the ``Trainer`` trains it.

    Make it before the ``Trainer``, with the same model: its convolutions are converted at once, so that a checkpoint
    of a pruned model can be loaded. Masks are due by optimizer steps, whatever the accumulation of gradients is. What
    the ``Trainer`` logs has ``sparsity`` in it, in percent of all parameters: in ``state.log_history``, on the console
    and in what evaluation returns (services in ``report_to`` are told before the callbacks of users, and without it).

    Masks are buffers of the model and the schedule's position is in the ``Trainer``'s state: its checkpoints have both,
    and ``resume_from_checkpoint`` brings both back. From a checkpoint without them, pruning begins there. To load a
    checkpoint by yourself, convert the new model first, as the callback did: ``FilterPruner(model, rate, **options)``.

    Under DDP every process has the same masks by construction: they follow from weights that are the same. That is
    verified at each update. FSDP and DeepSpeed's stage 3, which cut weights into shards, are not for this.

    Args:
        model: converted in place.
        rate: see :class:`fastprune.FilterPruner`.
        options: the other arguments of :class:`fastprune.FilterPruner`.

    Attributes:
        pruner: of the model.

    Raises:
        fastprune.distributed.MismatchError: during training, where processes have different masks.
    """

    def __init__(self, model: nn.Module, rate: float, **options: Any) -> None:
        self.pruner = FilterPruner(model, rate, **options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on where the checkpoint was made, if training goes on from one."""
        saved = _states(state).get(_STATE)
        if saved is not None:
            self.pruner.load_state_dict(saved)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step of the optimizer."""
        if self.pruner.step():
            distributed.verify_masks(self.pruner)
        _states(state)[_STATE] = self.pruner.state_dict()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the checkpoint of an epoch know whether masks have been frozen since its last step."""
        _states(state)[_STATE] = self.pruner.state_dict()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the sparsity to what is logged; the history has a copy of its own by now."""
        sparsity = self.pruner.sparsity()
        for entry in (kwargs["logs"], *state.log_history[-1:]):
            entry["sparsity"] = sparsity
