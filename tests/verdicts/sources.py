"""The files of a work tree, and what they include or import of it, found by reading them: nothing is imported."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Counted by definition, so that a test, a case or a check beside the others leaves them clean.
BY_DEFINITION = re.compile(r"(tests/(test_\w+|cases|conftest)|fastprune/ops/checks)\.py")
# Which implementation runs is what `make test` tests, with the same cases; a ResNet's shapes are those of its name.
LEFT_OUT = {"fastprune/ops/_backend.py", "fastprune/models/__init__.py"}
# Packages that only hand on names: the name is followed to the file that defines it.
FACADES = {f"{folder}/__init__.py" for folder in ("fastprune", "fastprune/ops", "fastprune/ops/reference", "kernels")}


EXECUTOR = "tests/ptxrun"  # counts whole


class Source:
    """One Python file: its definitions, the names that it imports, and all names that it reads."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self.definitions: dict[str, list[ast.stmt]] = {}
        for node in _statements(self.tree.body):
            for name in _defined(node):
                self.definitions.setdefault(name, []).append(node)
        self.imports = dict(_imported(self.tree))
        self.read = _read(self.tree)


parsed = functools.cache(Source)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _statements([*node.body, *getattr(node, "orelse", [])])


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield node.name
    elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))


def _imported(tree: ast.AST) -> Iterator[tuple[str, tuple[str, str]]]:
    """By the name it gets: (module, the name there, or nothing for the module itself)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname or alias.name.split(".")[0]), (alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, ("." * node.level + (node.module or ""), alias.name)


def _read(tree: ast.AST) -> set[tuple[str, str]]:
    """The names in it, each with the attribute that is taken of it, or nothing."""
    owners = {id(part.value): part.attr for part in ast.walk(tree) if isinstance(part, ast.Attribute)}
    return {(part.id, owners.get(id(part), "")) for part in ast.walk(tree) if isinstance(part, ast.Name)}


class Sources:
    """The files of a work tree, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.text = functools.cache(self._text)
        self.python = functools.cache(lambda file: parsed(self.text(file)))
        self.including = functools.cache(self._including)
        self.importing = functools.cache(self._importing)
        self.digest = functools.cache(lambda file: f"{file} {hashlib.sha256(self._bytes(file)).hexdigest()}")

    def _text(self, file: str) -> str:
        return (self.root / file).read_text()

    def _bytes(self, file: str) -> bytes:
        return (self.root / file).read_bytes()

    def glob(self, *patterns: str) -> set[str]:
        return {str(path.relative_to(self.root)) for pattern in patterns for path in self.root.glob(pattern)}

    def _including(self, file: str) -> frozenset[str]:
        """A source of C++ or CUDA, and what it includes of this repository."""
        found, waiting = set(), [file]
        while waiting:
            file = waiting.pop()
            found.add(file)
            for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', self.text(file), re.MULTILINE):
                path = (self.root / file).parent.joinpath(name).resolve()
                if not path.exists():
                    raise FileNotFoundError(f"{file} includes {name}, and there is no {path}")
                included = str(path.relative_to(self.root.resolve()))
                if included not in found:
                    waiting.append(included)
        return frozenset(found)

    def module(self, name: str, importer: str) -> str | None:
        """The file of a module of this repository as another file names it."""
        level = len(name) - len(name.lstrip("."))
        if level:
            folder = Path(importer).parent.joinpath(*[".."] * (level - 1))
            base = Path(os.path.normpath(folder), *filter(None, name[level:].split(".")))
        elif name.split(".")[:2] == ["fastprune", "kernels"]:
            base = Path("kernels", *name.split(".")[2:])
        else:
            base = Path("" if name.split(".")[0] == "fastprune" else "tests", *name.split("."))
        for file in (f"{base}.py", f"{base}/__init__.py"):
            if (self.root / file).is_file():
                return file
        return None

    def target(self, file: str, name: str, attribute: str) -> tuple[str, str] | None:
        """The file and the name in it that an imported name, or an attribute of an imported module, stands for."""
        module, inner = self.python(file).imports[name]
        if inner:
            submodule = self.module(f"{module}{'' if module.endswith('.') else '.'}{inner}", file)
            found, inner = (submodule, attribute) if submodule else (self.module(module, file), inner)
        else:
            found, inner = self.module(module, file), attribute
        if found in FACADES and inner in self.python(found).imports:
            return self.target(found, inner, "")
        return (found, inner) if found and found not in LEFT_OUT else None

    def _importing(self, file: str) -> frozenset[str]:
        """A Python file, and what it imports of this repository; `file::name` of what counts by definition."""
        found, waiting = set(), [file]
        while waiting:
            file = waiting.pop()
            if file in found or file in FACADES or file.startswith(f"{EXECUTOR}/"):
                continue
            found.add(file)
            source = self.python(file)
            read = {reference for reference in source.read if reference[0] in source.imports}
            read |= {(name, "") for name in source.imports.keys() - {name for name, _ in read}}
            for file_of, name in filter(None, (self.target(file, *reference) for reference in read)):
                if name and BY_DEFINITION.fullmatch(file_of):
                    found.add(f"{file_of}::{name}")
                else:
                    waiting.append(file_of)
            # Host arithmetic that a shim compiles.
            for name in re.findall(r'"(\w+\.cpp)"', source.text):
                found |= self.including(f"tests/{name}")
        return frozenset(found)
