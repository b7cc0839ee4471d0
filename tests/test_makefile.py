"""The environment of `make`: made from nothing, used again while current, and made again when it is not whole."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Stands for Python: answers -c with the real one, makes environments with a copy of itself, and writes down the rest.
PYTHON = f"""#!/bin/bash
case "$1 $2" in
-c*) exec {sys.executable} "$@";;
--version*) echo Python;;
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >> "$LOG";;
"-m pip") echo pip >> "$LOG"; [ ! -e pip-fails ];;
"setup.py "*) echo "build${{PYTHONPATH:+ with $PYTHONPATH}}" >> "$LOG"; [ ! -e build-fails ];;
*) echo "$@" >> "$LOG";;
esac
"""
INSTALL = ["pip", "pip", "build"]


class Clone:
    """A folder with what `make` looks at, and a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("Makefile", "pyproject.toml", "setup.py", "csrc/module.cpp", ".ci/constraints-oldest.txt"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)

    def make(self, *arguments: str, fails: bool = False) -> list[str]:
        """Run make and return what it had Python do."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        # Variables given to the make that runs these tests are in the environment, too.
        outer = ("FASTPRUNE_", "MAKE", "MFLAGS", "PIP_", "ARGS", "PYTHON", "OLDEST", "VENV")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(outer)} | {"LOG": str(log)}
        ran = subprocess.run(
            ["make", "PYTHON=./python", *arguments], cwd=self.folder, env=clean, capture_output=True, text=True
        )
        assert (ran.returncode != 0) == fails, ran.stdout + ran.stderr
        self.stderr = ran.stderr
        return log.read_text().splitlines() if log.exists() else []

    def touch(self, name: str) -> None:
        """Make a file newer than everything there is."""
        newest = max(path.stat().st_mtime_ns for path in self.folder.rglob("*") if path.exists())
        os.utime(self.folder / name, ns=(newest + 10**9, newest + 10**9))


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path / "clone")


def test_help_names_every_target(clone: Clone) -> None:
    made = subprocess.run(["make", "help"], cwd=clone.folder, capture_output=True, text=True, check=True)
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = set(phony.split()) - {"environment", "FORCE"}
    assert {line.split()[0] for line in made.stdout.splitlines() if line[0] != " "} >= targets


def test_made_from_nothing_then_used_again(clone: Clone) -> None:
    tests = "-m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder --verdicts=check"
    assert clone.make("test", "ARGS=-x") == ["venv", *INSTALL, f"{tests} -x"]
    assert clone.make("test") == [tests]


def test_a_changed_source_builds_and_installs_nothing(clone: Clone) -> None:
    clone.make("environment")
    clone.touch("csrc/module.cpp")
    assert clone.make("environment") == ["build"]


def test_changed_dependencies_are_installed_into_the_same_environment(clone: Clone) -> None:
    clone.make("environment")
    clone.touch("pyproject.toml")
    assert clone.make("environment")[:2] == ["pip", "pip"]


def test_another_kind_of_build_is_built(clone: Clone) -> None:
    clone.make("environment")
    assert clone.make("environment", "FASTPRUNE_CUDA=0") == ["build"]
    assert clone.make("environment", "FASTPRUNE_CUDA=0") == []
    assert clone.make("environment") == ["build"]


def test_the_oldest_is_installed_once_and_leaves_what_the_newest_built(clone: Clone) -> None:
    clone.make("environment")
    module = clone.folder / "fastprune" / "_cpu.abi3.so"
    module.parent.mkdir()
    module.touch()
    build = "build with .venv-oldest/packages"
    assert clone.make("test-oldest")[:2] == ["pip", build]
    built, on_its_modules, on_the_newest = clone.make("test-oldest", "ARGS=-x")
    assert built == build
    assert on_its_modules.startswith(f"-m pytest -c {clone.folder}/pyproject.toml ")
    assert on_its_modules.endswith(" -x")
    assert on_the_newest == "-m pytest tests/test_ops.py"
    assert module.exists()
    clone.touch(".ci/constraints-oldest.txt")
    assert clone.make("test-oldest")[:2] == ["pip", build]


def test_an_interrupted_install_is_made_again(clone: Clone) -> None:
    leftover = clone.folder / ".venv" / "lib" / "half"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    leftover.parent.chmod(0o555)
    assert clone.make("environment") == ["venv", *INSTALL]
    assert not leftover.exists()


def test_a_failed_install_leaves_no_stamp(clone: Clone) -> None:
    (clone.folder / "pip-fails").touch()
    assert clone.make("environment", fails=True) == ["venv", "pip"]
    (clone.folder / "pip-fails").unlink()
    assert clone.make("environment") == ["venv", *INSTALL]


def test_a_failed_update_is_tried_again_in_place(clone: Clone) -> None:
    clone.make("environment")
    clone.touch("pyproject.toml")
    (clone.folder / "pip-fails").touch()
    assert clone.make("environment", fails=True) == ["pip"]
    (clone.folder / "pip-fails").unlink()
    assert clone.make("environment")[:2] == ["pip", "pip"]


def test_a_failed_build_loses_no_install(clone: Clone) -> None:
    (clone.folder / "build-fails").touch()
    assert clone.make("environment", fails=True) == ["venv", *INSTALL]
    (clone.folder / "build-fails").unlink()
    assert clone.make("environment") == ["build"]


def test_a_moved_clone_gets_its_own(clone: Clone) -> None:
    clone.make("environment")
    clone.folder = clone.folder.rename(clone.folder.with_name("moved"))
    assert clone.make("environment") == ["venv", *INSTALL]


def test_an_environment_whose_python_is_gone_is_made_again(clone: Clone) -> None:
    clone.make("environment")
    (clone.folder / ".venv" / "bin" / "python").unlink()
    assert clone.make("environment") == ["venv", *INSTALL]


def test_no_suitable_python_is_said(clone: Clone) -> None:
    assert clone.make("test", "PYTHON=false", fails=True) == []
    assert "needs Python 3.10 or later" in clone.stderr
    assert "PYTHON=/path/to/python3" in clone.stderr
    assert not (clone.folder / ".venv").exists()
