"""A network as JSON: its modules by kind and arguments, and its graph. Built again, nothing of it is executed.

Whoever wrote a description may be hostile. Modules, functions, methods and strings come from the lists of layer_kinds,
names are names, numbers are finite and in range, and memory is taken only for tensors that are there already: modules
are made without any (on the device `meta`). What is built takes at most 400 bytes of memory for each of the description
(an empty list in an argument), 100 where layers are small, and a time that grows with its length.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from .channel_rules import is_followed
from .graph import TAKEN
from .inputs import KEY
from .layer_kinds import ATTRIBUTES, DTYPES, FUNCTIONS, METHODS, MODULES, WORDS, is_number, kind_of
from .nn import MaskedConv2d, mask_convolutions
from .scatter import Scatter

__all__ = ["ArchitectureError", "build", "describe", "tensors_of"]

_MOST = 100_000  # nodes, and modules
_DEEPEST = 20  # lists in lists, modules in modules
_LONGEST = 64  # characters of a node's name
_PART = re.compile(r"[A-Za-z0-9_-]{1,200}")  # no quotes: names become code of the graph
_FUNCTION_NAMES = {function: name for name, function in reversed(FUNCTIONS.items())}


class ArchitectureError(ValueError):
    """A network that cannot be described, or a description of none; the message says what is wrong with it."""


def tensors_of(network: nn.Module) -> dict[str, Tensor]:
    """Return its parameters and all its buffers, those too that a state_dict leaves out."""
    parameters = network.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(network.named_buffers(remove_duplicate=False))}


# ------------------------------------------------------------------------------------------------ to JSON


def describe(network: fx.GraphModule) -> dict[str, Any]:
    """Return the network, without its tensors, as values that JSON can hold.

    Raises:
        ArchitectureError: naming a part that is not in the lists of layer_kinds.
    """
    modules: dict[str, Any] = {}
    attributes: dict[str, str] = {}
    numbers: dict[fx.Node, int] = {}
    nodes: list[list[Any]] = []
    for node in network.graph.nodes:
        target = node.target
        if node.op == "call_module":
            modules.setdefault(str(target), _describe_module(str(target), network.get_submodule(str(target))))
        elif node.op == "get_attr":
            attributes[str(target)] = _describe_attribute(network, str(target))
        elif node.op == "call_function":
            target = _FUNCTION_NAMES.get(target)
            if target is None:
                raise ArchitectureError(f"it calls {_name(node.target)}, which no saved network may; {_LISTS}")
        elif node.op == "call_method" and target not in METHODS:
            raise ArchitectureError(f"it calls the tensor's method {target}, which no saved network may; {_LISTS}")
        place = f"{node.op} {node.name}"
        args = [] if node.op == "placeholder" else [_encode_argument(node, arg, numbers, place) for arg in node.args]
        kwargs = {name: _encode(value, numbers, place) for name, value in node.kwargs.items()}
        numbers[node] = len(nodes)
        nodes.append([node.op, target, args, kwargs])
    # One that is part of a module is made with it.
    free = {name: kind for name, kind in attributes.items() if name.rpartition(".")[0] not in modules}
    return {"modules": modules, "attributes": free, "nodes": nodes}


_LISTS = "the lists are in fastprune.layer_kinds"


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', function)}"


def _describe_module(path: str, module: nn.Module) -> list[Any]:
    name = kind_of(module)
    if name is None:
        own = f"{type(module).__module__}.{type(module).__qualname__}"
        raise ArchitectureError(f"{path} is a {own}, which no saved network may have; {_LISTS}")
    if not is_followed(module):
        raise ArchitectureError(f"{path} has a hook, or a forward of its own, which cannot be saved: remove it first")
    kind = MODULES[name]
    arguments = kind.read(module)
    if wrong := kind.wrong(arguments):
        settings = ", ".join(f"{argument}={arguments.get(argument)!r}" for argument in wrong)
        raise ArchitectureError(f"{path} is a {name} with {settings}, which cannot be saved")
    found, expected = (sorted(_tensor_names(each)) for each in (module, _make(name, arguments)))
    if found != expected:
        raise ArchitectureError(f"{path} is a {name} with {found}, where one of its kind has {expected}")
    return [name, {argument: _plain(value) for argument, value in arguments.items()}]


def _tensor_names(module: nn.Module) -> set[str]:
    """What a module of its kind has, whether it is masked or not."""
    return tensors_of(module).keys() - {"mask", "feedback"}


def _plain(value: Any) -> Any:
    return {"tuple": list(value)} if isinstance(value, tuple) else value


def _describe_attribute(network: nn.Module, path: str) -> str:
    prefix, _, name = path.rpartition(".")
    owner = network.get_submodule(prefix)
    if not isinstance(getattr(owner, name), Tensor):
        raise ArchitectureError(f"it reads {path}, which is no parameter or buffer")
    return "parameter" if name in owner._parameters else "buffer"


def _encode_argument(node: fx.Node, value: Any, numbers: Mapping[fx.Node, int], place: str) -> Any:
    """As _encode, and the key of a dict where one is asked for it."""
    is_key = node.target is operator.getitem and _is_key(value)
    return {"key": value} if is_key else _encode(value, numbers, place)


def _encode(value: Any, numbers: Mapping[fx.Node, int], place: str) -> Any:
    kind = type(value)
    if isinstance(value, fx.Node):
        return {"node": numbers[value]}
    if value is None or kind is bool or (kind in (int, float) and is_number(value)) or (kind is str and value in WORDS):
        return value
    if isinstance(value, (tuple, torch.Size)):
        return {"tuple": [_encode(entry, numbers, place) for entry in value]}
    if isinstance(value, list):
        return [_encode(entry, numbers, place) for entry in value]
    if kind is slice:
        return {"slice": [_encode(entry, numbers, place) for entry in (value.start, value.stop, value.step)]}
    if kind is torch.dtype and value in DTYPES.values():
        return {"dtype": str(value).removeprefix("torch.")}
    if value is ...:
        return {"ellipsis": True}
    if isinstance(value, dict) and all(map(_is_key, value)):
        return {"dict": {key: _encode(entry, numbers, place) for key, entry in value.items()}}
    raise ArchitectureError(f"{place} has the argument {value!r}, which cannot be saved")


def _is_key(value: Any) -> bool:
    return type(value) is str and KEY.fullmatch(value) is not None


# ---------------------------------------------------------------------------------------------- from JSON


def build(description: Any, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Return the network of a description, in eval mode, with these tensors (not copied).

    Raises:
        ArchitectureError: for whatever `describe` does not write, and tensors that do not fit.
    """
    try:
        return _build(description, tensors)
    except ArchitectureError:
        raise
    except Exception as error:  # constructors say in many ways that their arguments do not fit together
        raise ArchitectureError(f"its parts do not fit together: {type(error).__name__}: {str(error)[:300]}") from error


