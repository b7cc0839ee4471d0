"""Networks that were masked by other means, turned into fastprune's masked networks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from .nn import MaskedConv2d, mask_convolutions


def accelerate(
    model: nn.Module, mask_name: str = "mask", classes: Iterable[type[nn.Conv2d]] = ()
) -> dict[str, MaskedConv2d]:
    """Convert the masked convolutions of a network in place to fastprune's own.

    Taken are convolutions that :mod:`torch.nn.utils.prune` has reparametrised (``weight_orig``, ``weight_mask``), and
    subclasses of ``Conv2d`` in ``classes`` that convolve with ``weight * mask``. The network computes what it did:
    the same outputs, and the same gradients, which are masked as well. Where all masks are of whole filters, they
    become filter masks; one that is not makes all of them masks of single weights.

    Args:
        model: edited in place. Parameters keep their identity, so optimizers made before stay valid: ``weight_orig``
            becomes ``weight``. Masks stay as they are; a pruner made afterwards starts with nothing pruned.
        mask_name: the buffer beside ``weight`` in which ``classes`` keep their mask, of the weight's shape or ``[F]``.
        classes: convolutions with a forward of their own, which is given up.

    Returns:
        The masked convolutions by name, in model order.

    Raises:
        ValueError: if there is nothing to convert; for masks that are not 0 and 1; for what
            :mod:`torch.nn.utils.prune` has pruned besides weights of ``Conv2d``. Nothing is changed then.
    """
    classes = tuple(classes)
    masks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if prune.is_pruned(module) and any(True for _ in _reparametrised(module)):
            _check_reparametrised(name, module)
            masks[name] = _as_bool(name, module.get_buffer("weight_mask"), module.get_parameter("weight_orig"))
        elif isinstance(module, classes) and isinstance(module, nn.Conv2d):
            if mask_name not in dict(module.named_buffers(recurse=False)):
                raise ValueError(f"{name or 'the model'} ({type(module).__name__}) has no buffer {mask_name!r}")
            masks[name] = _as_bool(name, module.get_buffer(mask_name), module.weight)
    if not masks:
        raise ValueError(
            "the model has no convolution that torch.nn.utils.prune has masked; name those of your own in classes"
        )
    modules = dict(model.named_modules())
    for name in masks:
        _restore(modules[name], mask_name, classes)
    by_filter = all(_is_of_filters(mask) for mask in masks.values())
    layers = mask_convolutions(model, by_weight=not by_filter, include=[modules[name] for name in masks])
    for name, layer in layers.items():
        mask = masks[name]
        layer.mask.copy_(mask.flatten(1)[:, 0] if by_filter else mask)
        # Masked by a product, what is pruned gets no gradient.
        layer.feedback = torch.zeros_like(mask[:, 0, 0, 0] if by_filter else mask.new_zeros(()), dtype=torch.float32)
    return layers


def _reparametrised(module: nn.Module) -> Iterable[str]:
    """The parameters of this very module that torch.nn.utils.prune has replaced."""
    return (name.removesuffix("_orig") for name in module._parameters if name.endswith("_orig"))


def _check_reparametrised(name: str, module: nn.Module) -> None:
    others = [parameter for parameter in _reparametrised(module) if parameter != "weight"]
    if type(module) is not nn.Conv2d or others:
        what = f"the {others[0]}" if others else "the weight"
        raise ValueError(
            f"torch.nn.utils.prune has pruned {what} of {name or 'the model'} ({type(module).__name__}): only weights "
            f"of Conv2d can be converted; make the others permanent first, with torch.nn.utils.prune.remove"
        )


def _as_bool(name: str, mask: Tensor, weight: Tensor) -> Tensor:
    """The mask as bool, of the weight's shape."""
    if mask.shape == weight.shape[:1]:
        mask = mask.view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
    if mask.shape != weight.shape or not ((mask == 0) | (mask == 1)).all():
        raise ValueError(
            f"the mask of {name} must hold 0 and 1 in the shape {list(weight.shape)} of its weight or in "
            f"[{len(weight)}], got {list(mask.shape)} with {mask.double().min():g} to {mask.double().max():g}"
        )
    return mask != 0


def _is_of_filters(mask: Tensor) -> bool:
    rows = mask.flatten(1)
    return bool((rows.all(1) | ~rows.any(1)).all())


def _restore(module: nn.Module, mask_name: str, classes: tuple[type[nn.Conv2d], ...]) -> None:
    """Make an ordinary Conv2d of it, with its dense weight."""
    if "weight_orig" in module._parameters:
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
                del module._forward_pre_hooks[key]
        del module._buffers["weight_mask"], module.__dict__["weight"]
        parameters = module._parameters.copy()
        module._parameters.clear()
        weight = parameters.pop("weight_orig")
        module._parameters.update({"weight": weight, **parameters})
    elif isinstance(module, classes):
        del module._buffers[mask_name]
        module.__class__ = nn.Conv2d
