"""The Triton kernels of `kernels/`, run by their own launchers on a simulated GPU, and what their tests ask of them."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import simulated
from simulated import Gpu
from simulated import triton as driver

from fastprune import kernels, models

FOLDER = Path(kernels.__file__).parent


def resnet50() -> list[tuple[int, ...]]:
    """The shapes of its convolutions."""
    return [tuple(p.shape) for p in models.create("resnet50").parameters() if p.dim() == 4]


def call(gpu: Gpu, op: str, *arguments: Any) -> Any:
    """An op on a simulated GPU, its arguments and results in ordinary memory."""
    return simulated.implementations("triton", gpu)[op](*arguments)


def bytes_of(stats: Any) -> int:
    """Bytes asked of global memory; what all lanes of a warp load from one place counts as the sector it is in."""
    detail = stats.mem_detail.values()
    return sum(min(asked, 32 * sectors) for what, _, sectors, asked in detail if what.startswith("global"))


def sector_efficiency(stats: Any, what: str) -> float:
    """The share asked for of the sectors touched by 16-byte accesses (or others of the same loop, named by `what`)."""
    rows = [row for row in stats.mem_detail.values() if row[0] == what]
    assert rows, f"no {what} among {sorted({row[0] for row in stats.mem_detail.values()})}"
    return sum(row[3] for row in rows) / sum(32 * row[2] for row in rows)


def ptx_of(arch: str, op: str, *arguments: Any) -> list[str]:
    """What Triton made of the kernels that an op launches."""
    found: list[str] = []
    own = driver.Launcher.__call__

    def launch(self: Any, *values: Any) -> None:
        found.append(self.loaded.ptx)
        own(self, *values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver.Launcher, "__call__", launch)
        call(Gpu(arch), op, *arguments)
    return found


def local_bytes_and_registers(ptx: str, arch: str) -> tuple[int, int]:
    """Bytes of stack and spills, and the registers, that Triton's own ptxas gives a kernel."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch}{'a' if arch == 'sm_90' else ''}", source, "-o", f"{folder}/cubin"]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    local = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers, done.stderr
    return sum(map(int, local)), int(registers[1])


@contextmanager
def planted(file: str, old: str, new: str) -> Iterator[None]:
    """`kernels/<file>` with one text replaced, in a copy of the package that takes its place."""
    text = (FOLDER / file).read_text()
    assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times in {file}, not once"
    kept = {name: module for name, module in sys.modules.items() if name.startswith("fastprune.kernels.")}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for path in FOLDER.glob("*.py"):
            changed = path.read_text().replace(old, new) if path.name == file else path.read_text()
            (Path(folder) / path.name).write_text(changed)
        for name in kept:
            del sys.modules[name]
        patch.setattr(kernels, "__path__", [folder])
        try:
            yield
        finally:
            for name in [name for name in sys.modules if name.startswith("fastprune.kernels.")]:
                del sys.modules[name]
            sys.modules.update(kept)


def wide(ptx: str, what: str) -> list[str]:
    """The accesses of 16 bytes among a kernel's loads (`ld`) or stores (`st`)."""
    return re.findall(rf"\b{what}\.global\.(?:v4\.b32|v2\.b64|v4\.f32|v2\.f64)\b", ptx)
