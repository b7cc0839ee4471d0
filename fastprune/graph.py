"""The graph of a model: what it computes, as a list of ordinary modules and functions."""

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from .in_place import redirect_readers
from .inputs import check_placed, told
from .torchvision_layers import stochastic_depth
from .tracer import Settled, Tracer, is_drop_path, place_of, types_told, with_constants
from .untouched import untouched

__all__ = ["TAKEN", "quiet", "read_by_forward", "shape", "trace", "trace_as_is"]

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

TAKEN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))  # what a part's name would hide

# A builtin, which has no signature of its own.
_LINEAR = inspect.signature(lambda input, weight, bias=None: None)


def trace(model: nn.Module, example_input: Any = None) -> fx.GraphModule:
    """Return the graph of ``model``: a ``GraphModule`` that computes the same, in train mode and in eval mode.

    It is made of modules of ``torch.nn``, :class:`MaskedConv2d`, ``Scatter``, torchvision's ``StochasticDepth`` and
    ``FrozenBatchNorm2d``, functions, methods of tensors, parameters and buffers. Modules keep their names, so that its
    ``state_dict`` is the model's but for what the forward does not use. What belongs together is put together: a
    BatchNorm with an activation of its own becomes a BatchNorm and an activation (``<name>_act``), a function of a
    layer's own parameters that layer, a function of dropout a module, timm's ``DropPath`` a ``StochasticDepth``.
    ``Identity`` and assertions are left out. Tensors that the forward makes become buffers, ``_tensor_constant<i>``.
    Operations that write to their input stay; whoever reads that tensor afterwards reads their result.

    Args:
        model: not changed. Parameters and buffers are shared with it, not copied, and so are modules and their hooks.
        example_input: if given, every node has the shape of its result, see :func:`shape`; nothing is computed. A
            tensor, or a tuple of positional inputs, each a tensor or a tuple, list or dict with tensors. The graph
            takes these inputs; one that is no tensor (a flag, None) is settled at that value, and the arguments that
            are not given at their defaults. Without an example all defaults are settled.

    Raises:
        ValueError: if the forward decides by values, does other things in train mode than in eval mode, or writes to
            memory that is read in another way; or if the example is not what it takes.
    """
    settled = Settled(model, example_input)
    check_placed(model, example_input)
    modes = {module: module.training for module in model.modules()}
    graphs = []
    for training in (True, False):
        with _mode(model, training):
            graphs.append(_Rewriter(model, settled).traced)
    _must_agree(*graphs)
    traced = graphs[1]
    traced.train(model.training)
    own = dict(traced.named_modules())
    for name, module in model.named_modules():
        if name in own:
            own[name].training = modes[module]
    for module, was in modes.items():  # those that the graph has under other names
        module.training = was
    if example_input is not None:
        with _mode(traced, False):
            _propagate_shapes(traced, settled)
    return traced


def trace_as_is(model: nn.Module) -> fx.GraphModule:
    """The graph of what ``model`` does in the mode that it is in; see :func:`trace`, which also asks for the other."""
    return _Rewriter(model, Settled(model, None)).traced


def shape(node: fx.Node) -> torch.Size | None:
    """The shape of a node's result, if that is one tensor and the graph was traced with an example input."""
    found = node.meta.get("shape")
    return found if isinstance(found, torch.Size) else None


