"""Triton's launches on a simulated GPU: pointers in tables are followed, and what a kernel does wrong is reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import triton
import triton.language as tl
from on_gpu import moved
from ptxrun import PtxError
from simulated import Gpu
from simulated import triton as driver
from torch import Tensor

from fastprune import ops

BLOCK = 128


@triton.jit
def _sums_kernel(table, out, size, extra, BLOCK: tl.constexpr):
    """out[l] = Σ of the first `size` elements of the layer whose address is table[l]."""
    layer = tl.program_id(0)
    elements = tl.load(table + layer).to(tl.pointer_type(tl.float32))
    offsets = tl.arange(0, BLOCK)
    tl.store(out + layer, tl.sum(tl.load(elements + offsets, mask=offsets < size + extra, other=0.0)))


def sums(weights: Sequence[Tensor], extra: int = 0, launched: int | None = None) -> Tensor:
    """A launcher as those of the ops: sums of weights of one size, each by a program of its own."""
    table = torch.tensor([weight.data_ptr() for weight in weights])
    out = torch.empty(len(weights))
    _sums_kernel[(len(weights) if launched is None else launched,)](table, out, weights[0].numel(), extra, BLOCK=BLOCK)
    return out


def on(gpu: Gpu, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return driver.on(gpu, "filter_norms", function)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_addresses_in_tables_are_followed(arch: str) -> None:
    gpu, before = Gpu(arch), set(driver.memory().blocks)
    storage = torch.randn(200)
    weights = [storage[i : i + 50] for i in (0, 51, 150)]  # at odd places of one storage
    result = on(gpu, sums)(weights)
    torch.testing.assert_close(result, torch.stack([weight.sum() for weight in weights]))
    assert result.data_ptr() < driver.GLOBAL_BASE or result.data_ptr() > driver.GLOBAL_BASE + driver.CAPACITY
    assert [stats.blocks for stats in gpu.stats] == [3]
    assert set(driver.memory().blocks) <= before  # all of it was given back


def test_reading_past_the_end_is_reported() -> None:
    with pytest.raises(PtxError, match="outside every global allocation"):
        on(Gpu("sm_80"), sums)([torch.randn(40)], 1)


def test_what_was_not_written_is_reported() -> None:
    with pytest.raises(AssertionError, match="4 of 12 bytes of a result were not written"):
        on(Gpu("sm_80"), lambda weights: sums(weights, 0, 2))([torch.randn(8)] * 3)
    with pytest.raises(PtxError, match="uninitialised"):
        on(Gpu("sm_80"), lambda weights: sums([torch.empty(8)]))([])


def test_tensors_beside_the_device_are_refused() -> None:
    outside, out = torch.zeros(8, dtype=torch.int64), torch.randn(8)

    def launcher(weights: Sequence[Tensor]) -> Tensor:
        _sums_kernel[(1,)](outside, out, 8, 0, BLOCK=BLOCK)
        return out

    with pytest.raises(AssertionError, match="not on the device"):
        on(Gpu("sm_80"), launcher)([])


def test_written_arguments_come_back() -> None:
    def update(weights: Sequence[Tensor], rate: float, ord: int, mask: Tensor) -> None:
        mask.logical_not_()

    for function in (
        driver.on(Gpu("sm_80"), "update_filter_masks_", update),
        moved("update_filter_masks_", update, "cpu"),
    ):
        mask = torch.tensor([True, False, True])
        function([torch.randn(3, 2)], 0.5, 1, mask)
        assert mask.tolist() == [False, True, False]


def test_ops_moved_to_a_device_keep_strides_and_offsets() -> None:
    weight = torch.randn(3 * 4 * 9 + 1)[1:].view(3, 4, 3, 3).to(memory_format=torch.channels_last)
    seen: list[Tensor] = []
    moved("filter_norms", lambda weights, ord: seen.extend(weights), "cpu")([weight, weight[1:]], 1)
    for there, here in zip(seen, [weight, weight[1:]]):
        assert torch.equal(there, here)
        assert (there.stride(), there.storage_offset()) == (here.stride(), here.storage_offset())
        assert there.data_ptr() != here.data_ptr()
    norms = moved("filter_norms", torch.ops.fastprune.filter_norms, "cpu")([weight], 1)
    assert torch.equal(norms, ops.filter_norms([weight]))
