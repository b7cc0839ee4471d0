"""Convolutions whose weights are masked, and how a model masks all of them in one op."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from . import ops


class MaskedConv2d(nn.Conv2d):
    """A ``Conv2d`` that convolves with ``weight ⊙ mask`` and keeps the dense ``weight`` as its parameter.

    Its ``state_dict`` has Conv2d's keys and ``mask``. Made by :func:`mask_convolutions`, which turns the convolutions
    of a model into this class in place: parameters keep their identity, so optimizers made before stay valid.

    Attributes:
        mask: bool buffer, ``[F]`` (whole filters) or the weight's shape (single weights); True is kept.
        feedback: what multiplies the gradient that pruned filters or weights get; None means 1 (straight-through).
            ``[F]`` float32 for a filter mask; a scalar for a weight mask.
    """

    mask: Tensor
    feedback: Tensor | None
    # This forward's masked weight, handed in by the model's hook; None outside of one.
    shared_weight: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        weight = self.shared_weight
        if weight is None:
            weight = _masked([self], _compute_dtype(self.weight))[0]
        return self._conv_forward(input, weight, self.bias)

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, mask={list(self.mask.shape)}"


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _masked(convolutions: list[MaskedConv2d], dtype: torch.dtype) -> list[Tensor]:
    """The masked weights of convolutions: by one op where all are masked by filter, else one by one."""
    if all(conv.mask.dim() == 1 for conv in convolutions):
        weights: list[Tensor] = [conv.weight for conv in convolutions]
        mask = torch.cat([conv.mask for conv in convolutions]) if len(convolutions) > 1 else convolutions[0].mask
        feedback = _joint_feedback(convolutions)
        written = _written_for(convolutions, dtype)
        if written:
            return ops.written_masked_weights(weights, written, mask, feedback)
        return ops.masked_weights(weights, mask, dtype, feedback)
    masked = []
    for conv in convolutions:
        weight, mask = conv.weight, _beside_weights(conv.mask)
        dropped = torch.where(mask, 0, weight)
        # What is dropped is dropped in value only; its gradient is let through by the share `feedback`.
        if conv.feedback is None:
            kept = weight - dropped.detach()
        else:
            through = dropped - dropped.detach()  # 0, with a gradient
            kept = torch.where(mask, weight, 0) + through * _beside_weights(conv.feedback).to(weight.dtype)
        masked.append(kept.to(dtype))
    return masked


def _beside_weights(vector: Tensor) -> Tensor:
    """``[F]`` as ``[F, 1, 1, 1]``; anything else as it is."""
    return vector.view(-1, 1, 1, 1) if vector.dim() == 1 else vector


def _joint_feedback(convolutions: list[MaskedConv2d]) -> Tensor | None:
    """``[N]`` float32 of convolutions masked by filter, 1 where one has None; None if all have."""
    if all(conv.feedback is None for conv in convolutions):
        return None
    parts = [torch.ones_like(x.mask, dtype=torch.float32) if x.feedback is None else x.feedback for x in convolutions]
    return torch.cat(parts).float()  # a model moved by .half() takes its float buffers along


# By convolution, what an optimizer wrote for its next forward, and the state of the weight and mask it was made of.
_written: WeakKeyDictionary[MaskedConv2d, tuple[Tensor, tuple[int, ...]]] = WeakKeyDictionary()


def take_masked_weights(convolutions: Iterable[MaskedConv2d], masked: Sequence[Tensor]) -> None:
    """Take the masked weights as they are now, so that the next forward in their dtype need not make them.

    They serve until a weight or a mask changes, which its version counter tells (a write through ``.data`` it does not
    see). A compiled forward makes its own.

    Args:
        convolutions: masked by filter.
        masked: one for each, as :func:`fastprune.ops.sgd_step_` writes them. Not copied.
    """
    for conv, tensor in zip(convolutions, masked, strict=True):
        _written[conv] = tensor, _state(conv)


def _state(conv: MaskedConv2d) -> tuple[int, ...]:
    return tuple(part for x in (conv.weight, conv.mask) for part in (id(x), x.data_ptr(), x._version))


def _written_for(convolutions: list[MaskedConv2d], dtype: torch.dtype) -> list[Tensor]:
    """The masked weights that an optimizer wrote, if they are still right for all of these; else none."""
    if torch.compiler.is_compiling():
        return []
    found = []
    for conv in convolutions:
        tensor, state = _written.get(conv, (None, None))
        if tensor is None or tensor.dtype != dtype or state != _state(conv):
            return []
        found.append(tensor)
    return found


def _share_masked_weights(model: nn.Module, _: Any) -> None:
    convolutions = [module for module in model.modules() if isinstance(module, MaskedConv2d)]
    if convolutions:
        weights = _masked(convolutions, _compute_dtype(convolutions[0].weight))
        for conv, weight in zip(convolutions, weights):
            conv.shared_weight = weight


def _forget_masked_weights(model: nn.Module, _: Any, __: Any) -> None:
    for module in model.modules():
        if isinstance(module, MaskedConv2d):
            module.shared_weight = None


def is_listed(name: str, module: nn.Module, entries: Iterable[str | nn.Module]) -> bool:
    """Whether the entries name the module or one that contains it, or hold it or one that contains it."""
    return any(
        (name == entry or name.startswith(f"{entry}."))
        if isinstance(entry, str)
        else any(module is part for part in entry.modules())
        for entry in entries
    )


def mask_convolutions(
    model: nn.Module,
    ignore: Iterable[str | nn.Module] = (),
    by_weight: bool = False,
    include: Iterable[str | nn.Module] | None = None,
) -> dict[str, MaskedConv2d]:
    """Turn every ``Conv2d`` of ``model`` into a :class:`MaskedConv2d` in place, with nothing pruned yet.

    The model's forward masks all of them in one op. Convolutions used on their own, outside of it, mask themselves.

    Args:
        model: edited in place, this instance only.
        ignore: names (of a convolution or of a module that contains it) or modules to leave as they are.
        by_weight: masks of the weights' shape instead of one entry per filter.
        include: names or modules, as for ``ignore``, outside of which all is left as it is; None for the whole model.

    Returns:
        The masked convolutions by name, in model order.

    Raises:
        ValueError: if there is no convolution, or if an entry of ``ignore`` or ``include`` names nothing.
        TypeError: if a convolution is of a subclass of ``Conv2d``, whose own forward would be lost, or if a hook makes
            its weight, as those of :mod:`torch.nn.utils.prune` do. Nothing is changed then.
    """
    names = dict(model.named_modules())
    ignore, include = list(ignore), None if include is None else list(include)
    for argument, entries in (("ignore", ignore), ("include", include or [])):
        for entry in entries:
            if (entry not in names) if isinstance(entry, str) else (entry not in names.values()):
                raise ValueError(f"{argument}: {entry!r} is no module of this model")
    convolutions = {
        name: module
        for name, module in names.items()
        if isinstance(module, nn.Conv2d)
        and not is_listed(name, module, ignore)
        and (include is None or is_listed(name, module, include))
    }
    for name, module in convolutions.items():
        _check_maskable(name, module)
    found: dict[str, MaskedConv2d] = {}
    for name, module in convolutions.items():
        module.__class__ = MaskedConv2d
        assert isinstance(module, MaskedConv2d)
        shape = module.weight.shape if by_weight else module.weight.shape[:1]
        module.register_buffer("mask", torch.ones(shape, dtype=torch.bool, device=module.weight.device))
        module.register_buffer("feedback", None, persistent=False)
        found[name] = module
    if not found:
        raise ValueError("the model has no Conv2d to mask")
    if _share_masked_weights not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_share_masked_weights)
        model.register_forward_hook(_forget_masked_weights, always_call=True)
    return found


def _check_maskable(name: str, module: nn.Conv2d) -> None:
    if type(module) not in (nn.Conv2d, MaskedConv2d):
        raise TypeError(
            f"{name} is a {type(module).__name__}, a Conv2d with a forward of its own, which masking would "
            f"replace; list it in ignore"
        )
    if "weight" not in module._parameters:
        raise TypeError(
            f"the weight of {name or 'the model'} is no parameter but made of others by a hook, after masking would "
            f"have read it: fastprune.accelerate converts what torch.nn.utils.prune has masked; list others in ignore"
        )


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, MaskedConv2d) or super().is_leaf_module(m, module_qualified_name)


def following_batchnorms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The BatchNorm that reads each convolution's output, by the convolution's name.

    Read off the graph of the model (torch.fx). A model that cannot be traced is read in the order its modules are
    registered, with a warning: the next BatchNorm of as many channels, if no other convolution comes first.
    """
    modules = dict(model.named_modules())
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's code: anything may come
        warnings.warn(
            f"the model cannot be traced ({error}): "
            f"the BatchNorm behind each convolution is taken from the modules' order",
            stacklevel=3,
        )
        return _batchnorms_in_order(modules)
    found = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            for user in node.users:
                after = modules.get(user.target) if user.op == "call_module" else None
                if isinstance(after, nn.BatchNorm2d):
                    found[node.target] = after
    return found


def _batchnorms_in_order(modules: dict[str, nn.Module]) -> dict[str, nn.BatchNorm2d]:
    found: dict[str, nn.BatchNorm2d] = {}
    last: tuple[str, nn.Conv2d] | None = None
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            last = (name, module)
        elif isinstance(module, nn.BatchNorm2d) and last and module.num_features == last[1].out_channels:
            found[last[0]] = module
            last = None
    return found
