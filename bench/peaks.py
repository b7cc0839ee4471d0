"""What a GPU can do at most: the rates that those of the ops are shares of."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from device import Call, CudaDevice

ROUNDS = 10


@dataclass(frozen=True)
class Peaks:
    """Measured rates."""

    bytes_per_s: float  # a copy's, what it reads and what it writes
    tf32_flop_per_s: float
    bf16_flop_per_s: float

    def __str__(self) -> str:
        return (
            f"measured peaks: copy {self.bytes_per_s / 1e9:.1f} GB/s, matrix products "
            f"{self.tf32_flop_per_s / 1e12:.2f} TFLOP/s (TF32), {self.bf16_flop_per_s / 1e12:.2f} TFLOP/s (BF16)"
        )


def measure(device: CudaDevice) -> Peaks:
    """Copy a buffer that no cache holds, and multiply large matrices."""
    source = torch.zeros(device.copy_bytes, dtype=torch.int8, device=device.name)
    target = torch.empty_like(source)
    copy = _median(device, functools.partial(target.copy_, source))
    with float32_products("high"):
        tf32 = _matrix_rate(device, torch.float32)
    return Peaks(2 * device.copy_bytes / copy, tf32, _matrix_rate(device, torch.bfloat16))


def _matrix_rate(device: CudaDevice, dtype: torch.dtype) -> float:
    rows = device.matrix_rows
    left, right = (torch.randn(rows, rows, device=device.name).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * rows**3 / _median(device, lambda: torch.mm(left, right, out=product))


def _median(device: CudaDevice, call: Call) -> float:
    for _ in range(device.warmup_calls):
        device.seconds(call)
    return statistics.median(device.seconds(call) for _ in range(ROUNDS))


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within, how exact PyTorch's own products of float32 matrices are."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
