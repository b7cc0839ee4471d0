"""Example inputs: a tensor, or a tuple of positional inputs, each a tensor or nested tuples, lists and dicts of them.

Saved networks keep their shapes and dtypes as JSON; see :func:`describe` and :func:`zeros`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["KEY", "check_placed", "describe", "is_described", "one_batch", "positional", "told", "zeros"]

KEY = re.compile(r"[A-Za-z0-9_.-]{1,100}")  # of dicts, in files
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.int8, torch.int16, torch.int32, torch.int64),
    )
}
_MOST_ELEMENTS = 2**28  # of all inputs together
_MOST = 1000  # tensors
_DEEPEST = 8


def positional(example_input: Any) -> tuple[Any, ...]:
    """Return the inputs as a tuple of positional ones: anything but a tuple is a single one.

    Raises:
        ValueError: for what is neither a tensor nor a tuple, list or dict of such, naming its place; flags and numbers
            may stand beside tensors.
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    found = False
    for place, leaf in _leaves(example_input):
        if isinstance(leaf, Tensor):
            found = True
        elif leaf is not None and type(leaf) not in (bool, int, float, str):
            kind = f"{type(leaf).__module__}.{type(leaf).__qualname__}".removeprefix("builtins.")
            raise ValueError(f"{place} is a {kind}: {_EXPECTED}")
    if not found:
        raise ValueError(f"example_input is {_short(example_input)}, without a tensor: {_EXPECTED}")
    return inputs


_EXPECTED = (
    "expected is a tensor, or a tuple of the model's positional inputs, each a tensor or a tuple, list or dict of them"
)


def _leaves(value: Any, place: str = "example_input") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _leaves(entry, f"{place}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for i, entry in enumerate(value):
            yield from _leaves(entry, f"{place}[{i}]")
    else:
        yield place, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def told(value: Any) -> str:
    """Return inputs for people: ``float32 [1, 3, 32, 32] on cpu``, in the braces and brackets that they are in."""
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} {list(value.shape)} on {value.device}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {told(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(told, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner})" if len(value) != 1 else inner
    return _short(value)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_placed(model: nn.Module, example_input: Any) -> None:
    """Make sure that the tensors are where the model is.

    Raises:
        ValueError: naming the one that is not.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    for place, leaf in _leaves(example_input):
        if devices and isinstance(leaf, Tensor) and leaf.device not in devices:
            there = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"{place} is on {leaf.device} and the model on {there}: move it there with .to()")


def one_batch(model: nn.Module, example_input: Any) -> Tensor:
    """Return the example input of a model that takes one tensor ``[B, ...]``: exports and latencies are of no others.

    Raises:
        ValueError: for anything else, or one that is not where the model is.
    """
    if not isinstance(example_input, Tensor) or example_input.dim() == 0:
        given = told(example_input) if example_input is not None else "None"
        raise ValueError(
            f"exports and latencies are of models that take one tensor [B, ...]; the example input is {given}"
        )
    check_placed(model, example_input)
    return example_input


# -------------------------------------------------------------------------------------------------------- in files


def describe(example_input: Any) -> list[Any]:
    """Return the shapes and dtypes of an example input as JSON values, such as :func:`is_described` takes.

    Raises:
        ValueError: for what no file can hold: other dtypes, names or values, too many dimensions or elements.
    """
    several = isinstance(example_input, tuple)
    described = [
        _describe(value, f"example_input[{i}]" if several else "example_input")
        for i, value in enumerate(example_input if several else (example_input,))
    ]
    if not is_described(described):
        raise ValueError(
            f"the example input is {_cut(told(example_input))}: a file holds inputs of at most {_MOST_ELEMENTS:,} "
            f"elements together, in at most {_MOST:,} tensors, nested at most {_DEEPEST} deep; take a smaller batch"
        )
    return described


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:197]}..."


def _describe(value: Any, place: str) -> Any:
    if isinstance(value, Tensor):
        if _name(value.dtype) not in _DTYPES or value.dim() > 8:
            raise ValueError(
                f"{place} is {told(value)}: a file holds inputs of at most 8 dimensions, of {', '.join(_DTYPES)}"
            )
        return {"shape": list(value.shape), "dtype": _name(value.dtype)}
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str or not KEY.fullmatch(key):
                raise ValueError(f"{place} has the key {key!r}: those in a file are strings like {KEY.pattern}")
        return {"dict": {key: _describe(entry, f"{place}[{key!r}]") for key, entry in value.items()}}
    if isinstance(value, (tuple, list)):
        entries = [_describe(entry, f"{place}[{i}]") for i, entry in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": entries}
    raise ValueError(f"{place} is {_short(value)}: a file holds tensors as inputs, in tuples, lists and dicts")


def is_described(described: Any) -> bool:
    """Whether it is what :func:`describe` returns; nothing else is read from a file."""
    if type(described) is not list:
        return False
    shapes = [shape for entry in described for shape in _shapes(entry, 0)]
    if None in shapes or len(shapes) > _MOST:
        return False
    # A size of 0 counts as 1, lest the strides of the others overflow.
    return sum(math.prod(max(n, 1) for n in shape or []) for shape in shapes) <= _MOST_ELEMENTS


def _shapes(entry: Any, depth: int) -> Iterator[list[int] | None]:
    """The shapes in a description; None for what is none."""
    if type(entry) is not dict or depth > _DEEPEST:
        yield None
    elif entry.keys() == {"shape", "dtype"}:
        shape, dtype = entry["shape"], entry["dtype"]
        sound = type(shape) is list and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**31 for n in shape)
        yield shape if sound and type(dtype) is str and dtype in _DTYPES else None
    elif entry.keys() in ({"tuple"}, {"list"}):
        (entries,) = entry.values()
        for inner in entries if type(entries) is list else [None]:
            yield from _shapes(inner, depth + 1)
    elif entry.keys() == {"dict"} and type(entry["dict"]) is dict:
        for key, inner in entry["dict"].items():
            yield from _shapes(inner if KEY.fullmatch(key) else None, depth + 1)
    else:
        yield None


def zeros(described: Any) -> Any:
    """Return zeros of the shapes and dtypes that :func:`describe` wrote, nested as they were."""
    if isinstance(described, list):
        return tuple(map(zeros, described))
    if "shape" in described:
        return torch.zeros(described["shape"], dtype=_DTYPES[described["dtype"]])
    ((kind, entries),) = described.items()
    if kind == "dict":
        return {key: zeros(entry) for key, entry in entries.items()}
    return tuple(map(zeros, entries)) if kind == "tuple" else list(map(zeros, entries))
