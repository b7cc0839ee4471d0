"""The ops' launchers on every GPU: values, streams, the device guard and CUDA graphs, for each implementation.

Where there is no GPU the same runs on the CPU, with a fake of what is CUDA's (fake_cuda.py): that tests these tests.
FASTPRUNE_NEEDS_GPU=1 makes it an error.
"""

from __future__ import annotations

import functools
import gc
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import cases
import pytest
import rows
import torch
from device import CudaDevice
from fake_cuda import FakeDevice
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastprune import ops

GPUS = [CudaDevice(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
if not GPUS and os.environ.get("FASTPRUNE_NEEDS_GPU") == "1":
    raise RuntimeError(f"torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU")
DEVICES = GPUS or [FakeDevice()]
SHAPES = [(40, 16, 3, 3), (24, 40), (9, 5, 3, 1), (16, 3, 7, 7)]
RATE = 0.6


@dataclass(frozen=True)
class Inputs:
    """Of all ops; what an op writes to is among them."""

    weights: list[Tensor]
    mask: Tensor
    scores: Tensor
    upstream: list[Tensor]
    params: list[Tensor]
    momenta: list[Tensor]
    masked: list[Tensor]
    lr: Tensor
    filter_decay: Tensor
    norms: Tensor
    channel_norms: Tensor
    updated: Tensor

    def to(self, device: torch.device) -> Inputs:
        """A copy on the device."""
        moved: list[Any] = []
        for field in fields(self):
            value = getattr(self, field.name)
            copies = [tensor.to(device, copy=True) for tensor in tree_leaves(value)]
            moved.append(copies if isinstance(value, list) else copies[0])
        return Inputs(*moved)

    def copy_(self, other: Inputs) -> None:
        """Take over the other's values."""
        for mine, theirs in zip(tree_leaves(list(vars(self).values())), tree_leaves(list(vars(other).values()))):
            mine.copy_(theirs)


def inputs(seed: int) -> Inputs:
    weights, upstream, momenta = (cases.random_weights(SHAPES, seed=seed + i) for i in range(3))
    mask = cases.random_mask(SHAPES, seed)
    return Inputs(
        weights=weights,
        mask=mask,
        scores=weights[0].flatten().clone(),
        upstream=[tensor.bfloat16() for tensor in upstream],
        params=[*(weight.clone() for weight in weights), torch.ones(7)],
        momenta=[*momenta, torch.ones(7)],
        masked=[torch.zeros_like(weight, dtype=torch.bfloat16) for weight in weights],
        lr=torch.full((), 0.01 * (1 + seed % 20), dtype=torch.float64),
        filter_decay=0.1 * mask.float(),
        norms=torch.zeros(len(mask)),
        channel_norms=torch.zeros(sum(weight.shape[1] for weight in weights)),
        updated=torch.zeros_like(mask),
    )


def masked_weights(x: Inputs) -> Any:
    leaves = [weight.detach().requires_grad_() for weight in x.weights]
    masked = ops.masked_weights(leaves, x.mask, torch.bfloat16)
    return [tensor.detach() for tensor in masked], torch.autograd.grad(masked, leaves, x.upstream)


def hyper_weight(x: Inputs) -> Any:
    """The weights make a layer of 4 to 4·3·2·2, whatever they are."""
    flat = torch.cat([weight.flatten() for weight in x.weights])
    made = (flat[:4].clone(), flat[4:196].view(48, 4).clone(), flat[-48:].clone())
    leaves = [tensor.requires_grad_() for tensor in made]
    sizes = {"out_channels": 3, "in_channels": 2, "shape": (4, 3, 2, 2)}
    generated = ops.hyper_weight(*leaves, **sizes, dtype=torch.bfloat16, memory_format=torch.channels_last)
    upstream = x.upstream[0].flatten()[:24].view(3, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    return generated.detach(), torch.autograd.grad(generated, leaves, upstream)


def decorrelation(kind: str) -> Callable[[Inputs], Any]:
    def call(x: Inputs) -> Any:
        leaves = [weight.detach().requires_grad_() for weight in x.weights]
        penalty = ops.decorrelation(leaves, kind)
        return penalty.detach(), torch.autograd.grad(penalty, leaves, materialize_grads=True)

    return call


def sgd_step_(x: Inputs) -> Any:
    grads = [*x.weights, torch.full_like(x.params[-1], 0.5)]
    outputs = {"masked": x.masked, "norms": x.norms, "channel_norms": x.channel_norms}
    filters: dict[str, Any] = {"layers": len(x.masked), "mask": x.mask, "filter_decay": x.filter_decay, **outputs}
    ops.sgd_step_(x.params, grads, x.momenta, lr=x.lr, momentum=0.9, weight_decay=0.01, **filters)
    return x.params, x.momenta, x.masked, x.norms, x.channel_norms


# By name, the ops that serve a call, and the call; it returns all it has written.
CALLS: dict[str, tuple[list[str], Callable[[Inputs], Any]]] = {
    "filter_norms": (["filter_norms"], lambda x: ops.filter_norms(x.weights)),
    "kth_threshold": (["kth_threshold"], lambda x: ops.kth_threshold(x.scores, 7)),
    "filter_mask": (["filter_mask"], lambda x: ops.filter_mask(x.weights, RATE)),
    "update": (["update_filter_masks_"], lambda x: ops.update_filter_masks_(x.weights, RATE, x.updated)),
    "weight_mask": (["weight_mask"], lambda x: ops.weight_mask(x.weights, RATE)),
    "hyper_weight": (["hyper_weight", "hyper_weight_backward"], hyper_weight),
    "masked_weights": (["masked_weights", "masked_weights_backward"], masked_weights),
    "sgd_step": (["sgd_step_"], sgd_step_),
    **{kind: (["decorrelation", "decorrelation_backward"], decorrelation(kind)) for kind in ops.DECORRELATION_KINDS},
}


def parameters() -> Iterator[Any]:
    for device in DEVICES:
        for name, (served, _) in CALLS.items():
            for implementation, backend in rows.implementations(device, served).items():
                yield pytest.param(device, name, backend, id=f"{device.name}-{name}-{implementation}")


EVERY = pytest.mark.parametrize(("device", "name", "backend"), list(parameters()))


def expected(name: str, seed: int) -> list[Tensor]:
    """The reference's, on the CPU."""
    with cases.active(cases.REFERENCE):
        return tree_leaves(CALLS[name][1](inputs(seed)))


def assert_right(results: Any, name: str, seed: int, device: CudaDevice) -> None:
    device.synchronize()
    for result, want in zip(tree_leaves(results), expected(name, seed), strict=True):
        assert result.device == device.name
        if want.dtype == torch.bool:
            assert torch.equal(result.cpu(), want)
        else:
            cases.assert_near(result.cpu(), want.double(), name)


def seed_of(name: str) -> int:
    return zlib.crc32(name.encode()) % 1000


@EVERY
def test_values(device: CudaDevice, name: str, backend: str) -> None:
    """The current device is the first GPU, whichever the tensors are on."""
    seed = seed_of(name)
    with rows.chosen(backend):
        assert_right(CALLS[name][1](inputs(seed).to(device.name)), name, seed, device)


@EVERY
def test_on_streams(device: CudaDevice, name: str, backend: str) -> None:
    """Calls on two streams at once, each behind work that brings its inputs late: nothing is read before, or shared."""
    seeds = [seed_of(name), seed_of(name) + 10]
    there = [inputs(0).to(device.name) for _ in seeds]
    late = [inputs(seed).to(device.name) for seed in seeds]
    device.synchronize()
    results = []
    with rows.chosen(backend):
        for mine, fresh in zip(there, late):
            with device.stream():
                for _ in range(50):
                    device.flush()  # some milliseconds
                mine.copy_(fresh)
                results.append(CALLS[name][1](mine))
    for result, seed in zip(results, seeds):
        assert_right(result, name, seed, device)


@EVERY
def test_in_a_graph(device: CudaDevice, name: str, backend: str) -> None:
    """Replays compute with the values that are there then: nothing of a call was decided on the host."""
    there = inputs(0).to(device.name)
    with rows.chosen(backend):
        replay = device.capture(lambda: CALLS[name][1](there))
        for seed in (seed_of(name), seed_of(name) + 10):
            there.copy_(inputs(seed).to(device.name))
            assert_right(replay(), name, seed, device)


@EVERY
def test_graphs_without_warm_up_and_eager_calls(device: CudaDevice, name: str, backend: str) -> None:
    """Two graphs and eager calls on the same tensors, many on others in between: none relies on what another left."""
    seed, call = seed_of(name), CALLS[name][1]
    mine, other = inputs(0).to(device.name), inputs(0).to(device.name)

    def captured() -> Callable[[], Any]:
        order = iter([other] * device.warmup_calls + [mine])
        return device.capture(lambda: call(next(order)))

    with rows.chosen(backend):
        replays = [captured(), captured()]
        mine.copy_(inputs(seed).to(device.name))
        assert_right(call(mine), name, seed, device)
        many = [inputs(0).to(device.name) for _ in range(70 if GPUS else 1)]
        kept = [call(x) for x in many]  # all of them at addresses of their own
        for replay in reversed(replays):
            mine.copy_(inputs(seed + 10).to(device.name))
            assert_right(replay(), name, seed + 10, device)
        del kept


@EVERY
def test_two_streams_on_the_same_tensors(device: CudaDevice, name: str, backend: str) -> None:
    """The second stream does not wait for the first, which is late: it has read nothing that the first has to bring."""
    seed = seed_of(name)
    first, other = (inputs(seed).to(device.name) for _ in range(2))
    written = {field: getattr(other, field) for field in ("params", "momenta", "masked", "norms", "updated")}
    device.synchronize()
    results = []
    with rows.chosen(backend):
        for mine, flushes in ((first, 50), (replace(first, **written), 0)):
            with device.stream():
                for _ in range(flushes):
                    device.flush()
                results.append(CALLS[name][1](mine))
    for result in results:
        assert_right(result, name, seed, device)


@pytest.mark.skipif(not GPUS, reason="there is no GPU whose memory could be looked at")
def test_graphs_that_are_gone_leave_no_memory() -> None:
    (device, *_), taken = GPUS, []
    there = inputs(0).to(device.name)
    with rows.chosen("triton"):
        for _ in range(20):
            for _, call in CALLS.values():
                device.capture(functools.partial(call, there))
            gc.collect()
            device.synchronize()
            host = torch.cuda.host_memory_stats()["active_bytes.current"]
            taken.append((torch.cuda.memory_allocated(device.name), host))
    assert taken[-1] == taken[4]


def test_every_op_is_among_the_calls() -> None:
    assert {op for served, _ in CALLS.values() for op in served} == {entry.op for entry in ops.backends()}


def test_a_wrong_result_is_seen() -> None:
    """Of inputs that came late, of another seed, or from a graph that kept what it was captured with."""
    for name, (_, call) in CALLS.items():
        with pytest.raises(AssertionError):
            assert_right(call(inputs(0).to(DEVICES[0].name)), name, seed_of(name), DEVICES[0])
