"""The table of clean tests of GPU kernels: what misses it, what does not, what is drawn, and how it is rewritten."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ptxrun import NVCC
from verdicts import ROOT, is_drawn, table, updated, versions
from verdicts.keys import Keys

CUDA = "tests/test_op_filter_mask.py::test_mask_follows_the_rule[cuda-sm_80-mixed-0.3]"
TRITON = CUDA.replace("cuda-sm_80", "triton-sm_80")
INTERPRETED = CUDA.replace("cuda-sm_80", "triton-interpreted")
OF_CASE = {"implementation": object(), "layers": "mixed", "rate": 0.3}
TESTED = "tests/test_op_filter_mask.py"
VERSIONS = {"nvcc": "13.0", "triton": "3.8", "torch": "2.14", "numpy": "2.4"}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what keys are made of."""
    for folder in ("csrc", "kernels", "fastprune/ops", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tmp_path


def key(tree: Path, nodeid: str = CUDA, params: dict[str, Any] = OF_CASE, **changed: str) -> str:
    return Keys(tree, VERSIONS | changed).key(nodeid, params)


def change(tree: Path, file: str, old: str = "", new: str = "") -> None:
    """Replace a text that is there once; without one, add a comment."""
    path = tree / file
    text = path.read_text()
    if not old:
        old, new = text, text + ("# changed\n" if path.suffix == ".py" else "// changed\n")
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times in {file}, not once"
    path.write_text(text.replace(old, new))


OTHER_TEST = ("def test_rate_zero_prunes_the_least_important(", "def test_rate_zero(")
MIXED = ('"mixed": [(16, 3, 3, 3),', '"mixed": [(15, 3, 3, 3),')
OTHER_CASE = ('"many-filters": [(600,', '"new": [(3, 4)],\n    "many-filters": [(599,')
RULE = ("return torch.from_numpy(scores.numpy() > threshold)", "return torch.from_numpy(scores.numpy() >= threshold)")
CALL = ("expected_mask(ops.filter_norms(weights, ord), rate))", "expected_mask(ops.filter_norms(weights, 1), rate))")
RATE = ("if not 0 <= rate < 1", "if not 0 <= rate <= 1")
OTHER_CHECK = ("def same_layout(", "def the_same_layout(")
FIXTURE = ("Each implementation, the compiled", "Every implementation, the compiled")
NEW_OP = ('"weight_mask": "weight_mask",', '"weight_mask": "weight_mask",\n    "new": "new",')


@pytest.mark.parametrize(
    ("what", "files"),
    [
        ("both", ["tests/ptxrun/race.py", "tests/ptxrun/memory.py"]),
        ("both", ["fastprune/ops/reference/filter_mask.py", "fastprune/ops/filter_mask.py"]),
        ("both", ["tests/simulated/gpu.py", "tests/simulated/__init__.py", "tests/cuda_kernels.py"]),
        ("cuda", ["csrc/cuda/filter_mask.cu", "csrc/cuda/filter_mask.h"]),
        ("cuda", ["csrc/cuda/select.cuh", "csrc/cuda/norm.cuh", "csrc/cuda/reduce.cuh"]),  # the last by the others
        ("cuda", ["tests/simulated/cuda_filter_mask.py"]),
        ("both", ["csrc/cuda/plan.h", "tests/cuda_plan.cpp"]),
        ("triton", ["kernels/filter_mask.py", "kernels/layers.py", "kernels/select.py"]),
        ("none", ["csrc/cuda/sgd_step.cu", "csrc/cuda/sgd_step.h", "csrc/cuda/mma.cuh", "csrc/cpu/filter_mask.cpp"]),
        ("none", ["kernels/sgd_step.py", "kernels/tables.py", "tests/simulated/cuda_sgd_step.py"]),
        ("none", ["fastprune/ops/reference/sgd_step.py", "fastprune/ops/_backend.py", "tests/cuda_gram.cpp"]),
        ("none", ["tests/test_cuda_filter_mask.py", "tests/conftest.py", "tests/test_nn.py"]),
        ("none", ["tests/ptxrun/test_ops.py"]),
    ],
)
def test_a_changed_file_misses_where_the_verdict_depends_on_it(tree: Path, what: str, files: list[str]) -> None:
    before = {"cuda": key(tree), "triton": key(tree, TRITON)}
    missed = {"both": {"cuda", "triton"}, "none": set()}.get(what, {what})
    for file in files:
        text = (tree / file).read_text()
        change(tree, file)
        after = {"cuda": key(tree), "triton": key(tree, TRITON)}
        assert {kind for kind in before if after[kind] != before[kind]} == missed, file
        (tree / file).write_text(text)


@pytest.mark.parametrize(
    ("misses", "file", "texts"),
    [
        pytest.param(True, "tests/cases.py", MIXED, id="the case"),
        pytest.param(False, "tests/cases.py", OTHER_CASE, id="another case, and a new one"),
        pytest.param(True, "tests/cases.py", ("2 / max(1,", "3 / max(1,"), id="how its weights are made"),
        pytest.param(True, TESTED, CALL, id="the test"),
        pytest.param(True, TESTED, RULE, id="a helper of the test"),
        pytest.param(False, TESTED, OTHER_TEST, id="another test of the file"),
        pytest.param(False, TESTED, ("[0.0, 0.3, 0.5, 0.6, 0.999]", "[0.0, 0.3, 0.5, 0.7]"), id="another parameter"),
        pytest.param(True, "tests/conftest.py", FIXTURE, id="its fixture"),
        pytest.param(True, "fastprune/ops/checks.py", RATE, id="a check of the op"),
        pytest.param(False, "fastprune/ops/checks.py", OTHER_CHECK, id="another check"),
        pytest.param(False, "kernels/__init__.py", NEW_OP, id="a new op"),
    ],
)
def test_a_changed_definition_misses_where_the_test_names_it(
    tree: Path, misses: bool, file: str, texts: tuple[str, str]
) -> None:
    before = key(tree)
    change(tree, file, *texts)
    assert (key(tree) != before) == misses


def test_the_case_itself_counts(tree: Path) -> None:
    named = {CUDA: OF_CASE, CUDA.replace("0.3", "0.5"): OF_CASE | {"rate": 0.5}, TRITON: OF_CASE, INTERPRETED: OF_CASE}
    assert len({key(tree, nodeid, params) for nodeid, params in named.items()}) == 4
    assert key(tree, params=OF_CASE | {"rate": 0.4}) != key(tree)
    assert key(tree, params=OF_CASE | {"implementation": "another object, which its name says"}) == key(tree)


def test_a_case_without_a_text_of_its_own_counts_with_its_list(tree: Path) -> None:
    nodeid, params = f"{TESTED}::test_kth_threshold_errors[cuda-sm_80-scores0]", {"scores": object()}
    before = key(tree, nodeid, params)
    change(tree, TESTED, "(torch.ones(6)[::2], 0,", "(torch.ones(8)[::2], 0,")
    assert key(tree, nodeid, params) != before


def test_the_interpreter_counts_where_it_is_at_work(tree: Path) -> None:
    before = [key(tree, nodeid) for nodeid in (CUDA, TRITON, INTERPRETED)]
    change(tree, "tests/triton_interpreter.py")
    assert [key(tree, nodeid) == old for nodeid, old in zip((CUDA, TRITON, INTERPRETED), before)] == [True, True, False]


def test_the_cpus_kernel_counts_where_a_test_compares_with_it(tree: Path) -> None:
    nodeid, params = "tests/test_cuda_filter_mask.py::test_masks_are_identical_to_the_references[0.3]", {"rate": 0.3}
    before = key(tree, nodeid, params)
    change(tree, "csrc/cpu/filters.inl")
    assert key(tree, nodeid, params) != before


def test_the_executors_own_tests_depend_on_all_of_it(tree: Path) -> None:
    nodeid = "tests/ptxrun/test_ptxrun.py::test_scan[sm_80]"
    keys = [key(tree, nodeid, {})]
    for file in ("race.py", "test_ptxrun.py", "tests_data/kernels.cu"):
        change(tree, f"tests/ptxrun/{file}")
        keys.append(key(tree, nodeid, {}))
    assert len(set(keys)) == 4


@pytest.mark.parametrize(("name", "missed"), [("nvcc", {CUDA}), ("triton", {TRITON}), ("torch", {CUDA, TRITON})])
def test_another_version_misses(tree: Path, name: str, missed: set[str]) -> None:
    changed = {nodeid for nodeid in (CUDA, TRITON) if key(tree, nodeid, **{name: "9.9"}) != key(tree, nodeid)}
    assert changed == missed


def test_the_versions_are_those_of_this_machine() -> None:
    found = versions()
    assert found.keys() == VERSIONS.keys()
    assert found["torch"] == torch.__version__.split("+")[0]
    assert ("release" in found["nvcc"]) == bool(NVCC)


# --------------------------------------------------------------------------------------------------- the table


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
    ran = {"passed": True, "failed": False, "first": True}
    assert updated(clean, keys, ran, {"gone"}) == {"passed": "new", "first": "new", "not run": "old"}


# -------------------------------------------------------------------------------------------------- whole runs

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

    # A tenth of what is clean is executed again; another process draws the same, and the seed draws it once more.
    code, output = project.run("--verdicts=check", "-n", "1")
    drawn, (seed,) = executed(output), set(re.findall(r"--verdicts-seed=(\d+)", output))
    assert code == 0, output
    left_out = f"{41 - len(drawn)} of 41 remembered as clean and left out, 0 executed, {len(drawn)} executed again"
    assert left_out in output, output
    assert executed(project.run("--verdicts=check", f"--verdicts-seed={seed}")[1]) == drawn
    code, output = project.run("--verdicts=update")
    assert (code, executed(output)) == (0, set()), output

    # A failing one is not clean, and all of them missed, since all name what changed.
    path = tmp_path / "tests/test_op_a.py"
    path.write_text(path.read_text().replace("FAILS = ()", "FAILS = (7,)"))
    before = project.clean
    code, output = project.run("--verdicts=check")
    assert (code, len(executed(output)), project.clean) == (1, 41, before), output
    code, output = project.run("--verdicts=update", "-n", "1")
    assert code == 1, output
    assert before.keys() - project.clean.keys() == {"tests/test_op_a.py::test_a[7]"}
    assert executed(project.run("--verdicts=update")[1]) == {"tests/test_op_a.py::test_a[7]"}

    # A test that is gone leaves the table once its file was collected whole.
    path.write_text(path.read_text().replace("def test_b", "def test_c"))
    project.run("--verdicts=update", "tests/test_op_a.py::test_c")
    assert {"tests/test_op_a.py::test_b", "tests/test_op_a.py::test_c"} <= project.clean.keys()
    project.run("--verdicts=update")
    assert "tests/test_op_a.py::test_b" not in project.clean


def test_a_clean_one_that_fails_when_drawn_again_fails_the_run(tmp_path: Path) -> None:
    """Something counts that the key does not know of: this is what the tenth is for."""
    project = Project(tmp_path)
    path = tmp_path / "tests/test_op_a.py"
    path.write_text(
        "import os\n" + path.read_text().replace("not in FAILS", "not in FAILS and 'BROKEN' not in os.environ")
    )
    assert project.run("--verdicts=rewrite")[0] == 0
    seed = next(seed for seed in range(9) if any(is_drawn(seed, name) for name in project.clean if "test_a" in name))
    project.environment["BROKEN"] = "1"
    code, output = project.run("--verdicts=check", f"--verdicts-seed={seed}")
    assert code == 1, output
