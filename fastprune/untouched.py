"""A model is left as it was, whatever its forward or its hooks set on its modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["untouched"]

_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched(model: nn.Module) -> Iterator[list[str]]:
    """Put back the attributes of all modules when this ends, those that hold lists, dicts and sets with their contents.

    Yields:
        Filled when this ends: the names of the tensors and numbers that were replaced by others. What was None or not
        there before is not counted: it is kept for somebody else to look at.
    """
    before = [(name, module, dict(vars(module)), _contents(module)) for name, module in model.named_modules()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for path, module, attributes, contents in before:
            own = {name: attributes[name] for name in attributes if name != "training"}
            tables = [(own, vars(module)), *((contents[id(attributes[t])][1], attributes[t]) for t in _TABLES)]
            for was, now in tables:
                changed += [f"{path}.{name}".lstrip(".") for name in was if _differs(was[name], now.get(name))]
            vars(module).clear()
            vars(module).update(attributes)
            for container, content in contents.values():
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


def _contents(module: nn.Module) -> dict[int, tuple[Any, Any]]:
    """The lists, dicts and sets among the attributes of a module, with copies of them."""
    return {id(value): (value, value.copy()) for value in vars(module).values() if type(value) in (list, dict, set)}


def _differs(was: Any, now: Any) -> bool:
    if isinstance(was, Tensor):
        return was is not now
    return type(was) in (int, float) and (type(now) is not type(was) or now != was)
