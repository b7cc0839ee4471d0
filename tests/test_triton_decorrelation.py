"""What is particular to the Triton kernels of decorrelation, run without a GPU: launches, resources, orders, faults."""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cases
import cuda_kernels as cuda
import pytest
import torch
import triton_compiled
from ptxrun import PtxError
from simulated import Gpu
from simulated import triton as driver
from torch import Tensor

from fastprune import kernels

KINDS = ("covariance", "kernel-covariance", "correlation", "orthogonality")
EITHER = pytest.mark.parametrize("arch", ["sm_80", pytest.param("sm_90", marks=pytest.mark.slow)])
# A layer with wide tiles, more than one of them, and one with narrow ones.
SHAPES: cases.Shapes = [(70, 4, 3, 4), (20, 5, 3, 3)]

Module = Any
Result = tuple[Tensor, Tensor, list[Tensor]]


def run(
    gpu: Gpu,
    weights: Sequence[Tensor],
    kind: str,
    mask: Tensor | None = None,
    precision: str = "highest",
    module: Module = None,
) -> Result:
    """Penalty, coefficients and gradients."""
    ops = module or importlib.import_module("fastprune.kernels.decorrelation")
    forward = driver.on(gpu, "decorrelation", ops.decorrelation)
    penalty, coefficients = forward(weights, kind, True, mask, precision)
    backward = driver.on(gpu, "decorrelation_backward", ops.decorrelation_backward)
    gradients = backward(torch.ones_like(penalty), weights, coefficients, kind, True, mask, precision)
    return penalty, coefficients, gradients


def same_bits(left: Result, right: Result) -> bool:
    return all(map(torch.equal, [*left[:2], *left[2]], [*right[:2], *right[2]]))


def made(
    arch: str, weights: Sequence[Tensor], kind: str, mask: Tensor | None = None, precision: str = "highest"
) -> list[str]:
    """The PTX of both kernels, which are compiled and not executed."""
    ops = importlib.import_module("fastprune.kernels.decorrelation")
    found: list[str] = []
    resident = driver.Resident()
    weights, mask = [resident.put(weight) for weight in weights], resident.put(mask)
    with pytest.MonkeyPatch.context() as patch, driver.active(Gpu(arch)), resident:
        patch.setattr(driver.Launcher, "__call__", lambda self, *_: found.append(self.loaded.ptx))
        penalty, coefficients = ops.decorrelation(weights, kind, True, mask, precision)
        ops.decorrelation_backward(torch.ones_like(penalty), weights, coefficients, kind, True, mask, precision)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_one_launch_each_way_whatever_the_number_of_layers(kind: str) -> None:
    for shapes in ([(8, 3, 3, 3)], [(8, 3, 3, 3), (4, 20), (40, 4, 1, 1), (1, 2, 3, 3), (17, 9)]):
        gpu = Gpu("sm_80")
        run(gpu, cases.random_weights(shapes), kind)
        assert len(gpu.stats) == 2


