"""Filter pruning in Lightning: a callback for ``Trainer(callbacks=[FilterPruning(rate=0.6)])``."""

from __future__ import annotations

from typing import Any

from ..pruner import FilterPruner

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fastprune.integrations.lightning needs Lightning: pip install 'fastprune[integrations]'"
    ) from error


class FilterPruning(Callback):
    """Prunes a module's filters while Lightning trains it.

    Masks are due by optimizer steps, whatever the accumulation of gradients is. They are buffers of the module and the
    schedule's position is in the callback's state: checkpoints have both, and ``ckpt_path`` resumes both. Under DDP
    every process has the same masks, since they follow from weights that are the same. After each epoch ``sparsity``
    is logged, in percent of all parameters.

    Args:
        rate: see :class:`fastprune.FilterPruner`.
        network: the part of the module that is pruned, by its name, e.g. ``"model"``; empty for all of it. Name the one
            that ``training_step`` calls: it masks all its convolutions at once, where the module as a whole is not
            called they mask themselves one by one.
        options: the other arguments of :class:`fastprune.FilterPruner`.

    Attributes:
        pruner: from the start of ``fit`` on.
    """

    def __init__(self, rate: float, network: str = "", **options: Any) -> None:
        self.rate, self.network, self.options = rate, network, options
        self.pruner: FilterPruner | None = None
        self._state: dict[str, Any] | None = None
        self._steps = 0  # of the optimizer, when the pruner was last told

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the module, before a checkpoint is loaded into it."""
        if stage == "fit" and self.pruner is None:
            self.pruner = FilterPruner(pl_module.get_submodule(self.network), self.rate, **self.options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the checkpoint, if there was one."""
        self._steps = trainer.global_step
        if self._state is not None and self.pruner is not None:
            self.pruner.load_state_dict(self._state)
            self._state = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Count the optimizer's steps, not the batches."""
        if self.pruner is not None and trainer.global_step > self._steps:
            self.pruner.step()
        self._steps = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity."""
        if self.pruner is not None:
            pl_module.log("sparsity", self.pruner.sparsity(), rank_zero_only=True)

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule, for Lightning's checkpoints."""
        return self.pruner.state_dict() if self.pruner is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint holds until training starts."""
        self._state = state_dict or None
