"""What a function names, definition by definition: its helpers, the constants, and of a table one entry."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Collection, Iterator
from typing import NamedTuple

from .sources import BY_DEFINITION, Sources


class Use(NamedTuple):
    """A definition that is named; of a table one entry, by its key or by the parameter that holds the key."""

    file: str
    name: str
    key: str = ""
    parameter: str = ""


class Closure(NamedTuple):
    """The texts of definitions, and the files (or names of checks, as `file::name`) that they lead to."""

    texts: frozenset[str]
    files: frozenset[str]


class Function(NamedTuple):
    """A test: its text, what it uses, and which of its arguments are fixtures of the tests."""

    text: str
    uses: frozenset[Use]
    fixtures: frozenset[str]


class Definitions:
    """The definitions of a work tree's tests and checks."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.function = functools.cache(self._function)
        self.closure = functools.cache(self._closure)

    def _function(self, file: str, name: str, parametrised: bool) -> Function:
        """A test; `parametrised` with the decorators that say what it is called with."""
        node = self.sources.python(file).definitions[name][-1]
        if not isinstance(node, ast.FunctionDef):
            raise TypeError(f"{file}: {name} is not a function, so what it depends on is not known")
        node = node if parametrised else _bare(node)
        arguments = [argument.arg for argument in node.args.args]
        fixtures = [use for argument in arguments if (use := self._fixture(file, argument))]
        uses = frozenset([*self._uses(file, node, arguments), *fixtures])
        return Function(ast.unparse(node), uses, frozenset(use.name for use in fixtures))

    def _fixture(self, file: str, name: str) -> Use | None:
        for home in (file, "tests/conftest.py"):
            for node in self.sources.python(home).definitions.get(name, []):
                if node is not _bare(node):
                    return Use(home, name)
        return None

    def _closure(self, start: Use) -> Closure:
        """A definition, all that it uses, and what that uses."""
        texts: set[str] = set()
        files: set[str] = set()
        found, waiting = {start}, [start]
        while waiting:
            use = waiting.pop()
            more: set[Use] = set()
            source = self.sources.python(use.file)
            if not BY_DEFINITION.fullmatch(use.file):
                files |= self.sources.importing(use.file)
            elif use.name in source.definitions:
                for node in source.definitions[use.name]:
                    part, spread = _entry(_bare(node), use.key)
                    texts.add(f"{use.file} {use.name}\n{ast.unparse(part)}")
                    more |= set(self._uses(use.file, part))
                    more |= {each._replace(key=use.key) for other in spread for each in self._uses(use.file, other)}
            elif home := self._home(use.file, use.name):
                more.add(Use(*home, use.key))
            else:
                files.add(use.file)  # a name that nothing here explains
            waiting += more - found
            found |= more
        return Closure(frozenset(texts), frozenset(files))

    def _uses(self, file: str, node: ast.AST, arguments: Collection[str] = ()) -> Iterator[Use]:
        """The definitions that a part of a file names. A table that is only subscripted counts by the entry."""
        names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        stored = {part.id for part in names if isinstance(part.ctx, ast.Store)}
        attributes: dict[int, ast.Attribute] = {}
        keys: dict[int, dict[str, str]] = {}
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute):
                attributes[id(part.value)] = part
            elif isinstance(part, ast.Subscript):
                key = part.slice
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    keys[id(part.value)] = {"key": key.value}
                elif isinstance(key, ast.Name) and key.id in arguments and key.id not in stored:
                    keys[id(part.value)] = {"parameter": key.id}
        for part in names:
            attribute = attributes.get(id(part))
            if home := self._home(file, part.id, attribute.attr if attribute else ""):
                of_module = attribute and home[1] == attribute.attr
                yield Use(*home, **keys.get(id(attribute if of_module else part), {}))

    def _home(self, file: str, name: str, attribute: str = "") -> tuple[str, str] | None:
        """Where a name of a file, or an attribute of a module that it stands for, is defined in this repository."""
        source = self.sources.python(file)
        if name in source.imports:
            return self.sources.target(file, name, attribute)
        return (file, name) if name in source.definitions else None


def _bare(node: ast.stmt) -> ast.stmt:
    """A definition without what pytest alone reads: the parametrisation, whose values count by themselves."""
    if not isinstance(node, ast.FunctionDef):
        return node
    kept = [decorator for decorator in node.decorator_list if not ast.unparse(decorator).startswith("pytest.")]
    if len(kept) == len(node.decorator_list):
        return node
    bare = copy.copy(node)
    bare.decorator_list = kept
    return bare


def _entry(node: ast.stmt, key: str) -> tuple[ast.AST, list[ast.expr]]:
    """The value under a key of a table that is written out, or the tables spread in it that may hold it."""
    table = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
    if not key or not isinstance(table, ast.Dict):
        return node, []
    for name, value in zip(table.keys, table.values):
        if isinstance(name, ast.Constant) and name.value == key:
            return value, []
    spread = [value for name, value in zip(table.keys, table.values) if name is None]
    return (ast.Constant(key), spread) if spread else (node, [])
