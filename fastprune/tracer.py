"""torch.fx's tracer, made to lose nothing: what it would drop without a word is recorded or refused."""

from __future__ import annotations

import inspect
import operator
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree
from torch.utils import checkpoint

from .inputs import positional
from .nn import MaskedConv2d
from .scatter import Scatter
from .torchvision_layers import is_frozen_batch_norm, is_stochastic_depth

__all__ = ["Settled", "Tracer", "asks_for_size", "is_drop_path", "place_of", "types_told", "with_constants"]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_INPUT = object()
_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class Settled:
    """Which arguments of a model's forward are inputs of the graph, and what the others are.

    Attributes:
        inputs: the names of those that are.
        examples: of each of them, if they were given.
        arguments: of the forward, by position; a mark for each input.
    """

    def __init__(self, model: nn.Module, example_input: Any) -> None:
        _check_traceable(model)
        self.model = model
        self.examples: tuple[Any, ...] = ()
        given = () if example_input is None else positional(example_input)
        parameters = list(inspect.signature(model.forward).parameters.values())
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        extra = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
        needed = [p.name for p in named if p.default is p.empty]
        if given and not len(needed) <= len(given) <= (len(given) if extra else len(named)):
            most = "or more" if extra else f"to {len(named)}" if len(named) > len(needed) else ""
            raise ValueError(
                f"{type(model).__name__} takes {len(needed)} {most + ' ' if most else ''}inputs "
                f"({', '.join(p.name for p in named)}), and example_input has {len(given)}: "
                f"give a tuple with one entry for each"
            )
        names = [p.name for p in named]
        if example_input is None:
            # Of a forward that takes whatever comes, one input.
            self.inputs = needed or ([f"{extra}_0"] if extra else names[:1])
            self.arguments: list[Any] = [_INPUT] * len(self.inputs)
            return
        names += [f"{extra}_{i}" for i in range(len(given) - len(names))]
        self.arguments = [_INPUT if _has_tensors(value) else value for value in given]
        self.examples = tuple(value for value, own in zip(given, self.arguments) if own is _INPUT)
        self.inputs = [name for name, value in zip(names, self.arguments) if value is _INPUT]

    def example_of(self, node: fx.Node) -> Any:
        """The example of an input that is no tensor but holds some; None for any other node."""
        nested = {
            name: value
            for name, value in zip(self.inputs, self.examples, strict=False)
            if not isinstance(value, Tensor)
        }
        return nested.get(str(node.target)) if node.op == "placeholder" else None


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _check_traceable(model: nn.Module) -> None:
    name = type(model).__name__
    if isinstance(model, _WRAPPERS):
        raise ValueError(f"{name} wraps the network: pass its .module")
    if hasattr(model, "_orig_mod"):
        raise ValueError("torch.compile wraps the network: pass its ._orig_mod, and compile what comes of it")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(f"{name} is compiled by torch.jit, which hides its layers: pass the module it was made of")
    if any(getattr(nn.modules.module, hooks) for hooks in ("_global_forward_hooks", "_global_forward_pre_hooks")):
        raise ValueError("a forward hook is registered for all modules, which may do anything: remove it first")
    if type(model).__call__ is not nn.Module.__call__ and not isinstance(model, fx.GraphModule):
        raise ValueError(f"{name} has a __call__ of its own, which torch.fx passes by: put it into its forward")
    for path, module in model.named_modules():
        if any(map(is_lazy, module._parameters.values())):
            raise ValueError(f"{path or name} has no weights yet (a lazy layer): call the model once on an input first")


class _Proxy(fx.Proxy):
    """Records or refuses what torch.fx would lose without a word; see below for `+=` and its like."""

    def __getattr__(self, name: str) -> Any:
        if _example_of(self) is None and not hasattr(Tensor, name):
            raise AttributeError(f"a tensor has no attribute {name}")  # hasattr asks, too
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise TypeError(f"the forward sets the attribute {name} of a tensor")
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TypeError("the forward assigns to a part of a tensor (x[...] = y): use torch.where, torch.cat or a mask")


@contextmanager
def types_told(model: nn.Module) -> Iterator[None]:
    """While a forward is traced, let ``isinstance`` say of a proxy, in the model's own files, what it stands for.

    The name is set in the globals of these files. (Nothing that C code sees may say it of a proxy: PyTorch's reads a
    tensor where there is none.)

    Raises:
        TypeError: for ``torch.is_tensor``, which is not reached so; and out of ``isinstance`` of a size.
    """
    forwards = {type(module).forward for module in model.modules() if inspect.isfunction(type(module).forward)}
    own = [forward for forward in forwards if not forward.__code__.co_filename.startswith(_OURS)]
    if any("is_tensor" in forward.__code__.co_names for forward in own):
        raise TypeError("the forward asks torch.is_tensor, which torch.fx cannot answer: use isinstance(x, Tensor)")
    files = [names for names in {id(f.__globals__): f.__globals__ for f in own}.values() if "isinstance" not in names]
    for names in files:
        names["isinstance"] = _told
    try:
        yield
    finally:
        for names in files:
            del names["isinstance"]


def _told(value: Any, kinds: Any) -> bool:
    if type(value) is not _Proxy or isinstance(value, kinds):
        return isinstance(value, kinds)
    if _is_size(value.node):
        raise TypeError("the forward asks for the type of a size")
    example = _example_of(value)
    return issubclass(Tensor if example is None else type(example), kinds)


