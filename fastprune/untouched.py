"""A model is left as it was: whatever its forward or its hooks set on its modules, or after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

__all__ = ["unchanged_on_error", "untouched"]

_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def untouched(model: nn.Module) -> Iterator[list[str]]:
    """Put back the attributes of all modules when this ends, those that hold lists, dicts and sets with their contents.

    Yields:
        Filled when this ends: the names of the tensors and numbers that were replaced by others. What was None or not
        there before is not counted: it is kept for somebody else to look at.
    """
    before, changed = _Attributes(model), list[str]()
    try:
        yield changed
    finally:
        changed += before.changed()
        before.restore()


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put back the classes and the attributes of all modules if the block raises."""
    before = _Attributes(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise


class _Attributes:
    """Those of all modules of a model as they are now, and their classes."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(path, own, type(own), dict(vars(own)), _contents(own)) for path, own in model.named_modules()]

    def changed(self) -> list[str]:
        """The tensors and numbers that are others by now."""
        found = []
        for path, module, _, attributes, contents in self._modules:
            own = {name: attributes[name] for name in attributes if name != "training"}
            tables = [(own, vars(module)), *((contents[id(attributes[t])][1], attributes[t]) for t in _TABLES)]
            for was, now in tables:
                found += [f"{path}.{name}".lstrip(".") for name in was if _differs(was[name], now.get(name))]
        return found

    def restore(self) -> None:
        for _, module, kind, attributes, contents in self._modules:
            if type(module) is not kind:
                module.__class__ = kind
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