# Layers that need each variant of a kernel: wide tiles and none but narrow ones, and kernels of each width.
VARIANTS: dict[str, list[cases.Shapes]] = {
    "covariance": [SHAPES, [(16, 8)]],
    "correlation": [SHAPES, [(16, 8)]],
    "kernel-covariance": [[(4, 5, 2, width)] for width in (1, 2, 3, 7, 40)],
    "orthogonality": [SHAPES],
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_tensor_cores_and_no_local_memory(kind: str, dtype: torch.dtype, arch: str) -> None:
    gram = kind in ("covariance", "correlation")
    precisions = ("highest", "high", "medium") if gram and dtype == torch.float32 else ("highest",)
    for shapes, precision in itertools.product(VARIANTS[kind], precisions):
        for mask in (None, cases.random_mask(shapes)):
            kernels = made(arch, cases.random_weights(shapes, dtype), kind, mask, precision)
            assert len(kernels) == (1 if shapes == [(4, 5, 2, 1)] else 2)  # one column has no covariance
            for ptx in kernels:
                local, registers = triton_compiled.local_bytes_and_registers(ptx, arch)
                assert local == 0, (shapes, precision, mask is None)
                assert registers <= (248 if gram else 184)
                assert not gram or re.search(r"\b(?:mma\.sync|wgmma\.mma_async)", ptx)


@pytest.mark.parametrize(("precision", "operands"), [("high", "tf32.tf32"), ("medium", "bf16.bf16")])
def test_precisions_are_those_of_the_instructions(precision: str, operands: str) -> None:
    weights = cases.random_weights(SHAPES)
    for ptx in made("sm_80", weights, "covariance", precision=precision):
        assert re.search(rf"mma\.sync\.\S*\.f32\.{operands}\.f32", ptx)
    penalty, exact = (run(Gpu("sm_80"), weights, "covariance", precision=name)[0] for name in (precision, "highest"))
    assert penalty != exact


def test_no_matrix_of_covariances_is_written() -> None:
    gpu = Gpu("sm_80")
    filters = 200
    run(gpu, cases.random_weights([(filters, 8)]), "covariance")
    words = 4 * filters * -(-filters // 16)
    # Beside the signs: means and scales, a share of each tile.
    assert gpu.stats[0].global_store_bytes < 1.25 * words + 16 * filters < filters * filters


@pytest.mark.parametrize("kind", KINDS)
def test_orders_of_blocks_and_atomics_give_the_same_bits(kind: str) -> None:
    weights, mask = cases.random_weights(SHAPES), cases.random_mask(SHAPES)
    first, *others = (run(Gpu("sm_80", options=dict(order)), weights, kind, mask) for order in cuda.ORDERS)
    assert all(same_bits(first, other) for other in others)


@pytest.mark.parametrize("kind", KINDS)
def test_filters_left_out_are_not_read(kind: str) -> None:
    weights, mask = cases.random_weights(SHAPES), cases.random_mask(SHAPES)
    clean = run(Gpu("sm_80"), weights, kind, mask)
    for weight, kept in zip(weights, mask.split([len(weight) for weight in weights])):
        weight[~kept] = float("nan")
    spoiled = run(Gpu("sm_80"), weights, kind, mask)
    assert same_bits(clean, spoiled)
    for gradient, kept in zip(spoiled[2], mask.split([len(weight) for weight in weights])):
        assert not gradient[~kept].any()


def test_tables_are_made_once_for_the_same_tensors() -> None:
    from fastprune.kernels.gram import covariance_work
    from fastprune.kernels.tables import COLUMNS, FILTERS, SIZE, TILE, WEIGHT, Call

    weights = cases.random_weights([(70, 4, 3, 4), (20, 5, 3, 3)])
    table = Call(weights, "covariance", True, None, "highest").table(covariance_work)
    assert Call(weights, "covariance", False, None, "high").table(covariance_work) is table
    moved = [weight.clone() for weight in weights]
    assert Call(moved, "covariance", True, None, "highest").table(covariance_work) is not table
    for line, weight, side in zip(table.lines.view(-1, COLUMNS.value).tolist(), weights, (64, 32)):
        assert [line[column.value] for column in (WEIGHT, FILTERS, SIZE, TILE)] == [
            weight.data_ptr(),
            len(weight),
            weight[0].numel(),
            side,
        ]
    # Statistics of 16 filters each, then a triangle of two tiles a side and one tile.
    assert table.phases == (5 + 2, 5 + 2 + 3 + 1)


@pytest.fixture
def faulty(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str, str, str], Module]:
    """The kernels with a text of one of their files replaced."""

    def load(file: str, old: str, new: str) -> Module:
        name = f"faulty_{abs(hash((file, old, new)))}"
        folder = tmp_path / name
        folder.mkdir()
        for path in Path(kernels.__path__[0]).glob("*.py"):
            text = path.read_text()
            if path.name == file:
                assert text.count(old) == 1
                text = text.replace(old, new)
            (folder / path.name).write_text(text)
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec
        sys.modules[name] = importlib.util.module_from_spec(spec)
        request.addfinalizer(lambda: [sys.modules.pop(key) for key in list(sys.modules) if key.split(".")[0] == name])
        return importlib.import_module(f"{name}.decorrelation")

    return load


@pytest.mark.parametrize(
    ("kind", "file", "old", "new", "report"),
    [
        pytest.param(
            "covariance",
            "gram.py",
            "        wait(ready, tl.cdiv(filters, ROWS))\n",
            "",
            "uninitialised|race",
            id="tiles-do-not-wait",
        ),
        pytest.param(
            "covariance",
            "tasks.py",
            'earlier = tl.atomic_add(counter, 1, sem="acq_rel")',
            'earlier = tl.atomic_add(counter, 1, sem="relaxed")',
            "race",
            id="no-fence-before-the-ticket",
        ),
        pytest.param(
            "covariance",
            "gram_statistics.py",
            "there = used[:, None] & (columns < size)[None, :]",
            "there = used[:, None] & (columns < size + 16)[None, :]",
            "outside every global allocation",
            id="a-step-too-deep",
        ),
        pytest.param(
            "covariance",
            "gram.py",
            "there = (rows < filters)[:, None] & (columns < width)[None, :]",
            "there = (rows < filters + 1)[:, None] & (columns < width)[None, :]",
            "outside every global allocation|race",
            id="a-row-too-many",
        ),
        pytest.param(
            "orthogonality",
            "orthogonality.py",
            "        wait(done, 2 * row_tasks + column_tasks)\n",
            "",
            "uninitialised|race",
            id="a-phase-does-not-wait",
        ),
    ],
)
def test_faults_are_reported(
    faulty: Callable[[str, str, str], Module], kind: str, file: str, old: str, new: str, report: str
) -> None:
    # Blocks of a batch run side by side.
    with pytest.raises(PtxError, match=report):
        run(Gpu("sm_80"), cases.random_weights([(33, 9)]), kind, module=faulty(file, old, new))
