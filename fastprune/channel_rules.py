"""What each known layer and function does to channels; every argument that is not accounted for makes it unknown."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from .channel_state import Analysis, Channels, Read, Sum, Values
from .graph import shape
from .nn import MaskedConv2d
from .onednn import is_protection
from .torchvision_layers import is_frozen_batch_norm, is_stochastic_depth

__all__ = ["FOLLOWED", "is_convolution", "is_depthwise", "is_followed", "is_norm", "is_resized", "result_of"]

# Those that a branch must be spared, for each channel of its stream, to be worth a Scatter.
MULTIPLICATIONS_PER_CHANNEL = 32

_CONVOLUTIONS = (nn.Conv2d, MaskedConv2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
)
# In eval mode, or always, what they do to a constant is nothing.
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout)
_POOLS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def _every_form(names: str, *spaces: Any) -> set[Any]:
    """The functions of these names, and the methods of tensors; also those that write to their input."""
    found: set[Any] = set()
    for name in names.split():
        found |= {getattr(space, own) for space in spaces for own in (name, f"{name}_") if hasattr(space, own)}
        found |= {own for own in (name, f"{name}_") if hasattr(Tensor, own)}
    return found


_ADD: set[Any] = {operator.add, operator.iadd, *_every_form("add", torch)}
_SUBTRACT: set[Any] = {operator.sub, operator.isub, *_every_form("sub", torch)}
_MULTIPLY: set[Any] = {operator.mul, operator.imul, *_every_form("mul", torch)}
# Of one tensor and numbers, each element by itself.
_ELEMENTWISE: set[Any] = {
    *_every_form("relu relu6 silu mish gelu selu elu celu leaky_relu hardswish hardsigmoid hardtanh", functional),
    *_every_form("softplus softsign sigmoid tanh logsigmoid", functional),
    *_every_form("relu sigmoid tanh neg abs exp log sqrt rsqrt square pow clamp erf div true_divide", torch),
    *(operator.neg, operator.pow, operator.truediv, operator.itruediv, "float", "double", "half", "bfloat16"),
    *(_ADD | _SUBTRACT | _MULTIPLY),
}
_IDENTITY: set[Any] = {"contiguous", "clone"}
_MAX_POOLS: dict[Any, inspect.Signature] = {
    functional.max_pool2d: inspect.signature(
        lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: None
    ),
    torch.max_pool2d: inspect.signature(
        lambda input, kernel_size, stride=(), padding=0, dilation=1, ceil_mode=False: None
    ),
    functional.adaptive_max_pool2d: inspect.signature(lambda input, output_size, return_indices=False: None),
}
_MAX_POOL_OPTIONS = ("padding", "dilation", "return_indices")
_CAT: set[Any] = {torch.cat, torch.concat}
_MEAN: set[Any] = {torch.mean, "mean"}
_FLATTEN: set[Any] = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}

# What channels can be followed through, and so removed in front of and behind.
FOLLOWED: frozenset[Any] = frozenset(
    {
        *(*_CONVOLUTIONS, nn.Linear, *_NORMS, *_ELEMENTWISE_MODULES, *_IDENTITIES, *_POOLS, nn.Flatten),
        *("StochasticDepth", "FrozenBatchNorm2d", "size", "shape", functional.adaptive_avg_pool2d),
        *(*_ELEMENTWISE, *_IDENTITY, *_MAX_POOLS, *_CAT, *_MEAN, *_FLATTEN),
    }
)


def result_of(found: Analysis, node: fx.Node) -> Channels | None:
    """The channels of a node's result; None if that is not known, or not a matter of channels one by one."""
    if node.op == "call_module":
        return _module(found, node, found.network.get_submodule(str(node.target)))
    return _function(found, node) if node.op in ("call_function", "call_method") else None


def is_resized(kind: str) -> bool:
    """Whether layers of this name have parameters or statistics per channel, which go with them."""
    return kind in {own.__name__ for own in (*_CONVOLUTIONS, nn.Linear, *_NORMS)} | {"FrozenBatchNorm2d"}


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution that can be made smaller: of the very class, not of a subclass."""
    return type(module) in _CONVOLUTIONS


def is_depthwise(module: nn.Module) -> bool:
    """Whether each channel has a filter of its own."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels > 1


