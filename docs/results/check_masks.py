"""Train as the flags of ``fastprune.train`` say, and compare every mask update with the rule computed in numpy.

The rule: s = mean |w| of every filter, t = sort(all s)[int(N · rate)], kept when s > t. Stops after ``--max-steps``,
else after the first epoch.
"""

import sys

import numpy as np
import torch

from fastprune import data
from fastprune.recipes import parse
from fastprune.trainer import Trainer


def rule(weights: list[torch.Tensor], rate: float) -> np.ndarray:
    """The mask of kept filters, by numpy alone."""
    rows = [weight.detach().double().cpu().numpy().reshape(len(weight), -1) for weight in weights]
    scores = np.concatenate([np.abs(row).mean(axis=1) for row in rows]).astype(np.float32)
    return scores > np.sort(scores)[int(len(scores) * rate)]


def main() -> int:
    """Exit status 0 if every update was equal."""
    config = parse(sys.argv[1:])
    images = data.load(config.data, root=config.data_root, seed=config.seed)
    trainer = Trainer(config, images.subset(config.limit_train, config.limit_test))
    assert trainer.pruner is not None, "nothing is pruned: choose a --prune-rate above 0"
    layers = trainer.pruner.layers.values()
    updates = equal = changed = 0
    before = np.concatenate([layer.mask.cpu().numpy() for layer in layers])
    for step in trainer.train_steps(config.max_steps or trainer.steps_per_epoch):
        mask = np.concatenate([layer.mask.cpu().numpy() for layer in layers])
        # Masks are renewed before iteration i when (i + 1) % every == 0, as published of the epoch; `step` are behind.
        iteration = step % trainer.steps_per_epoch if config.recipe == "faithful" else step
        if (iteration + 1) % config.prune_every == 0:
            updates += 1
            equal += bool((mask == rule([layer.weight for layer in layers], config.prune_rate)).all())
        elif (mask != before).any():
            print(f"the masks changed after step {step}, where no update is due")
            return 1
        changed += int((mask != before).sum())
        before = mask
    print(f"{config.model}, {trainer.step} steps: {equal} of {updates} mask updates equal the rule in numpy,")
    print(f"{len(before):,} filters, {int(before.sum()):,} kept at the end; {changed:,} came or went in between")
    return int(equal < updates or updates == 0)


if __name__ == "__main__":
    sys.exit(main())