def _build(description: Any, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    modules, attributes, nodes = (
        _field(description, name, kind) for name, kind in (("modules", dict), ("attributes", dict), ("nodes", list))
    )
    if max(len(modules), len(attributes), len(nodes)) > _MOST:
        raise ArchitectureError(f"it has more than {_MOST:,} parts")
    if _size(nodes) > 10 * _MOST:
        raise ArchitectureError(f"its graph has more than {10 * _MOST:,} values")
    _check_paths([*modules, *attributes])
    parts: dict[str, Any] = {path: _read_module(path, entry) for path, entry in modules.items()}
    for path, kind in attributes.items():
        if path not in tensors or kind not in ("parameter", "buffer"):
            raise ArchitectureError(f"{path} is no tensor of the file")
        parts[path] = _parameter(tensors[path]) if kind == "parameter" else tensors[path]
    network = fx.GraphModule(parts, _read_graph(nodes, parts), "Network")
    network.graph.lint()
    _fill(network, tensors, [path for path, entry in modules.items() if entry[0] == "MaskedConv2d"])
    return network.eval()


def _field(description: Any, name: str, kind: type) -> Any:
    if not isinstance(description, dict) or not isinstance(description.get(name), kind):
        raise ArchitectureError(f"its description has no {name}")
    return description[name]


def _size(value: Any) -> int:
    """How many values there are in a tree of JSON."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_size, entries))


def _check_paths(paths: list[str]) -> None:
    """Refuse what is no name of a module, and more containers, which cost memory, than any network has."""
    containers: set[str] = set()
    for path in paths:
        parts = path.split(".")
        if len(parts) > _DEEPEST or any(not _PART.fullmatch(p) or p.startswith("__") or p in TAKEN for p in parts):
            raise ArchitectureError(f"{path[:100]!r} cannot be the name of a module")
        containers.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    if len(containers) > 4 * len(paths) + _DEEPEST:
        raise ArchitectureError(f"its {len(paths):,} parts are in {len(containers):,} others")


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


def _make(kind: str, arguments: dict[str, Any]) -> nn.Module:
    is_masked = kind == "MaskedConv2d"
    with torch.device("meta"):
        module = (nn.Conv2d if is_masked else MODULES[kind].make)(**arguments)
    if is_masked:
        mask_convolutions(module)
    return module


def _read_module(path: str, entry: Any) -> nn.Module:
    if not isinstance(entry, list) or len(entry) != 2 or type(entry[0]) is not str or not isinstance(entry[1], dict):
        raise ArchitectureError(f"{path} is no module")
    kind = MODULES.get(entry[0])
    if kind is None:
        raise ArchitectureError(f"{path} is a {entry[0][:100]!r}, which no saved network may have")
    arguments = {name: _decode(value, []) for name, value in entry[1].items()}
    if wrong := kind.wrong(arguments):
        raise ArchitectureError(f"{path} is a {entry[0]} with a wrong {wrong[0][:100]}")
    return _make(entry[0], arguments)


def _read_graph(nodes: list[Any], parts: dict[str, Any]) -> fx.Graph:
    graph = fx.Graph()
    made: list[fx.Node] = []
    for number, entry in enumerate(nodes):
        if not (isinstance(entry, list) and len(entry) == 4 and type(entry[0]) is type(entry[1]) is str):
            raise ArchitectureError(f"node {number} is none")
        op, target, args, kwargs = entry
        if not isinstance(args, list) or not isinstance(kwargs, dict) or not all(map(_is_identifier, kwargs)):
            raise ArchitectureError(f"node {number} has no arguments")
        if op == "placeholder" and (args or kwargs):
            raise ArchitectureError(f"node {number} is an input with arguments")
        found = _target(op, target, parts)
        if found is None or (made and made[-1].op == "output"):
            raise ArchitectureError(f"node {number}: no saved network may have {op[:50]!r} of {target[:100]!r}")
        read = tuple(_decode_argument(found, arg, made) for arg in args)
        if found is getattr and not (len(read) == 2 and isinstance(read[0], fx.Node) and read[1] in ATTRIBUTES):
            raise ArchitectureError(f"node {number}: getattr is for {' and '.join(sorted(ATTRIBUTES))} of tensors")
        named = {name: _decode(value, made) for name, value in kwargs.items()}
        # A node's name stands wherever it is read: a long one in a few bytes of the description.
        node = graph.create_node(op, found, read, named, target[-_LONGEST:] if len(target) > _LONGEST else None)
        if not node.all_input_nodes and op.startswith("call_"):
            raise ArchitectureError(f"node {number} reads no other node")
        if op == "call_method" and not (read and isinstance(read[0], fx.Node)):
            raise ArchitectureError(f"node {number} calls a method of no tensor")
        made.append(node)
    if not made or made[-1].op != "output":
        raise ArchitectureError("its graph has no output")
    return graph


def _target(op: str, target: str, parts: dict[str, Any]) -> Any:
    """Return what a node calls or reads, None for what it must not."""
    if op == "call_function":
        return FUNCTIONS.get(target)
    if op == "call_module":
        return target if isinstance(parts.get(target), nn.Module) else None
    if op == "get_attr":
        owner, _, name = target.rpartition(".")
        if isinstance(module := parts.get(owner), nn.Module) and name in module._parameters | module._buffers:
            parts[target] = module._parameters.get(name, module._buffers.get(name))
        return target if isinstance(parts.get(target), Tensor) else None
    allowed = {"call_method": target in METHODS, "placeholder": _is_identifier(target), "output": target == "output"}
    return target if allowed.get(op) else None


def _is_identifier(name: str) -> bool:
    return bool(_PART.fullmatch(name)) and name.isidentifier() and not keyword.iskeyword(name) and name != "self"


def _decode_argument(function: Any, value: Any, made: list[fx.Node]) -> Any:
    if function is operator.getitem and type(value) is dict and value.keys() == {"key"} and _is_key(value["key"]):
        return value["key"]
    return _decode(value, made)


def _decode(value: Any, made: list[fx.Node], depth: int = 0) -> Any:
    kind = type(value)
    if depth <= _DEEPEST:
        if value is None or kind is bool or (kind in (int, float) and is_number(value, -(2**63), 2**63 - 1)):
            return value
        if kind is str and value in WORDS:
            return value
        if kind is list:
            return [_decode(entry, made, depth + 1) for entry in value]
        if kind is dict and len(value) == 1:
            ((tag, content),) = value.items()
            if tag == "node" and type(content) is int and 0 <= content < len(made):
                return made[content]
            if tag == "tuple" and type(content) is list:
                return tuple(_decode(entry, made, depth + 1) for entry in content)
            if tag == "dict" and type(content) is dict and all(map(_is_key, content)):
                return {key: _decode(entry, made, depth + 1) for key, entry in content.items()}
            if tag == "slice" and type(content) is list and len(content) == 3:
                return slice(*(_decode(entry, made, depth + 1) for entry in content))
            if tag == "dtype" and type(content) is str and content in DTYPES:
                return DTYPES[content]
            if tag == "ellipsis":
                return ...
    raise ArchitectureError(f"{str(value)[:100]!r} cannot be an argument")


def _fill(network: fx.GraphModule, tensors: Mapping[str, Tensor], masked: list[str]) -> None:
    """Put the tensors in their places, which have to be all there are."""
    modules = dict(network.named_modules())
    optional = {f"{path}.feedback" for path in masked}
    expected = tensors_of(network)
    missing, unknown = expected.keys() - optional - tensors.keys(), tensors.keys() - expected.keys() - optional
    if missing or unknown:
        names = ", ".join(sorted(missing or unknown)[:5])
        raise ArchitectureError(f"tensors {'missing' if missing else 'that belong to no part'}: {names}")
    for path, tensor in tensors.items():
        prefix, _, name = path.rpartition(".")
        if not _fits(name, tensor, expected.get(path), modules[prefix]):
            raise ArchitectureError(
                f"{path} has the shape {list(tensor.shape)} and is {tensor.dtype}, which does not fit"
            )
        module = modules[prefix]
        if name in module._parameters:
            module._parameters[name] = _parameter(tensor)
        else:
            module._buffers[name] = tensor


def _fits(name: str, tensor: Tensor, place: Tensor | None, module: nn.Module) -> bool:
    if isinstance(module, MaskedConv2d) and name == "mask":  # of filters or of single weights
        shapes = [module.weight.shape[:1], module.weight.shape]
        return tensor.dtype is torch.bool and tensor.shape in shapes
    if isinstance(module, MaskedConv2d) and name == "feedback":
        return tensor.is_floating_point() and tensor.shape in [module.weight.shape[:1], torch.Size()]
    if place is None or tensor.shape != place.shape:
        return False
    if isinstance(module, Scatter) and name == "index" and not module.allows(tensor):
        return False
    return tensor.is_floating_point() if place.is_floating_point() else tensor.dtype is place.dtype
