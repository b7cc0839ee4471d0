"""Which of PyTorch's own convolutions on this CPU reach outside of their memory, or compute something else.

    python tests/convolution_faults.py [--few]

Each case runs forward, the gradient of its input and that of its weight, with an allocator under it that ends every
allocation at a page without access (guard_pages.c, built with ``cc``), and is compared with float64. Cases run in child
processes: one that dies is a finding, and the next child goes on behind it. What came out, and on which versions, is in
docs/known_problems.md. As on a CPU with AVX2 alone: ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2.
"""

import argparse
import ctypes
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

PASSES = ("forward", "input gradient", "weight gradient")
FINDINGS = ("writes outside", "reads outside", "wrong")  # by bit
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # of the largest value
LIBRARY = "FASTPRUNE_GUARD_PAGES"


@dataclass(frozen=True)
class Case:
    """A convolution of ``[2, channels, size, size]``; depthwise it has as many filters as channels.

    A transposed one goes the other way: from ``filters`` to ``channels``.
    """

    dtype: str
    format: str
    kernel: int
    stride: int
    dilation: int
    groups: str  # "1", "2", "depthwise" or "transposed" (of one group)
    channels: int  # of the input
    filters: int
    size: int


def cases(few: bool) -> Iterator[Case]:
    """All of them, in one order, or the few that a test has time for."""
    widths = (1, 3, 7, 8) if few else range(1, 18)
    forms = itertools.product(DTYPES, FORMATS, (1, 3), (1, 2), ("1", "2", "depthwise"), (8,) if few else (8, 9))
    for dtype, form, kernel, stride, groups, size in forms:
        for dilation in (1, 2) if kernel == 3 and stride == 1 else (1,):
            for width in widths:
                for filters in (64,) if few else (5, 64):
                    if groups == "1":
                        yield Case(dtype, form, kernel, stride, dilation, groups, width, filters, size)
                    elif groups == "2":
                        yield Case(dtype, form, kernel, stride, dilation, groups, 2 * width, 2 * (filters // 2), size)
                    elif filters == 64:
                        yield Case(dtype, form, kernel, stride, dilation, groups, width, width, size)
    for dtype, form, kernel, width in itertools.product(DTYPES, FORMATS, (1, 3), widths):
        yield Case(dtype, form, kernel, 2, 1, "transposed", width, 64, 8)


def findings(case: Case, guard: ctypes.CDLL) -> list[int]:
    """By pass the bits of ``FINDINGS``."""
    torch.manual_seed(0)
    dtype, form = DTYPES[case.dtype], FORMATS[case.format]
    transposed, padding = case.groups == "transposed", case.dilation * (case.kernel // 2)
    groups = 1 if transposed else case.channels if case.groups == "depthwise" else int(case.groups)
    images = torch.randn(2, case.filters if transposed else case.channels, case.size, case.size).to(dtype)
    filters = torch.randn(case.filters, case.channels // groups, case.kernel, case.kernel).to(dtype)

    def convolved(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if transposed:  # to twice the size
            return functional.conv_transpose2d(x, weight, None, case.stride, padding, output_padding=1)
        return functional.conv2d(x, weight, None, case.stride, padding, case.dilation, groups)

    seen = []
    guard.guard_on()
    x, weight = (tensor.clone(memory_format=form).requires_grad_() for tensor in (images, filters))
    y = convolved(x, weight)
    seen.append(guard.guard_check())
    along = torch.randn_like(y)
    for tensor in (x, weight):
        guard.guard_on()
        torch.autograd.backward(y, along, inputs=[tensor], retain_graph=True)
        seen.append(guard.guard_check())
    exact_x, exact_weight = (tensor.double().requires_grad_() for tensor in (images, filters))
    exact = convolved(exact_x, exact_weight)
    exact.backward(along.double())
    for i, (got, want) in enumerate([(y, exact), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)]):
        close = (got.double() - want).abs().max() <= TOLERANCE[case.dtype] * want.abs().max()
        seen[i] |= 0 if close else 4
    return seen


def sweep(few: bool = False) -> dict[Case, list[int] | str]:
    """What was found, by case, of those where anything was: the bits of each pass, or how the process ended.

    Raises:
        RuntimeError: where the allocator cannot be built, or does not serve.
    """
    every = list(cases(few))
    found: dict[Case, list[int] | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard_pages.so"
        source = Path(__file__).with_name("guard_pages.c")
        built = subprocess.run(
            ["cc", "-O2", "-Wall", "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True
        )
        if built.returncode:
            raise RuntimeError(f"cannot build {source.name}: {built.stderr}")
        start = 0
        while start < len(every):
            command = [sys.executable, __file__, "--from", str(start), *["--few"] * few]
            environment = {**os.environ, "LD_PRELOAD": str(library), LIBRARY: str(library), "OMP_NUM_THREADS": "1"}
            child = subprocess.run(command, env=environment, capture_output=True, text=True)
            lines = [line for line in child.stdout.splitlines(keepends=True) if line.endswith("\n")]
            for case, line in zip(every[start:], lines):
                if any(seen := [int(word) for word in line.split()]):
                    found[case] = seen
            start += len(lines)
            if child.returncode > 0 or not (lines or child.returncode):
                raise RuntimeError(f"the child stopped before {every[start]}: {child.stderr}")
            if child.returncode < 0 and start < len(every):
                found[every[start]] = f"ended by signal {-child.returncode}"
                start += 1
    return found


def _child(start: int, few: bool) -> None:
    torch.set_num_threads(1)
    guard = ctypes.CDLL(os.environ[LIBRARY])
    for case in itertools.islice(cases(few), start, None):
        seen = findings(case, guard)
        print(*seen, flush=True)
        if any(seen):  # what it damaged is not to be taken for the next one's doing
            break
    os._exit(0)


def table(found: dict[Case, list[int] | str]) -> str:
    """The findings, one line for all widths that differ in nothing else."""
    rows: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for case, seen in found.items():
        layer = f"{case.kernel}x{case.kernel} stride {case.stride} dilation {case.dilation} groups {case.groups}"
        if isinstance(seen, str):
            texts = [seen]
        else:
            texts = [
                f"{name}: {finding}"
                for name, bits in zip(PASSES, seen)
                for bit, finding in enumerate(FINDINGS)
                if bits >> bit & 1
            ]
        for text in texts:
            rows.setdefault((case.dtype, case.format, layer, text), []).append((case.channels, case.filters))
    lines = []
    for key, sizes in rows.items():
        widths = {n: sorted({c for c, f in sizes if f == n or key[2].endswith("depthwise")}) for _, n in sizes}
        if key[2].endswith("depthwise"):
            widths = {0: sorted({c for c, _ in sizes})}
        shown = "; ".join(f"{','.join(map(str, w))}" + (f" to {n}" if n else "") for n, w in sorted(widths.items()))
        lines.append(f"{'  '.join(key)}  channels {shown}")
    return "\n".join(lines) or "nothing"


def main() -> None:
    """Run the sweep and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--few", action="store_true", help="some of the cases, in a few seconds")
    parser.add_argument("--from", type=int, dest="start", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start is not None:
        _child(arguments.start, arguments.few)
    print(f"torch {torch.__version__}, {sum(1 for _ in cases(arguments.few))} cases, each forward and both gradients")
    print(table(sweep(arguments.few)))


if __name__ == "__main__":
    main()
