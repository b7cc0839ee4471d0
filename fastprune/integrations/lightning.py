"""Filter pruning in Lightning: a callback for ``Trainer(callbacks=[FilterPruning(rate=0.6)])``."""

from __future__ import annotations

from typing import Any

from .. import distributed
from ..nn import MaskedConv2d
from ..pruner import FilterPruner
from ..pruning_plan import plan

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "fastprune.integrations.lightning needs Lightning: pip install 'fastprune[integrations]'"
    ) from error


class FilterPruning(Callback):
    """Prunes a module's filters while Lightning trains it.

    Masks are due by optimizer steps, whatever the accumulation of gradients is; with manual optimization a batch that
    made several steps counts as one. After each epoch ``sparsity`` is logged, in percent of all parameters.

    Masks are buffers of the module and the schedule's position is in the callback's state: checkpoints have both, and
    ``ckpt_path`` brings both back, into a new module too, to fit, validate, test or predict. To load a checkpoint by
    yourself, convert the new module first, as the callback did: ``FilterPruner(module.model, rate, **options)``.

    Under DDP every process has the same masks by construction: they follow from weights that are the same. That is
    verified at each update. Strategies that cut weights into shards (FSDP, DeepSpeed's stage 3) are not for this.

    Args:
        rate: see :class:`fastprune.FilterPruner`.
        network: the part of the module that is pruned, by its name, e.g. ``"model"``; empty for all of it. Name the one
            that ``training_step`` calls: it masks all its convolutions at once, where the module as a whole is not
            called they mask themselves one by one.
        options: the other arguments of :class:`fastprune.FilterPruner`.

    Attributes:
        pruner: from the start of ``fit`` on.

    Raises:
        fastprune.distributed.MismatchError: during training, where processes have different masks.
    """

    def __init__(self, rate: float, network: str = "", **options: Any) -> None:
        self.rate, self.network, self.options = rate, network, options
        self.pruner: FilterPruner | None = None
        self._steps = 0  # of the optimizer, when the pruner was last told

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Convert the module, before a checkpoint is loaded into it."""
        network = pl_module.get_submodule(self.network)
        if self.pruner is not None and self.pruner.model is network:
            return
        if stage == "fit":
            self.pruner = FilterPruner(network, self.rate, **self.options)
        elif not any(isinstance(module, MaskedConv2d) for module in network.modules()):  # those have masks to keep
            chosen = ("ignore", "include", "example_input", "removable_only")
            plan(network, **{name: self.options[name] for name in chosen if name in self.options}).mask(network)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here; a checkpoint has been loaded by now, if there was one."""
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Count the optimizer's steps, not the batches."""
        if self.pruner is not None and trainer.global_step > self._steps and self.pruner.step():
            distributed.verify_masks(self.pruner)
        self._steps = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sparsity."""
        if self.pruner is not None:
            pl_module.log("sparsity", self.pruner.sparsity(), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule, for Lightning's checkpoints."""
        return self.pruner.state_dict() if self.pruner is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was made; outside of ``fit`` there is nothing to go on with."""
        if self.pruner is not None:
            self.pruner.load_state_dict(state_dict)
