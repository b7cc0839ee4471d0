"""The small network of a run: made when the masks stay, and made again from a checkpoint, to be trained on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .architecture import build, describe
from .batchnorms import following_batchnorms
from .compact import carry_optimizer, compact
from .network import Network, memory_format
from .pruner import Pruner
from .recipes import Config

__all__ = ["compacted", "restored"]


def compacted(plain: Network, example_input: Tensor) -> Network:
    """The network without what its masks prune, to be trained on from here; see :func:`fastprune.compact`.

    It computes in train mode what the masked network computes in train mode, but for the borders of images, where zeros
    around them meet what was a constant; and its batch norm no longer learns these constants.

    Args:
        plain: as a lone process has it, with a pruner. The running statistics of what is pruned are settled in it.
        example_input: of the model.

    Returns:
        The small network with the optimizer's state of what is left of each parameter.
    """
    config = plain.config
    if plain.pruner is not None:
        settle_pruned(plain.pruner)
    # What is not exact about it is near the borders of images, and trained on.
    small = compact(plain.model, example_input, config.round_to, exact=False)
    carried = carry_optimizer(plain.optimizer, plain.model, small)
    stored = {
        "model": config.model,
        "stem": config.stem,
        "architecture": describe(small),
        "figures": plain.figures(),
        "report": str(small.report),
    }
    # Made as a resumed run makes it, so that both have their parameters in one order.
    network = restored(config, stored, small.state_dict())
    parameters = dict(network.model.named_parameters())
    for name, parameter in small.named_parameters():
        if parameter in carried.state:
            network.optimizer.state[parameters[name]] = carried.state[parameter]
    return network


def restored(
    config: Config, stored: Mapping[str, Any], tensors: Mapping[str, Tensor], several: bool | None = None
) -> Network:
    """The small network that a checkpoint has.

    Args:
        config: of the run.
        stored: what :attr:`Network.compacted` was.
        tensors: its model's ``state_dict``, on its device; they become its parameters and buffers.
        several: as for :class:`Network`.

    Raises:
        ValueError: if it comes of another network than ``config`` asks for, or is none.
    """
    for name in ("model", "stem"):
        if stored[name] != getattr(config, name):
            raise ValueError(f"{name} was {stored[name]} when it was compacted, and is {getattr(config, name)}")
    model = build(stored["architecture"], tensors)
    model = model.to(memory_format=memory_format(config))
    return Network(config, model, None, compacted=dict(stored), several=several)


@torch.no_grad()
def settle_pruned(pruner: Pruner) -> None:
    """Put the running statistics of pruned filters where training would bring them.

    A pruned filter's output is its bias, or 0, without variance: batch norm makes its own bias of it in train mode, and
    in eval mode only when its running statistics have forgotten what the filter did before. To fold the constants of
    eval mode into a network that is trained on would change what the layers behind were trained with.
    """
    norms = following_batchnorms(pruner.model)
    for name, layer in pruner.layers.items():
        norm = norms.get(name)
        if norm is None or norm.running_mean is None or norm.running_var is None:
            continue
        pruned = ~(layer.mask if layer.mask.dim() == 1 else layer.mask.flatten(1).any(1))
        output = layer.bias if layer.bias is not None else torch.zeros_like(norm.running_mean)
        norm.running_mean.copy_(torch.where(pruned, output, norm.running_mean))
        norm.running_var.masked_fill_(pruned, 0)