def read_by_forward(graph: fx.Graph) -> set[str]:
    """The modules whose parameters or buffers the forward reads by itself; "" for the model's own."""
    return {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, was in before.items():
            module.training = was


def _propagate_shapes(traced: fx.GraphModule, settled: Settled) -> None:
    """Let every node know the shape and the dtype of its result. Nothing is computed."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        fake = [pytree.tree_map_only(Tensor, mode.from_tensor, value) for value in settled.examples]
        with untouched(traced), quiet(), mode, torch.no_grad():
            _Shapes(traced).run(*fake)
    except Exception as error:  # layers say in many ways that an input does not fit
        raise ValueError(
            f"{type(settled.model).__name__} does not run on the example input {told(settled.examples)}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """torch prints the traceback of what does not fit, beside raising it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = was


class _Shapes(fx.Interpreter):
    extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"], n.meta["dtype"] = result.shape, result.dtype
        return result


def _has_activation(module: nn.Module) -> bool:
    """Whether it is a BatchNorm with dropout and an activation behind it, as timm's."""
    return isinstance(module, _NORMS) and [name for name, _ in module.named_children()] == ["drop", "act"]


def _is_as_written(module: nn.Module) -> bool:
    """Whether it computes what its class says."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _is_renamed_norm(module: nn.Module) -> bool:
    """Whether it is of a subclass of BatchNorm that computes what BatchNorm does."""
    return isinstance(module, _NORMS) and type(module) not in _NORMS and type(module).forward is _BatchNorm.forward


class _Rewriter:
    """Traces a model in the mode it is in, and makes ordinary modules of what is written in other ways."""

    def __init__(self, model: nn.Module, settled: Settled) -> None:
        self.modules, self.training = dict(model.named_modules()), model.training
        hidden = {*model._modules, *model._parameters, *model._buffers} & TAKEN
        if hidden:
            raise ValueError(
                f"{type(model).__name__} has parts named {', '.join(sorted(hidden))}, which torch.fx's graph modules "
                f"have for themselves: call them otherwise"
            )
        name = type(model).__name__
        try:
            with untouched(model) as changed, types_told(model), torch.enable_grad():
                tracer = Tracer(settled)
                graph = tracer.trace(model)
        except Exception as error:  # the model's own code runs: anything may come
            hint = ", its forward must not decide by the values or shapes of tensors nor loop over them"
            because = hint if isinstance(error, fx.proxy.TraceError) or "Proxy" in str(error) else ""
            raise ValueError(
                f"{name} cannot be traced (torch.fx){because}: {type(error).__name__}: {error}{place_of(error)}"
            ) from error
        if changed:
            raise ValueError(
                f"{name} cannot be traced: its forward sets {', '.join(changed[:3])}, and the graph would not; "
                f"take out of the forward what counts or averages"
            )
        graph._tracer_cls = fx.Tracer  # by which pickles are read
        self.graph = graph
        self.traced = fx.GraphModule(with_constants(model, tracer.constants), graph, type(model).__name__)
        for node in list(graph.nodes):
            self._rewrite(node)
        redirect_readers(graph, self.modules)
        norms = {str(node.target) for node in graph.nodes if self._keeps_statistics(node)}
        graph.eliminate_dead_code()
        lost = norms - {str(node.target) for node in graph.nodes if node.op == "call_module"}
        if lost := lost & read_by_forward(graph):
            raise ValueError(f"{name} cannot be traced: {min(lost)} is called for its statistics alone, which it reads")
        self._forget_what_nobody_reads()
        graph.lint()
        self.traced.recompile()

    def _keeps_statistics(self, node: fx.Node) -> bool:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return isinstance(module, _BatchNorm) and module.track_running_stats

    def _rewrite(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._rewrite_module(node, str(node.target), self.modules[str(node.target)])
        elif node.target is torch._assert or getattr(node.target, "__name__", "") == "_assert_is_none":
            self.graph.erase_node(node)
        elif node.op == "call_function" and node.target in _DROPOUTS:
            arguments = _arguments(node)
            if arguments["training"] is not self.training:  # the other mode's graph has a module here
                return
            module = _DROPOUTS[node.target](arguments["p"], bool(arguments.get("inplace")))
            self._replace(node, self._free_name(node.name), module)
        elif node.op == "call_function" and node.target in _LAYERS:
            self._lift(node)

    def _rewrite_module(self, node: fx.Node, name: str, module: nn.Module) -> None:
        if not _is_as_written(module):
            if is_drop_path(module) or _has_activation(module):
                raise ValueError(f"{name} has a forward hook or a forward of its own, which cannot be taken along")
        elif isinstance(module, nn.Identity):
            node.replace_all_uses_with(node.all_input_nodes[0])
            self.graph.erase_node(node)
        elif is_drop_path(module):
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
        elif _is_renamed_norm(module):
            self._set(name, _plain(module, next(kind for kind in _NORMS if isinstance(module, kind))))

    def _forget_what_nobody_reads(self) -> None:
        self.traced.delete_all_unused_submodules()
        read = {str(node.target) for node in self.graph.nodes if node.op in ("get_attr", "call_module")}
        for path, module in self.traced.named_modules():
            own = f"{path}." if path else ""
            if read.isdisjoint((path, *_containers(path))):  # not part of a module that is called
                for name in [*module._parameters, *module._buffers]:
                    if f"{own}{name}" not in read:
                        delattr(module, name)

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
        new.meta.update(node.meta)
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


def _containers(path: str) -> list[str]:
    """The paths of the modules that a module is in."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


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
    name = f"{type(tested).__name__} cannot be traced as one graph: its forward"
    if ours != theirs:
        first = next((pair for pair in zip(ours, theirs) if pair[0] != pair[1]), ("more", "less"))
        if any("dropout" in text for text in first):
            raise ValueError(f"{name} drops in eval mode, or not in train mode: give dropout training=self.training")
        raise ValueError(
            f"{name} asks for `training`, or draws at random, and does {first[0]} in train mode where it does "
            f"{first[1]} in eval mode"
        )
    for node in tested.graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant"):
            ours_now, theirs_now = (traced.get_buffer(node.target) for traced in (trained, tested))
            if ours_now.dtype != theirs_now.dtype or not torch.equal(ours_now, theirs_now):
                raise ValueError(
                    f"{name} makes a tensor that is another one each time, at random or by mode{place_of(node)}"
                )


def _describe(node: fx.Node) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"{node.op} {name}{node.args}{node.kwargs or ''}"
