"""A fault of PyTorch's convolutions on CPUs with AVX2 alone, and the way around it; see docs/known_problems.md.

oneDNN's weight gradient of a narrow strided 1×1 convolution of float32 images in channels_last writes outside of its
memory, and so does that of a transposed one with few output channels. With both operands in contiguous format another
kernel runs, which does not.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["at_risk", "is_affected", "may_be_affected", "protect", "safe_operands", "unsafe_layers"]

_NARROW = 8  # channels of a group: fewer than a vector of AVX2 holds
# Four sizes, so that something that matters lies behind at least one of the buffers.
_PROBE = """
import torch
torch.set_num_threads(1)
for i in range(60):
    for channels in (3, 5, 6, 7):
        x = torch.randn(2, channels, 16, 16).to(memory_format=torch.channels_last)
        weight = torch.randn(64, channels, 1, 1, requires_grad=True)
        torch.nn.functional.conv2d(x, weight, stride=2).sum().backward()
        junk = [torch.empty(7) for _ in range(20)]
"""
_affected: bool | None = None  # what is_affected() found; None before


def _has_form(kernel: tuple[int, ...], stride: tuple[int, ...], channels: int) -> bool:
    return channels < _NARROW and all(size == 1 for size in kernel) and any(step > 1 for step in stride)


def at_risk(model: nn.Module) -> dict[str, nn.Conv2d | nn.ConvTranspose2d]:
    """The convolutions of a model that have the form: 1×1, a stride above 1, fewer than 8 channels in a group.

    These are the input's; of a transposed convolution, the output's.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))
        and _has_form(
            module.kernel_size,
            module.stride,
            (module.out_channels if module.transposed else module.in_channels) // module.groups,
        )
    }


def may_be_affected() -> bool:
    """Whether oneDNN takes its kernels of AVX2 here: on CPUs without AVX-512, or told to by ``ONEDNN_MAX_CPU_ISA``."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()):
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    return limit.startswith("AVX2") or (not torch.cpu._is_avx512_supported() and limit not in ("SSE41", "AVX"))


_MAY_BE_AFFECTED = may_be_affected()  # a forward that is compiled can ask for nothing


def is_affected() -> bool:
    """Whether such a layer corrupts memory here: tried in a child process, once, where oneDNN uses AVX2.

    The answer is said as a warning if it is yes, or if the child could not tell, which counts as yes. Processes started
    from here inherit it.
    """
    global _affected
    if _affected is None:
        _affected = may_be_affected() and _probe()
    return _affected


@cache
def _probe() -> bool:
    variable = "FASTPRUNE_NARROW_CONVOLUTIONS"  # "torch's version: safe" or "…: faulty", for this process's children
    known = os.environ.get(variable, "")
    if known in (f"{torch.__version__}: safe", f"{torch.__version__}: faulty"):
        return known.endswith("faulty")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_CHECK_": "3"}
    command = [sys.executable or "python3", "-c", _PROBE]
    try:
        status = subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode
        reason = f"a child process that trained one ended with status {status}"
    except (OSError, subprocess.TimeoutExpired) as error:
        status, reason = 1, f"a child process to try it: {error}"
    outcome = "faulty" if status else "safe"
    if status:
        corrupts = "corrupts" if status < 0 else "may corrupt"  # by a signal, or it could not be tried
        warnings.warn(
            f"PyTorch {torch.__version__} {corrupts} memory on this CPU in the weight gradient of 1×1 convolutions "
            f"with a stride and fewer than {_NARROW} input channels, float32, channels_last ({reason}). fastprune "
            f"computes such layers in contiguous format; see docs/known_problems.md",
            RuntimeWarning,
            stacklevel=3,
        )
    os.environ[variable] = f"{torch.__version__}: {outcome}"
    return outcome == "faulty"


def safe_operands(input: Tensor, weight: Tensor, stride: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Input and weight of a convolution, in contiguous format if its weight gradient would corrupt memory here.

    Call it right before ``conv2d``. It returns what it was given, at the price of a comparison, for all other layers,
    dtypes and devices, where no gradient is wanted, and while torch.fx or torch.jit traces. Nothing is tried while a
    forward is compiled: where nothing is known by then, a CPU that may be affected counts as affected.
    """
    if (
        not isinstance(input, Tensor)
        or torch.jit.is_tracing()
        or not _has_form(tuple(weight.shape[2:]), stride, weight.shape[1])
    ):
        return input, weight
    if input.device.type != "cpu" or input.dtype != torch.float32 or weight.dtype != torch.float32:
        return input, weight
    if torch.compiler.is_compiling():
        affected = _MAY_BE_AFFECTED if _affected is None else _affected
        return (_plain(input), _plain(weight)) if affected else (input, weight)
    if not (torch.is_grad_enabled() and weight.requires_grad) or torch.is_autocast_enabled("cpu"):
        return input, weight
    if (_is_plain(input) and _is_plain(weight)) or not is_affected():
        return input, weight
    return _plain(input), _plain(weight)


def _is_plain(tensor: Tensor) -> bool:
    # By its strides, as PyTorch does: a tensor with one channel or pixel is contiguous in both formats.
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
        if stride != expected:
            return False
        expected *= size
    return True


def _plain(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(tensor.shape)


def unsafe_layers(model: nn.Module) -> list[str]:
    """The names of a model's layers on the CPU that are at risk, if this machine is affected."""
    names = [name for name, layer in at_risk(model).items() if layer.weight.device.type == "cpu"]
    return names if names and is_affected() else []


def protect(model: nn.Module) -> list[str]:
    """Let the layers of a model that are at risk here compute in contiguous format when it is trained on a CPU.

    Args:
        model: edited in place, if this machine is affected: a forward pre-hook makes the weights and inputs of its
            layers at risk contiguous. (Of a layer whose forward uses others than its weight and its input, it cannot.)

    Returns:
        The names of these layers.
    """
    names = unsafe_layers(model)
    layers = at_risk(model)
    for layer in (layers[name] for name in names):
        if getattr(layer, "calls_safe_operands", False):
            continue
        _lay_out(layer.weight)
        if _contiguous_operands not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_contiguous_operands, with_kwargs=True)
    return names


def is_protection(hook: object) -> bool:
    """Whether it is the hook of :func:`protect`, which changes nothing but the layout of what a layer reads."""
    return hook is _contiguous_operands


def _lay_out(weight: Tensor) -> None:
    if not _is_plain(weight):
        weight.data = _plain(weight.data)


def _contiguous_operands(
    layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    assert isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
    image = arguments[0] if arguments else named["input"]
    safe, weight = safe_operands(image, layer.weight, layer.stride)
    if weight is not layer.weight and not torch.compiler.is_compiling():
        _lay_out(layer.weight)  # the model was moved to channels_last, or loaded, since
    if safe is image:
        return arguments, named
    return ((safe, *arguments[1:]), named) if arguments else (arguments, {**named, "input": safe})
