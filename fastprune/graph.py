"""The graph of a model: what it computes, as a list of ordinary modules and functions."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional

from .nn import MaskedConv2d
from .scatter import Scatter
from .stochastic_depth import is_stochastic_depth, stochastic_depth

__all__ = ["shape", "trace"]

_DROPOUTS: dict[Any, type[nn.Module]] = {
    functional.dropout: nn.Dropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
    functional.alpha_dropout: nn.AlphaDropout,
    functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Functions that a layer is made of, when what they read besides the input is the layer's own.
_LAYERS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    functional.linear: (nn.Linear, ("weight", "bias")),
    functional.layer_norm: (nn.LayerNorm, ("normalized_shape", "weight", "bias", "eps")),
}

# A builtin, which has no signature of its own.
_LINEAR = inspect.signature(lambda input, weight, bias=None: None)


def trace(model: nn.Module, example_input: Tensor | tuple[Any, ...] | None = None) -> fx.GraphModule:
    """Return the graph of ``model``: a ``GraphModule`` that computes the same, in train mode and in eval mode.

    It is made of modules of ``torch.nn``, :class:`MaskedConv2d`, ``Scatter``, ``torchvision.ops.StochasticDepth``,
    functions, methods of tensors, and parameters. Modules keep their names, so that its ``state_dict`` is the model's
    but for what the forward does not use. What belongs together is put together: a BatchNorm with an activation of its
    own becomes a BatchNorm and an activation (``<name>_act``), a function of a layer's own parameters that layer, a
    function of dropout a module, timm's ``DropPath`` a ``StochasticDepth``. ``Identity`` and assertions are left out,
    and arguments with a default are settled at it. Hooks are not part of it.

    Args:
        model: not changed. Parameters and buffers are shared with it, not copied, and so are modules.
        example_input: if given, every node has the shape of its result, see :func:`shape`. A tensor or a tuple of
            positional inputs; nothing is computed.

    Raises:
        ValueError: if the forward decides by values, or does other things in train mode than in eval mode.
    """
    graphs = []
    for training in (True, False):
        with _mode(model, training):
            graphs.append(_Rewriter(model).traced)
    _must_agree(*graphs)
    traced = graphs[1]
    traced.train(model.training)
    for name, module in model.named_modules():
        if name in (own := dict(traced.named_modules())):
            own[name].training = module.training
    if example_input is not None:
        inputs = example_input if isinstance(example_input, tuple) else (example_input,)
        with _mode(traced, False), torch.no_grad():
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in inputs]
            ShapeProp(traced, fake_mode=mode).propagate(*fake)
    return traced


def shape(node: fx.Node) -> torch.Size | None:
    """The shape of a node's result, if that is one tensor and the graph was traced with an example input."""
    found = getattr(node.meta.get("tensor_meta"), "shape", None)
    return found if isinstance(found, torch.Size) else None


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, was in before.items():
            module.training = was


class _Tracer(fx.Tracer):
    """Goes into every module but those of torch.nn and the few whose own forward asks for ``training``."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether ``m`` becomes one node."""
        own = isinstance(m, (MaskedConv2d, Scatter)) or is_stochastic_depth(m) or _is_drop_path(m) or _has_activation(m)
        return own or super().is_leaf_module(m, module_qualified_name)


def _is_drop_path(module: nn.Module) -> bool:
    return type(module).__name__ == "DropPath" and hasattr(module, "drop_prob")


def _has_activation(module: nn.Module) -> bool:
    """Whether it is a BatchNorm with dropout and an activation behind it, as timm's."""
    return isinstance(module, _NORMS) and [name for name, _ in module.named_children()] == ["drop", "act"]


