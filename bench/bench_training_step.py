"""A step of the trainer in each precision, and in the one that `--precision auto` chooses: no other may be faster."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import table
import torch
from device import Device
from layers import Measure, Work

from fastprune import data
from fastprune.recipes import RECIPES, Config
from fastprune.trainer import Trainer

IMAGES = {"cpu": 32, "cuda": 1024}  # of a step: emulated bfloat16 takes seconds for it; a GPU is to be full
ROUNDS = 5


class Network:
    """What the table calls it."""

    name = "resnet20"


def step_in(precision: str, device: Device) -> tuple[str, Callable[[], Any]]:
    """The precision that it comes to, and a step in it, on the same images every time."""
    images = IMAGES[device.name.type]
    settings = {**vars(RECIPES["quick"]), "precision": precision, "device": device.name.type, "batch_size": images}
    trainer = Trainer(Config(**settings), data.embedded(0, train=images, test=10))
    trainer.model.train()
    step = functools.partial(trainer.train_step, torch.arange(images, device=device.name))

    def again() -> None:
        trainer.step = 0  # the schedule has an end
        step()
        device.synchronize()

    return trainer.config.precision, again


def by_turns(calls: dict[str, Callable[[], Any]], device: Device) -> dict[str, float]:
    """The shortest time of each, in seconds."""
    shortest = dict.fromkeys(calls, math.inf)
    for _ in range(ROUNDS):
        for name, call in calls.items():
            shortest[name] = min(shortest[name], device.seconds(call))
    return shortest


@pytest.mark.rivals(host=["fastprune auto", "fp32", "bf16"], ops=["sgd_step_"])
def test_training_step(measure: Measure, device: Device, rival: str) -> None:
    chosen, call = step_in(rival.removeprefix("fastprune "), device)
    call()
    if rival == "fastprune auto":
        other = "fp32" if chosen == "bf16" else "bf16"
        table.verify_precision(chosen, by_turns({chosen: call, other: step_in(other, device)[1]}, device))
    measure("training step", Network, call, Work(0))
