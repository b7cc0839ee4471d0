"""The compute dtype of training: what ``auto`` comes to on this machine, for this network.

Processors say whether they have bfloat16 arithmetic, but not whether PyTorch uses it: oneDNN can be told to leave it
alone (``ONEDNN_MAX_CPU_ISA``), and where it is emulated a training step takes ten times as long as in float32. So one
convolution is timed in both. The measurement overrules what the processor says when it is clear, that is by more than
``NOISE``; within that, the processor decides, so that runs on one machine agree.
"""

from __future__ import annotations

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from . import distributed

__all__ = ["DTYPES", "NOISE", "Choice", "Precision", "PrecisionOrAuto", "choose"]

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionOrAuto = Literal["auto", "fp32", "bf16", "fp16"]
DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NOISE = 1.1  # ratios of two timings that are nearer to 1 say nothing
_CALL_S = 0.012  # of a float32 call, which emulated bfloat16 makes ten times as long
_MEASURE_S = 0.3  # of all calls, unless the fewest rounds take longer
_LEAST_ROUNDS, _MOST_ROUNDS = 3, 30


@dataclass(frozen=True)
class Choice:
    """What ``auto`` came to, and why, for people."""

    precision: Precision
    why: str


def choose(model: nn.Module, shape: Sequence[int], memory_format: torch.memory_format) -> Choice:
    """Decide between float32 and bfloat16, in less than a second.

    Times the kind of convolution that takes the most multiply-accumulates, forward and backward, in both. The first
    process decides, for all. Neither the model nor any generator of random numbers changes.

    Args:
        model: on its device; called once, with one image, in eval mode.
        shape: `[B, C, H, W]`, of the batches that one process passes through it. Fewer images may be timed.
        memory_format: of images and weights.

    Raises:
        ValueError: if the model has no convolution.
        PeerError: if the first process failed.
    """
    with distributed.together():
        choice = _choose(model, shape, memory_format) if distributed.is_first() else None
    precision, why = distributed.from_first((choice.precision, choice.why) if choice is not None else None)
    return Choice(precision, why)


def _choose(model: nn.Module, shape: Sequence[int], memory_format: torch.memory_format) -> Choice:
    device = next(model.parameters()).device
    native = native_bf16(device)
    convolution, inputs = costliest_convolution(model, shape)
    hardware = f"this {'GPU' if device.type == 'cuda' else 'CPU'} has {native or 'no bf16 arithmetic'}"
    try:
        seconds = time_both(convolution, (shape[0], *inputs), memory_format)
    except RuntimeError as error:
        return Choice("fp32", f"bf16 and fp32 could not be compared: {str(error).splitlines()[0]}")
    timings = ", ".join(f"{1e3 * seconds[name]:.2f} ms in {name}" for name in ("fp32", "bf16"))
    return Choice(decide(native is not None, seconds), f"{convolution} took {timings}; {hardware}")


def decide(native: bool, seconds: Mapping[str, float]) -> Precision:
    """Return what to train in: what the processor suggests, unless the other is clearly faster.

    Args:
        native: whether the processor has bfloat16 arithmetic.
        seconds: of the same work in ``fp32`` and in ``bf16``.
    """
    gain = seconds["fp32"] / seconds["bf16"]
    if native:
        return "fp32" if gain < 1 / NOISE else "bf16"
    return "bf16" if gain > NOISE else "fp32"


def native_bf16(device: torch.device) -> str | None:
    """Return the name of the device's bfloat16 arithmetic, None where it has none."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"bf16 of sm_{major}{minor}" if major >= 8 else None
    features = torch.cpu.get_capabilities()
    names = {"amx_bf16": "AMX-bf16", "avx512_bf16": "AVX512-BF16"}
    return next((name for feature, name in names.items() if features.get(feature)), None)


def costliest_convolution(model: nn.Module, shape: Sequence[int]) -> tuple[nn.Conv2d, tuple[int, int, int]]:
    """Return a convolution of the kind that takes the most multiply-accumulates, and `(C, H, W)` of its input.

    Raises:
        ValueError: if the model has none.
    """
    macs: Counter[tuple[str, tuple[int, ...]]] = Counter()  # of all alike, by what they print and their input
    found: dict[tuple[str, tuple[int, ...]], nn.Conv2d] = {}

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        kind = str(module), tuple(inputs[0].shape[1:])
        macs[kind] += output.numel() * module.weight[0].numel()
        found.setdefault(kind, module)

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(torch.zeros(1, *shape[1:], device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    if not macs:
        raise ValueError("the model has no convolution to time: name a precision instead of auto")
    kind, _ = macs.most_common(1)[0]
    channels, height, width = kind[1]
    return found[kind], (channels, height, width)


def time_both(convolution: nn.Conv2d, shape: Sequence[int], memory_format: torch.memory_format) -> dict[str, float]:
    """Return the seconds of a call, forward and backward, in each precision.

    The calls take turns and the shortest of each counts, so that what else the machine does meets both alike.

    Args:
        convolution: on its device.
        shape: `[B, C, H, W]` of its input; fewer images where they would take too long.
        memory_format: of images and weights.

    Raises:
        RuntimeError: where one of them cannot run.
    """
    device = convolution.weight.device
    one = _call(convolution, (1, *shape[1:]), torch.float32, memory_format)
    one()
    images = max(1, min(shape[0], int(_CALL_S / _seconds(one, device))))
    calls = {name: _call(convolution, (images, *shape[1:]), DTYPES[name], memory_format) for name in ("fp32", "bf16")}
    for call in calls.values():
        call()  # the first one compiles
    best = dict.fromkeys(calls, math.inf)
    started = time.perf_counter()
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _LEAST_ROUNDS and time.perf_counter() - started > _MEASURE_S:
            break
        for name, call in calls.items():
            best[name] = min(best[name], _seconds(call, device))
    return best


def _call(
    convolution: nn.Conv2d, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format
) -> Callable[[], object]:
    """Return the convolution of random images, forward and backward, with nothing to cast."""
    device = convolution.weight.device
    generator = torch.Generator(device).manual_seed(0)

    def random(shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype, memory_format=memory_format)

    ours = copy.deepcopy(convolution).to(dtype=dtype, memory_format=memory_format)  # type: ignore[call-overload]
    x = random(shape).requires_grad_()
    gradient = random(ours(x).shape)
    return lambda: torch.autograd.grad(ours(x), (x, ours.weight), gradient)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - started