def is_norm(module: nn.Module) -> bool:
    """Whether it is a BatchNorm with running statistics, which is a factor and a term per channel in eval mode."""
    own = type(module) in _NORMS or getattr(module, "is_batch_norm_in_eval_mode", False) or is_frozen_batch_norm(module)
    return bool(own) and module.running_mean is not None and module.running_var is not None


def is_followed(module: nn.Module) -> bool:
    """Whether it computes what its class does: no hook, no forward of its own (see :func:`onednn.protect`)."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    backward = module._backward_hooks or module._backward_pre_hooks
    return "forward" not in vars(module) and not backward and all(map(is_protection, hooks))


# ----------------------------------------------------------------------------------------------------- modules


def _module(found: Analysis, node: fx.Node, module: nn.Module) -> Channels | None:
    """The result of a module; None for one that is not known."""
    if not is_followed(module) or len(node.all_input_nodes) != 1 or len(node.args) + len(node.kwargs) != 1:
        return None
    (input,) = node.all_input_nodes
    source, size = found.results.get(input), shape(input)
    if source is None or size is None:
        return None
    ids, constants, rank = source.ids, source.constants, len(size)
    if is_convolution(module):
        assert isinstance(module, nn.Conv2d)
        return _convolution(found, node, module, source) if (rank, len(ids)) == (4, module.in_channels) else None
    if type(module) is nn.Linear and (rank, len(ids)) == (2, module.in_features):
        found.reads.append(Read(node, source, "bias"))
        return _written(found, found.weights[str(node.target)], module.bias)
    if is_norm(module):
        known = len(ids) == len(module.get_buffer("running_mean"))
        return Channels(ids, _normalised(module, constants)) if known else None
    if type(module) in _ELEMENTWISE_MODULES:
        return Channels(ids, _applied(module, constants))
    if type(module) in _IDENTITIES or is_stochastic_depth(module):
        return source
    if type(module) in _POOLS and rank == 4:
        return _pooled(found, module, source)
    if type(module) is nn.Flatten and module.start_dim == 1 and module.end_dim == -1:
        return _flattened(node, source)
    return None


def _convolution(found: Analysis, node: fx.Node, module: nn.Conv2d, source: Channels) -> Channels:
    weight = found.weights[str(node.target)]
    padded = found.exact and module.padding not in (0, (0, 0), "valid") and module.padding_mode == "zeros"
    if is_depthwise(module):
        own = _written(found, weight, module.bias).constants
        sums = weight.double().flatten(1).sum(1).cpu().numpy()
        bias = np.zeros(len(sums)) if module.bias is None else module.bias.detach().double().cpu().numpy()
        inner = np.where((source.constants == 0) | (not padded), source.constants * sums + bias, np.nan)
        return Channels(source.ids, np.where(np.isnan(own), inner, own))
    found.reads.append(Read(node, source, "padded" if padded else "bias", module.groups))
    return _written(found, weight, module.bias)


def _written(found: Analysis, weight: Tensor, bias: Tensor | None) -> Channels:
    """New channels, those of zero filters constant."""
    zero = (weight.flatten(1) == 0).all(1).cpu().numpy()
    values = np.zeros(len(zero)) if bias is None else bias.detach().double().cpu().numpy()
    return Channels(found.fresh(len(zero)), _finite(np.where(zero, values, np.nan)))


def _normalised(module: Any, constants: Values) -> Values:
    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double()

    mean, var, weight, bias = map(wide, (module.running_mean, module.running_var, module.weight, module.bias))
    given = torch.from_numpy(constants).to(module.running_mean.device)[None]
    return _finite(functional.batch_norm(given, mean, var, weight, bias, False, 0.0, module.eps)[0].cpu().numpy())


def _applied(function: Callable[..., Tensor], constants: Values, *args: Any, **kwargs: Any) -> Values:
    made = function(torch.from_numpy(constants.copy()), *args, **kwargs).double().numpy()
    return _finite(np.where(np.isnan(constants), np.nan, made))


def _finite(constants: Values) -> Values:
    """What is not finite is computed as it was: nothing can be added up with it."""
    return np.where(np.isfinite(constants), constants, np.nan)


def _pooled(found: Analysis, module: Any, source: Channels) -> Channels | None:
    if isinstance(module, nn.MaxPool2d):
        return source if _keeps_constants(module.padding, module.dilation, module.return_indices) else None
    if isinstance(module, nn.AvgPool2d):
        constants, override = source.constants, module.divisor_override
        if override is not None:
            constants = constants * (math.prod(_pair(module.kernel_size)) / override)
        plain = not found.exact or (module.padding in (0, (0, 0)) and not module.ceil_mode)
        # An average counts zeros beyond the border, or leaves them out.
        return Channels(source.ids, constants if plain else np.where(constants == 0, 0.0, np.nan))
    return None if getattr(module, "return_indices", False) else source


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _keeps_constants(padding: Any, dilation: Any, return_indices: Any) -> bool:
    """Whether a constant comes out of a max pool: with gaps and padding, a window may lie beyond the border whole."""
    return return_indices is False and (padding in (0, (0, 0), [0, 0]) or dilation in (1, (1, 1), [1, 1]))


def _flattened(node: fx.Node, source: Channels) -> Channels | None:
    size = shape(node.all_input_nodes[0])
    if size is None or len(size) < 2:
        return None
    each = math.prod(size[2:])
    return Channels(np.repeat(source.ids, each), np.repeat(source.constants, each))


# ------------------------------------------------------------------------------------- functions and methods


def _function(found: Analysis, node: fx.Node) -> Channels | None:
    """The result of a function or method; None for one that is not known."""
    if _asks_for_other_sizes(node):
        return Channels(found.fresh(0), np.zeros(0))  # nothing about channels
    if node.target in _CAT:
        return _concatenated(found, node)
    if len(node.all_input_nodes) == 2 and node.target in _ADD | _SUBTRACT | _MULTIPLY:
        return _combined(found, node)
    source = found.results.get(node.all_input_nodes[0]) if node.all_input_nodes else None
    if source is None:
        return None
    if node.target in _FLATTEN:
        return _reshaped(node, source)
    if len(node.all_input_nodes) != 1:
        return None
    if node.target in _ELEMENTWISE:
        return _elementwise(node, source)
    if node.target in _MEAN:
        return _averaged(node, source)
    if node.target in _IDENTITY:
        return source
    if node.target is functional.adaptive_avg_pool2d:
        return source if len(shape(node.all_input_nodes[0]) or ()) == 4 else None
    if node.target in _MAX_POOLS:
        given = _bound(_MAX_POOLS[node.target], node)
        known = given is not None and len(shape(node.all_input_nodes[0]) or ()) == 4
        asked = {"padding": 0, "dilation": 1, "return_indices": False} | (given or {})
        return source if known and _keeps_constants(*(asked[name] for name in _MAX_POOL_OPTIONS)) else None
    return None


def _bound(signature: inspect.Signature, node: fx.Node) -> dict[str, Any] | None:
    """The arguments by name, with defaults; None if they are others than the signature has."""
    try:
        bound = signature.bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def _asks_for_other_sizes(node: fx.Node) -> bool:
    """Whether it reads the size of a dimension, or of several, that is not that of the channels."""
    rank = len(shape(node.all_input_nodes[0]) or ()) if node.all_input_nodes else 0
    if rank < 2:
        return False
    if node.target == "size":
        asked = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return isinstance(asked, int) and asked % rank != 1
    if node.target is getattr and node.args[1] == "shape":
        return all(
            user.target is operator.getitem
            and isinstance(user.args[1], (int, slice))
            and 1 not in np.atleast_1d(np.arange(rank)[user.args[1]])
            for user in node.users
        )
    return False


def _elementwise(node: fx.Node, source: Channels) -> Channels:
    constants = torch.from_numpy(source.constants.copy())
    args: Any = fx.map_arg(node.args, lambda _: constants)
    kwargs: Any = fx.map_arg(node.kwargs, lambda _: constants)
    function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    made = function(*args, **kwargs).double().numpy()
    return Channels(source.ids, _finite(np.where(np.isnan(source.constants), np.nan, made)))


def _concatenated(found: Analysis, node: fx.Node) -> Channels | None:
    given = _bound(inspect.signature(lambda tensors, dim=0: None), node)
    parts = given["tensors"] if given is not None else None
    if given is None or not isinstance(parts, (list, tuple)) or not all(isinstance(part, fx.Node) for part in parts):
        return None
    rank, sources = len(shape(node) or ()), [found.results.get(part) for part in parts]
    if rank < 2 or not isinstance(given["dim"], int) or given["dim"] % rank != 1:
        return None
    known = [source for source in sources if source is not None]
    if len(known) != len(sources):
        return None
    return Channels(*(np.concatenate([getattr(source, part) for source in known]) for part in ("ids", "constants")))


def _averaged(node: fx.Node, source: Channels) -> Channels | None:
    """A mean over the image."""
    given = _bound(inspect.signature(lambda input, dim=None, keepdim=False, dtype=None: None), node)
    dims = given["dim"] if given is not None else None
    over = set(dims) if isinstance(dims, (list, tuple)) else set()
    rank = len(shape(node.all_input_nodes[0]) or ())
    return source if rank == 4 and over in ({2, 3}, {-1, -2}, {2, -1}, {-2, 3}) else None


def _reshaped(node: fx.Node, source: Channels) -> Channels | None:
    """Everything behind the channels flattened into them."""
    before, after = shape(node.all_input_nodes[0]), shape(node)
    if before is None or after is None or len(before) < 2:
        return None
    if len(after) != 2 or after[0] != before[0] or after[1] != math.prod(before[1:]):
        return None
    if node.target in (torch.flatten, "flatten"):
        given = _bound(inspect.signature(lambda input, start_dim=0, end_dim=-1: None), node)
        return _flattened(node, source) if given is not None and given["start_dim"] in (1, 1 - len(before)) else None
    # A size that is written out would be wrong once channels are gone.
    written = [*node.args[1:], *(value for name, value in node.kwargs.items() if name != "input")]
    sizes = [size for given in written for size in (given if isinstance(given, (list, tuple)) else [given])]
    return _flattened(node, source) if all(map(_is_batch_or_rest, sizes)) else None


def _is_batch_or_rest(size: Any) -> bool:
    """Whether a size of a view stays right when channels go: -1, or that of the batch; 1 of a batch of one."""
    if not isinstance(size, fx.Node):
        return size in (-1, 1)
    if size.target is operator.getitem:
        source = size.args[0]
        return isinstance(source, fx.Node) and source.target is getattr and bool(size.args[1] == 0)
    return size.target == "size" and bool(size.kwargs.get("dim", (*size.args, None)[1]) == 0)


def _combined(found: Analysis, node: fx.Node) -> Channels | None:
    """A sum, a difference or a product of two results."""
    function: Any = np.add if node.target in _ADD else np.subtract if node.target in _SUBTRACT else np.multiply
    operands = [*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs)]
    nodes = [operand for operand in operands if isinstance(operand, fx.Node)]
    if len(node.args) + len(node.kwargs) != 2 or len(nodes) != 2:
        return None
    first, second = (found.results.get(operand) for operand in nodes)
    sizes = [shape(operand) or () for operand in nodes]
    if first is None or second is None or len(sizes[0]) != len(sizes[1]) or len(first.ids) != len(second.ids):
        return None
    constants = _finite(function(first.constants, second.constants))
    if function is np.add and len(sizes[0]) == 4 and sizes[0] == sizes[1]:
        (stream, branch), (node_of_stream, node_of_branch) = (first, second), nodes
        if np.isnan(stream.constants).sum() < np.isnan(branch.constants).sum():
            (stream, branch), (node_of_stream, node_of_branch) = (second, first), nodes[::-1]
        if _pays(found, node_of_branch, branch):
            computed = np.isnan(branch.constants)
            found.unite(stream.ids[computed], branch.ids[computed])
            found.sums[node] = Sum(node_of_stream, node_of_branch, branch)
            return Channels(stream.ids, constants)
    found.unite(first.ids, second.ids)
    if function is np.multiply:  # 0 times whatever it is
        constants = np.where((first.constants == 0) | (second.constants == 0), 0.0, constants)
    return Channels(first.ids, constants)


def _pays(found: Analysis, node: fx.Node, branch: Channels) -> bool:
    """Whether the multiplications that constant channels of a branch cost are worth a :class:`Scatter`.

    What nothing but an addition reads saves them; a Scatter touches every channel of the stream once more.
    """
    constant = int((~np.isnan(branch.constants)).sum())
    if constant in (0, len(branch.ids)):
        return constant > 0
    while len(node.users) == 1 and node.op == "call_module":
        module = found.network.get_submodule(str(node.target))
        (source,) = node.all_input_nodes
        if isinstance(module, nn.Conv2d):
            inputs = np.isnan(found.results[source].constants).sum() if source in found.results else module.in_channels
            each = int(inputs) // module.groups * math.prod(module.kernel_size)
            return constant * each >= MULTIPLICATIONS_PER_CHANNEL * len(branch.ids)
        if not (is_norm(module) or is_stochastic_depth(module) or type(module) in _ELEMENTWISE_MODULES + _IDENTITIES):
            break
        node = source
    return False
