"""The table of clean tests of GPU kernels: what misses it, and what does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ptxrun import NVCC
from verdicts import ROOT, versions
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


def test_what_is_installed_is_asked_each_time(tree: Path) -> None:
    nodeid = "tests/test_cuda_filter_mask.py::test_serves_cuda_where_it_was_built[filter_norms]"
    assert key(tree, nodeid, {"op": "filter_norms"}) == ""


def test_a_test_in_a_class_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a function of its module, not of a class"):
        key(ROOT, f"{TESTED}::TestThreshold::test_kth_threshold[cuda-sm_80]")
