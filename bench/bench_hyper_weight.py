"""hyper_weight: the weights of a PruningNet's two largest layers for random widths, and their gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import baselines
import device as devices
import pytest
import torch
from layers import SEED, Measure, Network, Ready, Work
from torch import Tensor

from fastprune import ops

HIDDEN = 32  # H
WIDTHS = 4  # that a timed call goes through
MORE_WIDTHS = 12  # that the promised ratio is measured over
AT_LEAST = 2.0  # times "original", on the CPU


@dataclass(frozen=True)
class Hyper:
    """A layer that generates weights."""

    hidden: Tensor  # [H]
    weight: Tensor  # [O·I·kh·kw, H]
    bias: Tensor  # [O·I·kh·kw]
    shape: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias


Generate = Callable[[Hyper, int, int], Tensor]  # the weight of these numbers of out- and in-channels


def ours(layer: Hyper, out_channels: int, in_channels: int) -> Tensor:
    sizes = {"out_channels": out_channels, "in_channels": in_channels}
    return ops.hyper_weight(*layer.tensors, **sizes, shape=layer.shape)


def function_of(rival: str) -> Generate:
    if rival == "fastprune":
        return ours
    generate = {"original": baselines.original_hyper, "pytorch": baselines.pytorch_hyper}.get(
        rival, baselines.compiled(baselines.pytorch_hyper)
    )
    return lambda layer, *sizes: generate(*layer.tensors, layer.shape, *sizes)


def layers_of(network: Network) -> list[Hyper]:
    """Of its two largest shapes."""
    shapes = sorted({tuple(weight.shape) for weight in network.weights}, key=lambda shape: torch.Size(shape).numel())
    generator = torch.Generator().manual_seed(SEED)
    layers, device = [], network.weights[0].device
    for shape in shapes[-2:]:
        rows = torch.Size(shape).numel()
        made = (torch.randn(size, generator=generator) for size in ((HIDDEN,), (rows, HIDDEN), (rows,)))
        layers.append(Hyper(*(tensor.to(device).requires_grad_() for tensor in made), shape))
    return layers


def widths_of(layer: Hyper, count: int) -> list[tuple[int, int]]:
    """Random ones of MetaPruning's 31 scales, 0.10 to 1."""
    choices = torch.randint(0, 31, (count, 2), generator=torch.Generator().manual_seed(SEED)).tolist()
    scaled = [[max(1, size * (10 + 3 * c) // 100) for size, c in zip(layer.shape, pair)] for pair in choices]
    return [(out_channels, in_channels) for out_channels, in_channels in scaled]


def gradients(generate: Generate, layer: Hyper, sizes: tuple[int, int], upstream: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(generate(layer, *sizes), layer.tensors, upstream)


def ratio(device: devices.Device, layers: Sequence[Hyper]) -> float:
    """How many times the time of ours "original" takes over random widths, one measured right after the other."""
    times = {"fastprune": 0.0, "original": 0.0}
    for layer in layers:
        for sizes in widths_of(layer, MORE_WIDTHS):
            upstream = torch.ones(*sizes, *layer.shape[2:], device=layer.weight.device)
            repeats = 25 if layer.weight.numel() < 1e7 else 2  # the least of them is taken
            taken: dict[str, list[float]] = {rival: [] for rival in times}
            for _, rival in itertools.product(range(repeats), times):
                call = function_of(rival)
                start = device.timer()
                gradients(call, layer, sizes, upstream)
                taken[rival].append(device.timer() - start)
            for rival, each in taken.items():
                times[rival] += min(each)
    return times["original"] / times["fastprune"]


@pytest.mark.rivals(
    "fastprune", "pytorch", "original", ops=["hyper_weight", "hyper_weight_backward"], gpu=["torch.compile"]
)
def test_hyper_weight(
    measure: Measure,
    ready: Ready,
    network: Network,
    rival: str,
    device: devices.Device,
    capsys: pytest.CaptureFixture[str],
) -> None:
    layers, generate = layers_of(network), function_of(rival)
    steps = [(layer, sizes) for layer in layers for sizes in widths_of(layer, WIDTHS)]
    upstream = [torch.randn(*sizes, *layer.shape[2:], device=layer.weight.device) for layer, sizes in steps]
    for (layer, sizes), grad in zip(steps[::WIDTHS], upstream[::WIDTHS]):
        expected = gradients(function_of("original"), layer, sizes, grad)
        for result, want in zip(gradients(generate, layer, sizes, grad), expected):
            torch.testing.assert_close(result, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        torch.testing.assert_close(generate(layer, *sizes), function_of("original")(layer, *sizes))

    def call() -> None:
        for (layer, sizes), grad in zip(steps, upstream):
            gradients(generate, layer, sizes, grad)

    # The wanted rows are read twice, and a gradient of all rows is written once.
    wanted = sum(grad.numel() for grad in upstream)
    moved = 4 * (HIDDEN * (2 * wanted + WIDTHS * sum(layer.weight.shape[0] for layer in layers)))
    measure("hyper_weight fwd+bwd", network, ready(call), Work(moved, 6 * HIDDEN * wanted), seconds=1.5)
    if rival == "original" and isinstance(device, devices.CpuDevice):
        faster = ratio(device, layers)
        verdict = "PASS" if faster >= AT_LEAST else "FAIL"
        with capsys.disabled():
            print(
                f"\n{verdict}  hyper_weight fwd+bwd {network.name}: {faster:.2f}× original (expected ≥ {AT_LEAST:g}×),"
            )
            print(f"      one after the other over {MORE_WIDTHS} random widths of each of {len(layers)} layers")