class _Rewriter:
    """Traces a model in the mode it is in, and makes ordinary modules of what is written in other ways."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        defaults = {
            p.name: p.default for p in inspect.signature(model.forward).parameters.values() if p.default is not p.empty
        }
        try:
            graph = _Tracer().trace(model, concrete_args=defaults or None)
        except Exception as error:  # the model's own code runs: anything may come
            raise ValueError(
                f"{type(model).__name__} cannot be traced (torch.fx), its forward must not decide by the values or "
                f"shapes of tensors nor loop over them: {type(error).__name__}: {error}"
            ) from error
        self.graph = graph
        self.traced = fx.GraphModule(model, graph, type(model).__name__)
        for node in list(graph.nodes):
            self._rewrite(node)
        graph.eliminate_dead_code()
        for node in list(graph.nodes):  # what was settled at its default
            if node.op == "placeholder" and str(node.target).rpartition("_")[0] in defaults and not node.users:
                graph.erase_node(node)
        self.traced.delete_all_unused_submodules()
        graph.lint()
        self.traced.recompile()

    def _rewrite(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._rewrite_module(node, str(node.target), self.modules[str(node.target)])
        elif node.target is torch._assert or getattr(node.target, "__name__", "") == "_assert_is_none":
            self.graph.erase_node(node)
        elif node.op == "call_function" and node.target in _DROPOUTS:
            arguments = _arguments(node)
            module = _DROPOUTS[node.target](arguments["p"], bool(arguments.get("inplace")))
            self._replace(node, self._free_name(node.name), module)
        elif node.op == "call_function" and node.target in _LAYERS:
            self._lift(node)

    def _rewrite_module(self, node: fx.Node, name: str, module: nn.Module) -> None:
        if isinstance(module, nn.Identity):
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.graph.erase_node(node)
        elif _is_drop_path(module):
            if not getattr(module, "scale_by_keep", True):
                raise ValueError(f"{name} is a DropPath that does not scale what it keeps: no StochasticDepth does so")
            rate: Any = module.drop_prob
            self._set(name, stochastic_depth()(float(rate or 0), "row"))
        elif _has_activation(module):
            self._set(name, _plain(module, next(kind for kind in _NORMS if isinstance(module, kind))))
            last = node
            for part, behind in module.named_children():
                if not isinstance(behind, nn.Identity):
                    last = self._append(last, self._free_name(f"{name}_{part}"), behind)

    def _lift(self, node: fx.Node) -> None:
        """Turn a function of a layer's own parameters into the layer."""
        kind, names = _LAYERS[node.target]
        arguments = _arguments(node)
        weight = arguments["weight"]
        name = str(weight.target).rpartition(".")[0] if isinstance(weight, fx.Node) and weight.op == "get_attr" else ""
        module = self.modules.get(name)
        if not isinstance(module, kind):
            return
        for own in names:
            given, expected = arguments[own], getattr(module, own)
            if isinstance(given, fx.Node):
                given, expected = (given.op, given.target), ("get_attr", f"{name}.{own}")
            if given != expected:
                return
        self._replace(node, name, _plain(module, kind))

    def _append(self, node: fx.Node, name: str, module: nn.Module) -> fx.Node:
        self._set(name, module)
        with self.graph.inserting_after(node):
            behind = self.graph.call_module(name, (node,))
        node.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
        return behind

    def _replace(self, node: fx.Node, name: str, module: nn.Module) -> None:
        self._set(name, module)
        with self.graph.inserting_after(node):
            new = self.graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],))
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _free_name(self, name: str) -> str:
        while name in self.modules:
            name += "_"
        return name

    def _set(self, name: str, module: nn.Module) -> None:
        prefix, _, own = name.rpartition(".")
        self.traced.get_submodule(prefix).add_module(own, module)
        self.modules[name] = module


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a function's node by name, defaults too."""
    signature = _LINEAR if node.target is functional.linear else inspect.signature(node.target)  # type: ignore[arg-type]
    bound = signature.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _plain(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """An object of the class ``kind`` with the module's parameters, buffers and settings, without its submodules."""
    plain = kind.__new__(kind)
    nn.Module.__init__(plain)
    settings = set(inspect.signature(kind.__init__).parameters) | set(getattr(kind, "__constants__", ()))
    for name, value in vars(module).items():
        if name in settings or name == "training":
            setattr(plain, name, value)
    for name, parameter in module._parameters.items():
        plain.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        plain.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
    return plain


def _must_agree(trained: fx.GraphModule, tested: fx.GraphModule) -> None:
    ours, theirs = ([_describe(node) for node in traced.graph.nodes] for traced in (trained, tested))
    if ours != theirs:
        first = next((pair for pair in zip(ours, theirs) if pair[0] != pair[1]), ("more", "less"))
        raise ValueError(
            f"{type(tested).__name__} cannot be traced as one graph: its forward asks for `training`, and does "
            f"{first[0]} in train mode where it does {first[1]} in eval mode"
        )


def _describe(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"{node.op} {name}{node.args}{node.kwargs or ''}"
