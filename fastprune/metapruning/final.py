"""The last stage: the best encoding's network is trained by the ordinary trainer, as any other network is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import checkpoint, train
from ..recipes import Config
from .encoding import as_text
from .settings import SearchConfig


def final_config(config: SearchConfig, encoding: Sequence[int], out: Path) -> Config:
    """The run that trains an encoding's network from scratch, on all training images, tested on the test images.

    Args:
        config: of the search.
        encoding: of the network.
        out: the run's folder; where it holds a checkpoint the run goes on from there.
    """
    return Config(
        out=out,
        resume=out if checkpoint.latest(out / train.CHECKPOINT).exists() else None,
        model=f"{config.network.removesuffix('_cifar')}@{as_text(encoding)}",
        stem="imagenet" if config.network in ("resnet50", "mobilenet_v1", "mobilenet_v2") else "cifar",
        data=config.data,
        data_root=config.data_root,
        image_size=config.image_size,
        limit_train=config.limit_train,
        limit_test=config.limit_test,
        pad=config.pad,
        flip=config.flip,
        epochs=config.final_epochs,
        batch_size=config.final_batch_size,
        lr=config.final_lr,
        schedule=config.final_schedule,
        weight_decay=config.final_weight_decay,
        label_smoothing=config.label_smoothing,
        prune_type="none",
        prune_rate=0.0,
        decorrelation="none",
        precision=config.precision,
        device=config.device,
        channels_last=config.channels_last,
        seed=config.seed,
    )
