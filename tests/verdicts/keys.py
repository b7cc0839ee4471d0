"""The key of a test of a GPU kernel: a hash of everything that its verdict depends on.

- the test's own function, its parameters, and what it names (`definitions.py`: a case counts for itself alone);
- of each op that these name: the contract, the reference, and the kernel that the test is about: `csrc/cuda/<op>*.cu`
  with its headers and the shim of its launcher, or `kernels/<op>.py` with what it imports;
- the executor, `tests/ptxrun/`;
- the versions of nvcc or Triton, of torch and of NumPy. nvcc's flags are in `tests/cuda_kernels.py`, which counts.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .definitions import Definitions, Use
from .sources import EXECUTOR, Sources

INTERPRETER = "tests/triton_interpreter.py"
LENGTH = 12  # of a key, in hexadecimal digits: it is compared with that of the same test alone
PLAIN = {"builtins.str", "builtins.int", "builtins.float", "builtins.bool", "builtins.NoneType", "torch.dtype"}


class Keys:
    """The keys of the tests of one work tree, under given versions of nvcc, Triton, torch and NumPy."""

    def __init__(self, root: Path, versions: dict[str, str]) -> None:
        self.sources, self.versions = Sources(root), versions
        self.definitions = Definitions(self.sources)
        # One op, one basename; the names of its functions are those that kernels/__init__.py lists.
        (table,) = self.sources.python("kernels/__init__.py").definitions["MODULES"]
        self.ops: dict[str, str] = ast.literal_eval(table.value)  # type: ignore[attr-defined]
        self.ops |= {base: base for base in self.ops.values()}
        self.executor = self.sources.glob(f"{EXECUTOR}/*.py") - self.sources.glob(f"{EXECUTOR}/test_*.py")
        self.of_op, self.words = functools.cache(self._of_op), functools.cache(self._words)

    def key(self, nodeid: str, params: dict[str, Any]) -> str:
        """The key of a test by its name, relative to the root, and the values that it is called with.

        It is empty for a test about what is installed here, which is no property of this repository.
        """
        lines = sorted(self.parts(nodeid, params))
        if any("ops.backends()" in line for line in lines):
            return ""
        return hashlib.sha256("\n".join([nodeid, *lines]).encode()).hexdigest()[:LENGTH]

    def parts(self, nodeid: str, params: dict[str, Any]) -> set[str]:
        """Everything that counts: texts of definitions, files with their hashes, versions."""
        file, *names = nodeid.split("[")[0].split("::")
        if len(names) != 1:
            raise ValueError(f"{nodeid}: a test of a GPU kernel must be a function of its module, not of a class")
        (name,) = names
        kinds = {
            kind for kind in ("cuda", "triton") if re.search(rf"/test_{kind}_|[\[-]{kind}-(sm_\d|interpreted)", nodeid)
        }
        if file.startswith(f"{EXECUTOR}/"):
            kinds, texts, files = (
                {"cuda", "triton"},
                set(),
                self.sources.glob(f"{EXECUTOR}/*.py", f"{EXECUTOR}/tests_data/*.*"),
            )
        else:
            texts, files = self._reached(file, name, params)
            files |= self.executor | ({INTERPRETER} if "triton-interpreted" in nodeid else set())
            for op, on_host in self._named(file, texts):
                for kind in kinds:
                    files |= self.of_op(op, kind, on_host)
        for named in {file for file in files if "::" in file}:
            files.remove(named)
            texts |= self.definitions.closure(Use(*named.split("::"))).texts
        compilers = {"cuda": "nvcc", "triton": "triton"}
        versions = {
            f"{name} {self.versions[name]}" for name in ("torch", "numpy", *(compilers[kind] for kind in kinds))
        }
        return texts | versions | {self.sources.digest(file) for file in files}

    def _reached(self, file: str, name: str, params: dict[str, Any]) -> tuple[set[str], set[str]]:
        """The texts and files that a test function reaches, for these parameters."""
        fixtures = self.definitions.function(file, name, False).fixtures
        own = {each: value for each, value in sorted(params.items()) if each not in fixtures}
        # What has no lasting text of its own counts with the list that it stands in.
        plain = all(map(_is_plain, own.values()))
        function = self.definitions.function(file, name, not plain)
        texts, files = {function.text, repr(own) if plain else ""}, set()
        for use in function.uses:
            value = own.get(use.parameter)
            key = value if isinstance(value, str) else use.key
            closure = self.definitions.closure(use._replace(key=key, parameter=""))
            texts |= closure.texts
            files |= closure.files
        return texts, files

    def _named(self, file: str, texts: Iterable[str]) -> set[tuple[str, bool]]:
        """The ops that texts name, and that of the file's name, each with whether it also runs on the host."""
        words = {base for base in self.ops.values() if base in file}
        hosts: set[str] = set()
        for text in texts:
            named, called = self.words(text)
            words |= named
            hosts |= called
        # A table of cases runs on the simulated GPU alone.
        beside = not file.startswith("tests/test_op")
        return {(op, beside and op in hosts) for op in words}

    def _words(self, text: str) -> tuple[set[str], set[str]]:
        """The ops whose names are in a text, and those that are called as `ops.<name>`."""
        named, called = set(re.findall(r"\w+", text)), set(re.findall(r"\bops\.(\w+)", text))
        return {self.ops[name] for name in named & self.ops.keys()}, {
            self.ops[name] for name in called & self.ops.keys()
        }

    def _of_op(self, op: str, kind: str, on_host: bool) -> set[str]:
        """The files of one op for `cuda` or `triton`, with the CPU's kernel where the test calls it, too."""
        python = {f"fastprune/ops/{op}.py", f"fastprune/ops/reference/{op}.py"}
        native = self.sources.glob(f"csrc/cpu/{op}.cpp") if on_host else set()
        if kind == "triton":
            python.add(f"kernels/{op}.py")
        else:
            python |= self.sources.glob(f"tests/simulated/cuda_{op}*.py")
            native |= self.sources.glob(f"csrc/cuda/{op}*.cu")
        including, importing = self.sources.including, self.sources.importing
        return {*(file for start in native for file in including(start))} | {
            *(file for start in python for file in importing(start))
        }


def _is_plain(value: object) -> bool:
    """Whether its repr says all of it."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    return f"{type(value).__module__}.{type(value).__name__}" in PLAIN
