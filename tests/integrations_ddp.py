"""Both callbacks in two processes, as ``torchrun`` starts them: ``integrations_ddp.py FOLDER``.

Each process prints a line of JSON for each library: its masks, and what was said when the processes' weights parted.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.distributed as dist
from test_integrations import Module, lightning_trainer, loader, train
from transformers import TrainerCallback

from fastprune import FilterPruner
from fastprune.distributed import MismatchError
from fastprune.integrations.lightning import FilterPruning


def disturb(model: torch.nn.Module) -> None:
    """Change the weights of one process behind DDP's back."""
    if dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.rand_like(parameter))


class LightningFault(lightning.Callback):
    def on_train_batch_start(self, trainer: Any, pl_module: lightning.LightningModule, *_: Any) -> None:
        disturb(pl_module)


class TransformersFault(TrainerCallback):
    def on_step_begin(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        disturb(model)


def with_lightning(folder: Path, *faults: LightningFault) -> FilterPruner:
    pruning = FilterPruning(0.5, network="net", every=3)
    options = {"strategy": "ddp", "devices": 2, "max_epochs": 2}
    lightning_trainer(folder, *faults, pruning, **options).fit(Module(), loader())
    assert pruning.pruner is not None
    return pruning.pruner


def with_transformers(folder: Path, *faults: TransformersFault) -> FilterPruner:
    return train(folder, 2, None, *faults, ddp_backend="gloo")[1]


def main(folder: Path) -> None:
    for run, fault in ((with_lightning, LightningFault()), (with_transformers, TransformersFault())):
        pruner = run(folder)  # type: ignore[operator]
        masks = torch.cat(list(pruner.masks().values())).int().tolist()
        said = ""
        try:
            run(folder, fault)  # type: ignore[operator]
        except MismatchError as error:
            said = str(error)
        found = {"run": run.__name__, "processes": dist.get_world_size(), "steps": pruner.steps}
        sys.stdout.write(json.dumps({**found, "masks": masks, "said": said}) + "\n")  # one write: lines stay whole
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
