"""Operations that write to their input, in a traced graph: whoever reads that tensor afterwards reads what was written.

torch.fx records `y.add_(x)` as a node that nobody reads, and `tap` in `tap = a; a += b; f(tap)` as the value before.
Here the readers that come after a writing node are given its result. Memory that is also read under another name, as a
view of it or what it is a view of, is refused.
"""

from __future__ import annotations

import inspect
import operator
from collections import defaultdict
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from .layer_kinds import FUNCTIONS, METHODS, kind_of
from .tracer import asks_for_size, place_of

__all__ = ["redirect_readers"]

# Those that write, and what they do to a number.
_OPERATORS: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "xor")
} | {operator.iand: operator.and_, operator.ior: operator.or_}
# They change what a tensor is, not what is in its memory: its views stay as they were.
_METADATA = {
    *("resize_", "resize_as_", "set_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "swapdims_"),
    *("as_strided_", "rename_", "detach_", "share_memory_"),
}
_SPLITTING = ("chunk", "split", "unbind", "tensor_split", "split_with_sizes")
# What may return its input, or a view of it. Of everything else in the lists of layer_kinds the result is fresh.
_VIEWS = {
    *_SPLITTING,
    *("getitem", "getattr", "narrow", "flatten", "reshape", "view", "permute", "transpose", "movedim", "unsqueeze"),
    *("squeeze", "expand", "expand_as", "contiguous", "type_as", "float", "half", "bfloat16", "double"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
}
_VIEWING_MODULES = (
    *(nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout),
    *(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
)
_OVERLAPPING = {"expand", "expand_as", "broadcast_to", torch.broadcast_to, "as_strided", torch.as_strided, "unfold"}
_FRESH = {id(function): name.rpartition(".")[2] not in _VIEWS for name, function in FUNCTIONS.items()}

# Part of a tensor's memory: the node that made it, and which part of what is taken at each split on the way.
_Path = tuple[tuple[fx.Node, int], ...]
_Place = tuple[fx.Node, _Path]


def redirect_readers(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Give every node that writes to its input the readers of that input that come after it.

    Args:
        graph: edited in place, in the order in which it is executed.
        modules: by name, those that it calls.

    Raises:
        ValueError: naming the place, where the memory that a node writes to is a parameter or a buffer, or is read
            afterwards through another node; and for writes that cannot be followed (``out=``, changes of the shape).
    """
    writers = _Writers(modules)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        target = writers.add(node)
        if target is not None:
            writers.check(node, target, order)
            for user in list(target.users):
                if order[user] > order[node]:
                    user.replace_input_with(target, node)


class _Writers:
    """Follows which nodes share memory, node by node."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.places: dict[fx.Node, frozenset[_Place]] = {}
        self.sharing: defaultdict[fx.Node, list[fx.Node]] = defaultdict(list)  # by the node that made the memory
        self.immutable: set[fx.Node] = set()  # numbers, shapes and tuples
        self.overlapping: set[fx.Node] = set()  # views in which one place of memory is several elements

    def add(self, node: fx.Node) -> fx.Node | None:
        """Take a node in; returns the one whose memory it writes to, if it does."""
        target = self._written(node)
        if self._is_immutable(node):
            self.immutable.add(node)
            # The code that torch.fx writes, `h += 1`, would change the variable for its other readers.
            node.target = _OPERATORS.get(node.target, node.target)
        self.places[node] = self._places_of(node) if target is None else self.places[target]
        for root, _ in self.places[node]:
            self.sharing[root].append(node)
        return target

    def check(self, node: fx.Node, target: fx.Node, order: dict[fx.Node, int]) -> None:
        """Raise if what a node writes is read afterwards under another name, or belongs to the model."""
        for root, _ in self.places[target]:
            if root.op == "get_attr":
                _refuse(node, f"writes to {root.target}, which belongs to the model")
            for other in self.sharing[root]:
                readers = [user for user in other.users if order[user] > order[node] and not asks_for_size(user)]
                if other not in (target, node) and readers and self._overlap(other, target):
                    _refuse(
                        node,
                        f"writes to memory that {readers[0].name} reads afterwards as {other.name}, "
                        f"which is or may be a view of it",
                    )

    def _overlap(self, first: fx.Node, second: fx.Node) -> bool:
        return any(
            root is other and not _are_apart(path, its)
            for root, path in self.places[first]
            for other, its in self.places[second]
        )

    def _places_of(self, node: fx.Node) -> frozenset[_Place]:
        if node in self.immutable and not _is_split(node):
            return frozenset()
        if not self._may_share(node):
            return frozenset({(node, ())})
        found = frozenset(place for source in node.all_input_nodes for place in self.places[source])
        if any(source in self.overlapping for source in node.all_input_nodes) or node.target in _OVERLAPPING:
            self.overlapping.add(node)
        elif node.target is operator.getitem and _is_split(source := node.args[0]) and isinstance(node.args[1], int):
            step: tuple[tuple[fx.Node, int], ...] = ((source, node.args[1]),)  # type: ignore[assignment]
            return frozenset((root, path + step) for root, path in found)
        return found or frozenset({(node, ())})

    def _may_share(self, node: fx.Node) -> bool:
        """Whether the result may be, or be a view of, an input."""
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return kind_of(module) in (None, "StochasticDepth") or isinstance(module, _VIEWING_MODULES)
        if node.op == "call_function":
            return not (_FRESH.get(id(node.target), False) or getattr(node.target, "__name__", "") == "masked_weight")
        if node.op == "call_method":
            return node.target in _VIEWS or node.target not in METHODS
        return False

    def _is_immutable(self, node: fx.Node) -> bool:
        """Whether it is a number, or a tuple: `h += 1` writes to none."""
        if asks_for_size(node) or _is_split(node):
            return True
        if node.op != "call_function" or node.target is getattr:
            return False
        if node.target is operator.getitem and _is_split(node.args[0]):
            return False
        plain = getattr(node.target, "__module__", "") in ("_operator", "operator", "math", "builtins")
        return plain and all(source in self.immutable for source in node.all_input_nodes)

    def _written(self, node: fx.Node) -> fx.Node | None:
        target: Any = node.args[0] if node.args else node.kwargs.get("input")
        if node.op == "call_module":
            if not getattr(self.modules[str(node.target)], "inplace", False):
                return None
            target = node.all_input_nodes[0]
        elif node.op == "call_method":
            name = str(node.target)
            if name in _METADATA:
                _refuse(node, "changes the shape or the nature of a tensor in place")
            if not _is_in_place(name) or not hasattr(Tensor, name):
                return None
        elif node.op == "call_function":
            if node.kwargs.get("out") is not None:
                _refuse(node, "writes to the tensor that out= names")
            if node.target is operator.setitem:
                _refuse(node, "assigns to a part of a tensor")
            if node.target in _OPERATORS:
                if not isinstance(target, fx.Node) or target in self.immutable:
                    return None
            elif not _is_in_place(getattr(node.target, "__name__", "")) and not _asks_in_place(node):
                return None
        else:
            return None
        if isinstance(target, (list, tuple)):
            _refuse(node, "writes to the tensors of a list")
        return target if isinstance(target, fx.Node) else None


def _are_apart(first: _Path, second: _Path) -> bool:
    """Whether two parts were different entries of one split. Of indices from both ends, one cannot tell."""
    return any(
        step is same and part != other and (part < 0) == (other < 0) for step, part in first for same, other in second
    )


def _is_in_place(name: str) -> bool:
    if name.startswith("__"):
        return getattr(operator, name, None) in _OPERATORS
    return name.endswith("_") and not name.endswith("__")


def _is_split(node: Any) -> bool:
    """Whether its result is a tuple of parts that do not overlap."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name in _SPLITTING


def _asks_in_place(node: fx.Node) -> bool:
    """Whether a function of torch.nn.functional is called with ``inplace=True``."""
    if getattr(functional, getattr(node.target, "__name__", ""), None) is not node.target:
        return bool(node.kwargs.get("inplace"))
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a builtin, which has no such argument
        return bool(node.kwargs.get("inplace"))
    return bool(bound.arguments.get("inplace"))


def _refuse(node: fx.Node, what: str) -> NoReturn:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    raise ValueError(
        f"{name} {what}: fastprune cannot follow that; use the form that returns a new tensor instead{place_of(node)}"
    )
