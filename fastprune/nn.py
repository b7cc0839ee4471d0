"""Convolutions whose weights are masked, and the masked weights that an optimizer keeps ready for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from . import ops
from .onednn import safe_operands
from .ops.checks import DTYPES, same_layout
from .ops.masked_weights import is_transformed


class MaskedConv2d(nn.Conv2d):
    """A ``Conv2d`` that convolves with ``weight ⊙ mask`` and keeps the dense ``weight`` as its parameter.

    Its ``state_dict`` has Conv2d's keys and ``mask``. Made by :func:`mask_convolutions`, which turns the convolutions
    of a model into this class in place: parameters keep their identity, so optimizers made before stay valid.

    What is traced or exported (ONNX, :mod:`torch.export`, ``torch.jit.trace``) is masked, and runs without fastprune.
    But tools that read ``weight`` instead of calling the module see the dense one and forget the mask, such as
    ``timm.utils.reparameterize_model`` and ``torch.utils.mkldnn.to_mkldnn``; and quantizers take no weight that is
    computed. For those, call ``pruner.remove()`` first, or :func:`fastprune.compact`.

    Attributes:
        mask: bool buffer, ``[F]`` (whole filters) or the weight's shape (single weights); True is kept.
        feedback: what multiplies the gradient that pruned filters or weights get; None means 1 (straight-through).
            ``[F]`` float32 for a filter mask; a scalar for a weight mask. See :meth:`fill_feedback`.
        kept: the masked weights that an optimizer writes in its step, see :class:`MaskedWeights`; None where every
            forward masks the weight. Copies of the module have None.
    """

    calls_safe_operands = True  # see onednn.protect

    mask: Tensor
    feedback: Tensor | None
    kept: MaskedWeights | None = None
    _feedback_value: float | None = None  # what feedback was filled with

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        if isinstance(input, Tensor) and input.is_quantized:
            raise TypeError(
                "a masked convolution got a quantized tensor: quantize what fastprune.compact makes of the model, or "
                "quantize the masked model with torch.fx (prepare_fx, prepare_qat_fx)"
            )
        weight = None if self.kept is None else self.kept.of(self)
        if weight is None:
            weight = masked_weight(self.weight, self.mask, self.feedback)
        return self._conv_forward(*safe_operands(input, weight, self.stride), self.bias)

    def fill_feedback(self, value: float) -> None:
        """Set ``feedback`` to one value for all filters or weights.

        It is no part of the ``state_dict``: a model made on the device ``meta`` gets it from here once its weights are
        elsewhere.
        """
        shape = self.mask.shape if self.mask.dim() == 1 else ()
        self.feedback = torch.full(shape, value, dtype=torch.float32, device=self.mask.device)
        self._feedback_value = value

    def _feedback_after(self, was_meta: bool) -> None:
        """Fill feedback again after mask and weight have left the device ``meta``, where it had no value."""
        if was_meta and not self.mask.is_meta and self._feedback_value is not None:
            self.fill_feedback(self._feedback_value)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        was_meta = self.feedback is not None and self.feedback.is_meta
        super()._load_from_state_dict(*arguments)
        self._feedback_after(was_meta)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedConv2d:
        was_meta = self.feedback is not None and self.feedback.is_meta
        super()._apply(fn, recurse)
        self._feedback_after(was_meta)
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            "torch.jit.script cannot take masked convolutions: script what fastprune.compact makes of the model, or "
            "use torch.jit.trace, torch.export or torch.compile"
        )

    def extra_repr(self) -> str:  # noqa: D102
        return f"{super().extra_repr()}, mask={list(self.mask.shape)}"


@fx.wrap  # in a traced model it is one node, which reads the mask as it is when the node runs
def masked_weight(weight: Tensor, mask: Tensor, feedback: Tensor | None) -> Tensor:
    """The masked weight of one convolution in the dtype it computes in; its gradient passes as ``feedback`` says.

    Args:
        weight: ``[F, ...]``, any floating dtype.
        mask: bool, ``[F]`` or the shape of ``weight``; True is kept.
        feedback: as for :class:`MaskedConv2d`.

    Returns:
        A fresh tensor of the shape of ``weight``, in autocast's dtype where autocast is on, else in the weight's.
    """
    dtype = _compute_dtype(weight)
    if mask.dim() == 1 and not (torch.compiler.is_exporting() or torch.jit.is_tracing()):
        # A model moved by .half() takes its float buffers along.
        scale = None if feedback is None else feedback.float()
        return ops.masked_weight(weight, mask, dtype, scale)
    # What is exported has no op of ours, so that ONNX can say it and it runs without fastprune.
    mask, feedback = along_filters(mask, weight), None if feedback is None else along_filters(feedback, weight)
    dropped = torch.where(mask, 0, weight)
    # What is dropped is dropped in value only; its gradient is let through by the share `feedback`.
    if feedback is None:
        return (weight - dropped.detach()).to(dtype)
    through = dropped - dropped.detach()  # 0, with a gradient
    return (torch.where(mask, weight, 0) + through * feedback.to(weight.dtype)).to(dtype)


def along_filters(values: Tensor, weight: Tensor) -> Tensor:
    """``[F]`` shaped to broadcast over the weight; others as they are."""
    return values.view(-1, *[1] * (weight.dim() - 1)) if values.dim() == 1 else values


def _compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that a convolution with this weight computes in now: autocast's, or the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class MaskedWeights:
    """The masked weights of a model's convolutions in static buffers, in each dtype that an optimizer asked for.

    The optimizer writes them in its own pass over the weights (:meth:`writing`), so that the next forward masks
    nothing. A layer whose weight or mask has changed since, by its version counter, masks its weight itself until the
    next step: the buffers may be part of a forward whose backward is still to come, and no forward writes to them.
    They stay where they are in memory: a CUDA graph reads what was written last, in the graph or outside of it.

    Copies and pickles of the model have no such buffers: they mask in the forward.

    Args:
        layers: the convolutions by name, masked by filter, in the order in which their masks are put together.
    """

    def __init__(self, layers: Mapping[str, MaskedConv2d]) -> None:
        self._layers = list(layers.values())
        self._index = WeakKeyDictionary({layer: i for i, layer in enumerate(self._layers)})
        self._buffers: dict[torch.dtype, list[Tensor]] = {}
        # What the buffers of a dtype were made of, layer by layer.
        self._made_of: dict[torch.dtype, list[tuple[State, State]]] = {}
        for layer in self._layers:
            layer.kept = self

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    @property
    def in_use(self) -> bool:
        """Whether the layers read them: not when another pruner has masked the model since."""
        return all(layer.kept is self and layer.mask.dim() == 1 for layer in self._layers)

    def of(self, layer: MaskedConv2d) -> Tensor | None:
        """The layer's masked weight in the dtype it computes in now, with the gradient of :func:`masked_weight`.

        Returns:
            A view of the buffer. None where the layer has to mask by itself: after a change, in another dtype, in a
            replica or a functional call (with weights of their own), for compilers, tracers and function transforms.
        """
        weight, index = layer.weight, self._index.get(layer)
        if index is None or type(weight) is not nn.Parameter or is_transformed():
            return None
        dtype = _compute_dtype(weight)
        if dtype not in self._made_of or self._made_of[dtype][index] != _made_of(layer):
            return None
        feedback = None if layer.feedback is None else layer.feedback.float()
        return ops.masked_weight(weight, layer.mask, dtype, feedback, self._buffers[dtype][index])

    @contextmanager
    def writing(self, dtype: torch.dtype) -> Iterator[list[Tensor]]:
        """Hand out the buffers of a dtype, one for each layer, to be written as by :func:`fastprune.ops.sgd_step_`.

        Afterwards they count as made of the weights and masks as they are then.
        """
        yield self._fitting(dtype)
        self._made_of[dtype] = [_made_of(layer) for layer in self._layers]

    @torch.no_grad()
    def renew(self) -> None:
        """Write all buffers again, where they are.

        Pruners do it when masks change. After other changes (a checkpoint loaded, say) it is for CUDA graphs, whose
        replays notice none.
        """
        weights: list[Tensor] = [layer.weight for layer in self._layers]
        for dtype in list(self._made_of):
            with self.writing(dtype) as buffers:
                mask = torch.cat([layer.mask for layer in self._layers])
                torch._foreach_copy_(buffers, ops.masked_weights(weights, mask, dtype))

    def _fitting(self, dtype: torch.dtype) -> list[Tensor]:
        """The buffers: the same ones as before, unless the weights were moved or laid out anew."""
        buffers = self._buffers.get(dtype)
        if buffers is None or not all(
            buffer.device == layer.weight.device and same_layout(buffer, layer.weight)
            for buffer, layer in zip(buffers, self._layers)
        ):
            buffers = [torch.empty_like(layer.weight, dtype=dtype, requires_grad=False) for layer in self._layers]
            self._buffers[dtype] = buffers
        return buffers


# What tells one state of a tensor from another: the object, its memory, and how often it was written to.
State = tuple[int, int, int]


def state_of(tensor: Tensor) -> State:
    """The state of a tensor. A write through ``.data`` changes it only where it moves the memory."""
    return id(tensor), tensor.data_ptr(), tensor._version


def _made_of(layer: MaskedConv2d) -> tuple[State, State]:
    return state_of(layer.weight), state_of(layer.mask)


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of the device is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def is_listed(name: str, module: nn.Module, entries: Iterable[str | nn.Module]) -> bool:
    """Whether the entries name the module or one that contains it, or hold it or one that contains it."""
    return any(
        (name == entry or name.startswith(f"{entry}."))
        if isinstance(entry, str)
        else any(module is part for part in entry.modules())
        for entry in entries
    )


def listed(argument: str, entries: Iterable[str | nn.Module]) -> list[str | nn.Module]:
    """The entries of an argument such as ``ignore`` as a list.

    Raises:
        TypeError: for a lone name or module, and for an entry that is neither.
    """
    if isinstance(entries, (str, nn.Module)):
        got, lone = (
            (f"the string {entries!r}", repr(entries))
            if isinstance(entries, str)
            else (f"a {type(entries).__name__}", "module")
        )
        raise TypeError(f"{argument} must be a list of names or modules, got {got}; write [{lone}]")
    found = list(entries)
    for entry in found:
        if not isinstance(entry, (str, nn.Module)):
            raise TypeError(f"{argument} must be a list of names or modules, got {entry!r} in it")
    return found


def listed_of(model: nn.Module, argument: str, entries: Iterable[str | nn.Module]) -> list[str | nn.Module]:
    """:func:`listed`, all of them names or modules of the model.

    Raises:
        ValueError: for an entry that is none of it; TypeError as :func:`listed`.
    """
    names, found = dict(model.named_modules()), listed(argument, entries)
    for entry in found:
        if (entry not in names) if isinstance(entry, str) else all(entry is not module for module in names.values()):
            shown = repr(entry) if isinstance(entry, str) else f"a {type(entry).__name__}"
            raise ValueError(f"{argument}: {shown} is no module of this model")
    return found


def mask_convolutions(
    model: nn.Module,
    ignore: Iterable[str | nn.Module] = (),
    by_weight: bool = False,
    include: Iterable[str | nn.Module] | None = None,
) -> dict[str, MaskedConv2d]:
    """Turn every ``Conv2d`` of ``model`` into a :class:`MaskedConv2d` in place, with nothing pruned yet.

    No hook is added: each masks its own weight when it is called, unless an optimizer has done it, as
    :class:`fastprune.optim.PrunedSGD` does with ``masked_dtype``.

    Args:
        model: edited in place, this instance only.
        ignore: names (of a convolution or of a module that contains it) or modules to leave as they are.
        by_weight: masks of the weights' shape instead of one entry per filter.
        include: names or modules, as for ``ignore``, outside of which all is left as it is; None for the whole model.

    Returns:
        The masked convolutions by name, in model order.

    Raises:
        ValueError: if there is no convolution, or if an entry of ``ignore`` or ``include`` names nothing.
        TypeError: if ``ignore`` or ``include`` is no list; if a convolution is of a subclass of ``Conv2d``, whose own
            forward would be lost; if a hook makes its weight, as those of :mod:`torch.nn.utils.prune` do; if it has no
            shape yet, or if its weight has another dtype than float32, float64, bfloat16 and float16.

    After an error the model is as it was.
    """
    ignore = listed_of(model, "ignore", ignore)
    include = None if include is None else listed_of(model, "include", include)
    convolutions = {
        name: module
        for name, module in model.named_modules()
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
        module.kept = None
        found[name] = module
    if not found:
        left_out = any(isinstance(module, nn.Conv2d) for module in model.modules())
        raise ValueError(
            "ignore and include leave no Conv2d to mask" if left_out else "the model has no Conv2d to mask"
        )
    return found


def unmask_(layer: nn.Conv2d) -> None:
    """Make an ordinary convolution of a masked one, in place, with its dense weight; another layer stays as it is."""
    if isinstance(layer, MaskedConv2d):
        for name in ("mask", "feedback"):
            del layer._buffers[name]
        layer._non_persistent_buffers_set.discard("feedback")
        for name in ("kept", "_feedback_value"):
            vars(layer).pop(name, None)
        layer.__class__ = nn.Conv2d  # type: ignore[assignment]


def _check_maskable(name: str, module: nn.Conv2d) -> None:
    name = name or "the model"
    if is_lazy(module.weight):
        raise TypeError(f"{name} has no shape yet: call the model once on an input, then mask it")
    if type(module) not in (nn.Conv2d, MaskedConv2d):
        raise TypeError(
            f"{name} is a {type(module).__name__}, a Conv2d with a forward of its own, which masking would "
            f"replace; list it in ignore"
        )
    if "weight" not in module._parameters:
        raise TypeError(
            f"the weight of {name} is no parameter but made of others by a hook, after masking would "
            f"have read it: fastprune.accelerate converts what torch.nn.utils.prune has masked; list others in ignore"
        )
    if module.weight.dtype not in DTYPES:
        raise TypeError(
            f"the weight of {name} has dtype {str(module.weight.dtype).removeprefix('torch.')}: masked are float32, "
            f"float64, bfloat16 and float16; list others in ignore"
        )
