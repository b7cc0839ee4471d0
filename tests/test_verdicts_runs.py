"""The table of clean tests: how it is drawn from, kept and rewritten, in runs over tests of no kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from verdicts import ROOT, is_drawn, table, updated


def test_a_seed_draws_a_tenth_and_repeats_it() -> None:
    names = [f"tests/test_a.py::test_a[{i}]" for i in range(3000)]
    first, second = ({name for name in names if is_drawn(seed, name)} for seed in (1, 2))
    assert first == {name for name in reversed(names) if is_drawn(1, name)}
    assert all(240 < len(drawn) < 360 for drawn in (first, second))
    assert len(first & second) < 60


def test_the_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "clean.txt"
    clean = {"tests/a.py::test_a[two words-x]": "aa", "tests/a.py::test_b": "bb", "tests/b.py::test_c[::]": "cc"}
    assert table.read(path) == {}
    table.write(path, clean)
    assert table.read(path) == clean
    assert path.read_text().splitlines()[1:3] == ["tests/a.py", "  aa test_a[two words-x]"]


def test_a_table_that_cannot_be_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clean.txt"
    table.write(path, {"tests/a.py::test_a": "aa"})

    def fail(*paths: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="could not write the table of clean tests"):
        table.write(path, {})
    assert table.read(path) == {"tests/a.py::test_a": "aa"}
    assert os.listdir(tmp_path) == ["clean.txt"]


def test_what_passed_comes_in_and_what_failed_goes() -> None:
    clean = {"passed": "old", "failed": "old", "gone": "old", "not run": "old"}
    keys = dict.fromkeys(("passed", "failed", "first", "not run"), "new")
    keys["without a key"] = ""
    ran = {"passed": True, "failed": False, "first": True, "without a key": True}
    assert updated(clean, keys, ran, {"gone"}) == {"passed": "new", "first": "new", "not run": "old"}


PROJECT = {
    "pyproject.toml": "[tool.pytest.ini_options]\nmarkers = ['gpu_kernels: of GPUs']\ntestpaths = ['tests']\n",
    "kernels/__init__.py": "MODULES = {}\n",
    "tests/conftest.py": "pytest_plugins = ['verdicts']\n",
    "tests/ptxrun/__init__.py": "NVCC = ''\n",
    "fastprune/checkpoint.py": "def write_atomically(path, chunks, what):\n    path.write_bytes(b''.join(chunks))\n",
    "tests/test_op_a.py": """import pytest

FAILS = ()

@pytest.mark.gpu_kernels
@pytest.mark.parametrize("number", range(40))
def test_a(number):
    assert number not in FAILS

@pytest.mark.gpu_kernels
def test_b():
    assert test_a

def test_of_no_gpu():
    assert not FAILS
""",
}


class Project:
    """A project with tests of no kernels, and the plugin."""

    def __init__(self, root: Path) -> None:
        self.root, self.environment = root, dict[str, str]()
        for name, text in PROJECT.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        ignored = shutil.ignore_patterns("__pycache__", "clean.txt")
        shutil.copytree(ROOT / "tests/verdicts", root / "tests/verdicts", ignore=ignored)

    def edit(self, old: str, new: str) -> None:
        path = self.root / "tests/test_op_a.py"
        path.write_text(path.read_text().replace(old, new))

    @property
    def clean(self) -> dict[str, str]:
        return table.read(self.root / "tests/verdicts/clean.txt")

    def run(self, *arguments: str) -> tuple[int, str]:
        plugins = ("-p", "xdist.plugin", "-p", "no:cacheprovider")
        command = [sys.executable, "-m", "pytest", *plugins, "-m", "gpu_kernels", "-rA", *arguments]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | self.environment
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr


def executed(output: str) -> set[str]:
    return set(re.findall(r"^(?:PASSED|FAILED) (\S+)", output, re.MULTILINE))


def test_runs(tmp_path: Path) -> None:
    project = Project(tmp_path)
    code, output = project.run("--verdicts=rewrite")
    assert code == 0, output
    assert len(project.clean) == 41
    assert "0 of 41 remembered as clean and left out, 41 executed" in output

    # A tenth of what is clean is executed again, and the seed draws the same once more.
    code, output = project.run("--verdicts=check")
    drawn, (seed,) = executed(output), set(re.findall(r"--verdicts-seed=(\d+)", output))
    assert code == 0, output
    left_out = f"{41 - len(drawn)} of 41 remembered as clean and left out, 0 executed, {len(drawn)} executed again"
    assert left_out in output, output
    assert executed(project.run("--verdicts=check", f"--verdicts-seed={seed}")[1]) == drawn
    code, output = project.run("--verdicts=update")
    assert (code, executed(output)) == (0, set()), output

    # One that fails is not clean. All missed, since all name what changed.
    project.edit("FAILS = ()", "FAILS = (7,)")
    before = project.clean
    code, output = project.run("--verdicts=check")
    assert (code, len(executed(output)), project.clean) == (1, 41, before), output
    code, output = project.run("--verdicts=update")
    assert code == 1, output
    assert before.keys() - project.clean.keys() == {"tests/test_op_a.py::test_a[7]"}
    assert executed(project.run("--verdicts=update")[1]) == {"tests/test_op_a.py::test_a[7]"}

    # A test that is gone leaves the table once its file was collected whole.
    project.edit("def test_b", "def test_c")
    project.run("--verdicts=rewrite", "tests/test_op_a.py::test_c")
    assert {"tests/test_op_a.py::test_b", "tests/test_op_a.py::test_c"} <= project.clean.keys()
    project.run("--verdicts=rewrite")
    assert "tests/test_op_a.py::test_b" not in project.clean


@pytest.mark.slow
def test_runs_in_several_processes(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.edit("FAILS = ()", "FAILS = (7,)")
    code, output = project.run("--verdicts=rewrite", "-n", "2")
    assert (code, len(executed(output)), len(project.clean)) == (1, 41, 40), output
    code, output = project.run("--verdicts=check", "-n", "2")
    (seed,) = set(re.findall(r"--verdicts-seed=(\d+)", output))
    assert executed(project.run("--verdicts=check", f"--verdicts-seed={seed}")[1]) == executed(output)


def test_a_clean_one_that_fails_when_drawn_again_fails_the_run(tmp_path: Path) -> None:
    """Something counts that the key does not know of: this is what the tenth is for."""
    project = Project(tmp_path)
    project.edit("import pytest", "import os\nimport pytest")
    project.edit("not in FAILS", "not in FAILS and 'BROKEN' not in os.environ")
    assert project.run("--verdicts=rewrite")[0] == 0
    seed = next(seed for seed in range(9) if any(is_drawn(seed, name) for name in project.clean if "test_a" in name))
    project.environment["BROKEN"] = "1"
    code, output = project.run("--verdicts=check", f"--verdicts-seed={seed}")
    assert code == 1, output


def test_what_is_edited_while_it_runs_has_no_verdict(tmp_path: Path) -> None:
    project = Project(tmp_path)
    edits = "from pathlib import Path\n    text = Path(__file__).read_text()\n"
    edits += "    Path(__file__).write_text(text.replace('FAILS = ()', 'FAILS = (50,)', 1))\n"
    project.edit("assert test_a\n", edits)
    code, output = project.run("--verdicts=rewrite")
    assert code == 0, output
    assert project.clean.keys() == {"tests/test_op_a.py::test_b"}  # which does not name what changed
