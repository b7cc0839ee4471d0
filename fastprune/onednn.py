"""A fault of PyTorch's convolutions on CPUs with AVX2 alone, and the way around it; see docs/known_problems.md.

oneDNN's weight gradient of a narrow strided 1×1 convolution of float32 images in channels_last writes outside of its
memory. With both operands in contiguous format another kernel runs, which does not.
"""

import os
import subprocess
import sys
import warnings
from functools import cache

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


def at_risk(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of a model that have the form: 1×1, a stride above 1, fewer than 8 channels in a group."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and _has_form(module.kernel_size, module.stride, module.in_channels // module.groups)
    }


def may_be_affected() -> bool:
    """Whether oneDNN takes its kernels of AVX2 here: on CPUs without AVX-512, or told to by ``ONEDNN_MAX_CPU_ISA``."""
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_avx2_supported()):
        return False
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
    return limit.startswith("AVX2") or (not torch.cpu._is_avx512_supported() and limit not in ("SSE41", "AVX"))


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
    try:
        child = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, timeout=60)
        outcome = {0: "safe"}.get(child.returncode, "faulty")
        reason = f"a child process that trained one ended with status {child.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        outcome, reason = "faulty", f"a child process to try it did not end: {error}"
    if outcome == "faulty":
        warnings.warn(
            f"PyTorch {torch.__version__} corrupts memory on this CPU in the weight gradient of 1×1 convolutions with "
            f"a stride and fewer than {_NARROW} input channels, float32, channels_last ({reason}). fastprune computes "
            f"such layers in contiguous format; see docs/known_problems.md",
            RuntimeWarning,
            stacklevel=3,
        )
    os.environ[variable] = f"{torch.__version__}: {outcome}"
    return outcome == "faulty"


def safe_operands(input: Tensor, weight: Tensor, stride: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Input and weight of a convolution, in contiguous format if its weight gradient would corrupt memory here.

    Call it right before ``conv2d``. It returns what it was given, at the price of a comparison, for all other layers,
    dtypes and devices, where no gradient is wanted, and while torch.fx or torch.jit traces. A compiled forward has
    what is known when it is compiled: run the model once, or call :func:`is_affected`, before.
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
        return (_plain(input), _plain(weight)) if _affected else (input, weight)
    if not (torch.is_grad_enabled() and weight.requires_grad) or torch.is_autocast_enabled("cpu"):
        return input, weight
    if (_is_plain(input) and _is_plain(weight)) or not is_affected():
        return input, weight
    return _plain(input), _plain(weight)


def _is_plain(tensor: Tensor) -> bool:
    # By its strides, as PyTorch does: a tensor with one channel or pixel is contiguous in both formats.
    _, channels, height, width = tensor.shape
    return tensor.stride() == (channels * height * width, height * width, width, 1)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(tensor.shape)


def unsafe_layers(model: nn.Module) -> list[str]:
    """The names of a model's layers on the CPU that are at risk, if this machine is affected."""
    names = [name for name, layer in at_risk(model).items() if layer.weight.device.type == "cpu"]
    return names if names and is_affected() else []


def protect(model: nn.Module) -> list[str]:
    """Let the layers of a model that are at risk here compute in contiguous format when it is trained on a CPU.

    Args:
        model: edited in place, if this machine is affected: the weights of its layers at risk become
            contiguous, and so do their inputs, by a forward pre-hook. Move it to channels_last before.

    Returns:
        The names of these layers.
    """
    names = unsafe_layers(model)
    for layer in map(model.get_submodule, names):
        assert isinstance(layer, nn.Conv2d)
        if type(layer).forward is nn.Conv2d.forward:  # masked layers do it themselves
            layer.weight.data = _plain(layer.weight.data)
            if _contiguous_input not in layer._forward_pre_hooks.values():
                layer.register_forward_pre_hook(_contiguous_input)
    return names


def _contiguous_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    assert isinstance(layer, nn.Conv2d)
    return (safe_operands(inputs[0], layer.weight, layer.stride)[0], *inputs[1:])