def _example_of(proxy: fx.Proxy) -> Any:
    return proxy.tracer.settled.example_of(proxy.node) if isinstance(proxy.tracer, Tracer) else None


def _recorded(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _recorded(getattr(operator, f"i{_name}")))


def _switches() -> tuple[Any, ...]:
    """The state that changes what ops compute, or whether they have gradients."""
    devices = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return torch.is_grad_enabled(), *((kind, torch.get_autocast_dtype(kind)) for kind in devices)


def _is_checkpointed() -> bool:
    """Whether activation checkpointing is at work, which switches gradients off and takes them later, all the same."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != checkpoint.__file__:
        frame = frame.f_back
    return frame is not None


class Tracer(fx.Tracer):
    """Goes into every module but those of torch.nn and the few whose own forward asks for ``training``.

    Attributes:
        constants: by name, the tensors that the forward made.
    """

    proxy_buffer_attributes = True  # else what is computed from a buffer would be a constant
    record_stack_traces = True

    def __init__(self, settled: Settled) -> None:
        super().__init__()
        self.settled, self.switches = settled, _switches()
        self.constants: dict[str, Tensor] = {}

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse what runs in another mode, which is no part of the graph."""
        if _switches() != self.switches and not _is_checkpointed():
            raise ValueError(
                "the forward switches autocast or gradients (torch.autocast, torch.no_grad), which would be lost: "
                "switch them around the model's call, freeze layers by requires_grad_(False)"
            )
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` becomes one node."""
        own = isinstance(m, (MaskedConv2d, Scatter, _BatchNorm)) or is_stochastic_depth(m) or is_frozen_batch_norm(m)
        return own or is_drop_path(m) or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node while the forward runs."""
        return _Proxy(node, self)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The model's own forward, and its inputs; the other arguments are settled."""
        inputs = [self.create_proxy("placeholder", name, (), {}) for name in self.settled.inputs]

        def forward(*proxies: Any) -> Any:
            left = iter(proxies)
            arguments = (next(left) if own is _INPUT else own for own in self.settled.arguments)
            return self.root._call_impl(*arguments)  # with the hooks of the model itself

        forward.__annotations__ = dict(getattr(root_fn, "__annotations__", {}))  # torch.fx keeps that of the result
        return forward, inputs

    def create_arg(self, a: Any) -> Any:
        """Keep tensors that the forward makes here: torch.fx would hang them on the user's model."""
        made_here = isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs
        if made_here and not any(a is buffer for buffer in self.root.buffers()):
            return self.create_node("get_attr", self._name_of(a), (), {})
        return super().create_arg(a)

    def _name_of(self, tensor: Tensor) -> str:
        for name, known in self.constants.items():
            if known is tensor:
                return name
        name = f"_tensor_constant{len(self.constants)}"
        while hasattr(self.root, name):
            name += "_"
        self.constants[name] = tensor
        return name


_SIZES = {"size", "dim", "numel", "stride", "ndimension", "nelement", "element_size", "is_floating_point"}


def asks_for_size(node: fx.Node) -> bool:
    """Whether its result says something of a tensor, and nothing of what is in it."""
    return node.target in _SIZES or (node.target is getattr and node.args[1] in ("shape", "ndim", "dtype", "device"))


def _is_size(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else node
    return isinstance(source, fx.Node) and asks_for_size(source)


def is_drop_path(module: nn.Module) -> bool:
    """Whether it is timm's ``DropPath``, or one of the many that do what it does: drop rows, and scale the others."""
    if type(module).__name__ != "DropPath" or not hasattr(module, "drop_prob"):
        return False
    rate, was = float(module.drop_prob or 0), module.training  # type: ignore[arg-type]
    scaled = getattr(module, "scale_by_keep", True) and rate < 1
    rows, allowed = torch.ones(64, 2, 1, 1), {0.0, 1 / (1 - rate) if scaled else 1.0}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            module.training = True
            dropped = module.forward(rows)
            module.training = False
            return torch.equal(module.forward(rows), rows) and _are_rows_of(dropped, allowed)
    except Exception:  # anything of this name may come
        return False
    finally:
        module.training = was


def _are_rows_of(dropped: Any, allowed: set[float]) -> bool:
    values = dropped[:, 0].flatten()
    near = (values[:, None] - torch.tensor(sorted(allowed))).abs().min(1).values < 1e-6
    return dropped.shape == (64, 2, 1, 1) and torch.equal(dropped[:, 0], dropped[:, 1]) and bool(near.all())


def place_of(what: Exception | fx.Node) -> str:
    """Where in the model's own code an error was raised, or a node comes from; empty if that is not known."""
    if isinstance(what, Exception):
        frames = [(f.filename, f.lineno, f.line) for f in traceback.extract_tb(what.__traceback__)]
    else:
        frames = re.findall(r'File "(.+)", line (\d+), in .*\n\s*(.*)', what.stack_trace or "")
    own = [frame for frame in frames if not frame[0].startswith(_OURS)]
    return " (at {}:{}: {})".format(*own[-1]) if own else ""


def with_constants(model: nn.Module, constants: dict[str, Tensor]) -> nn.Module:
    """A module with the model's contents, and the constants beside them as buffers."""
    holder = nn.Module()
    vars(holder).update({name: value for name, value in vars(model).items() if isinstance(value, Tensor)})
    holder._modules, holder._parameters = model._modules, model._parameters
    holder._buffers = {**model._buffers, **constants}
    holder._non_persistent_buffers_set = model._non_persistent_buffers_set
    holder.training = model.training
    return holder
