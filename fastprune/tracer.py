"""torch.fx's tracer, made to lose nothing: what it would drop without a word is recorded or refused."""

from __future__ import annotations

import inspect
import operator
import re
import traceback
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree as pytree

from .inputs import positional
from .nn import MaskedConv2d
from .scatter import Scatter
from .torchvision_layers import is_frozen_batch_norm, is_stochastic_depth

__all__ = ["Settled", "Tracer", "is_drop_path", "place_of", "with_constants"]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_INPUT = object()


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
    for path, module in model.named_modules():
        if any(map(is_lazy, module._parameters.values())):
            raise ValueError(f"{path or name} has no weights yet (a lazy layer): call the model once on an input first")


class _Proxy(fx.Proxy):
    """Records or refuses what torch.fx would lose without a word; see below for `+=` and its like."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise TypeError(f"the forward sets the attribute {name} of a tensor")
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> NoReturn:
        raise TypeError("the forward assigns to a part of a tensor (x[...] = y): use torch.where, torch.cat or a mask")


def _recorded(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor"):
    setattr(_Proxy, f"__i{_name}__", _recorded(getattr(operator, f"i{_name}")))


class Tracer(fx.Tracer):
    """Goes into every module but those of torch.nn and the few whose own forward asks for ``training``.

    Attributes:
        constants: by name, the tensors that the forward made.
    """

    proxy_buffer_attributes = True  # else what is computed from a buffer would be a constant
    record_stack_traces = True

    def __init__(self, settled: Settled) -> None:
        super().__init__()
        self.settled = settled
        self.constants: dict[str, Tensor] = {}

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
            return self.root.forward(*(next(left) if own is _INPUT else own for own in self.settled.arguments))

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


def is_drop_path(module: nn.Module) -> bool:
    """Whether it is timm's ``DropPath``, or one of the many that are written like it."""
    return type(module).__name__ == "DropPath" and hasattr(module, "drop_prob")


_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


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
