"""The normalisation behind each convolution of a model that divides by the deviation of a batch or an image."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .graph import trace_as_is

__all__ = ["following_batchnorms"]


def following_batchnorms(model: nn.Module) -> dict[str, _NormBase]:
    """The BatchNorm that reads each convolution's output, by the convolution's name.

    Of every kind, ``SyncBatchNorm`` and subclasses, too, and ``InstanceNorm``: their backward divides by
    ``√(variance + ε)``. That of normalisations with statistics that stay, such as torchvision's ``FrozenBatchNorm2d``,
    does not.

    Read off the graph of the model (torch.fx). A model that cannot be traced is read in the order its modules are
    registered, with a warning: the next BatchNorm of as many channels, if no other convolution comes first.
    """
    try:
        network = trace_as_is(model)
    except ValueError as error:
        warnings.warn(
            f"{error}: the BatchNorm behind each convolution is taken from the modules' order",
            stacklevel=3,
        )
        return _batchnorms_in_order(model)
    modules, found = dict(network.named_modules()), {}
    for node in network.graph.nodes:
        if node.op == "call_module" and isinstance(modules[str(node.target)], nn.Conv2d):
            for user in node.users:
                after = modules.get(str(user.target)) if user.op == "call_module" else None
                if isinstance(after, _NormBase):
                    found[str(node.target)] = after
    return found


def _batchnorms_in_order(model: nn.Module) -> dict[str, _NormBase]:
    found: dict[str, _NormBase] = {}
    last: tuple[str, nn.Conv2d] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last = (name, module)
        elif isinstance(module, _NormBase) and last and module.num_features == last[1].out_channels:
            found[last[0]] = module
            last = None
    return found
