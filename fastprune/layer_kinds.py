"""What a saved network may be made of: modules and their arguments, functions, methods, and words.

Nothing else is built when a file is loaded, whatever the file says.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .nn import MaskedConv2d
from .scatter import Scatter
from .torchvision_layers import frozen_batch_norm, stochastic_depth

__all__ = ["ATTRIBUTES", "DTYPES", "FUNCTIONS", "METHODS", "MODULES", "WORDS", "ModuleKind", "is_number", "kind_of"]

_LARGEST = 2**31  # of a size

Check = Callable[[Any], bool]


def is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether it is an int or a finite float in range; a bool is not."""
    finite = type(value) is int or (type(value) is float and math.isfinite(value))
    return finite and least <= value <= most


def _int(least: int) -> Check:
    return lambda value: type(value) is int and least <= value < _LARGEST


def _ints(least: int) -> Check:
    one = _int(least)
    return lambda value: one(value) or (type(value) is tuple and 0 < len(value) <= 6 and all(map(one, value)))


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _word(*words: str) -> Check:
    return lambda value: type(value) is str and value in words


def _bool(value: Any) -> bool:
    return type(value) is bool


def _never(value: Any) -> bool:
    return value is False


def _padding(value: Any) -> bool:
    return _ints(0)(value) or _word("same", "valid")(value)


def _sizes(value: Any) -> bool:
    """Of an output: an int, None, or a tuple of either."""
    one = _or_none(_int(0))
    return one(value) or (type(value) is tuple and 0 < len(value) <= 3 and all(map(one, value)))


def _factors(value: Any) -> bool:
    return is_number(value, 0, 1000) or (type(value) is tuple and 0 < len(value) <= 3 and all(map(_factors, value)))


_count, _dim, _share = _int(1), _int(-_LARGEST), lambda value: is_number(value, 0, 1)
_flag: dict[str, Check] = {"inplace": _bool}
_convolution: dict[str, Check] = {
    "in_channels": _count,
    "out_channels": _count,
    "kernel_size": _ints(1),
    "stride": _ints(1),
    "padding": _padding,
    "dilation": _ints(1),
    "groups": _count,
    "bias": _bool,
    "padding_mode": _word("zeros", "reflect", "replicate", "circular"),
}
_transposed = {**_convolution, "output_padding": _ints(0), "padding_mode": _word("zeros")}
_statistics: dict[str, Check] = {
    "num_features": _count,
    "eps": is_number,
    "momentum": _or_none(is_number),
    "affine": _bool,
    "track_running_stats": _bool,
}
_max_pool: dict[str, Check] = {
    "kernel_size": _ints(1),
    "stride": _ints(1),
    "padding": _ints(0),
    "dilation": _ints(1),
    "ceil_mode": _bool,
    "return_indices": _never,
}
_average_pool: dict[str, Check] = {
    "kernel_size": _ints(1),
    "stride": _ints(1),
    "padding": _ints(0),
    "ceil_mode": _bool,
    "count_include_pad": _bool,
}

_upsample: dict[str, Check] = {
    "size": _or_none(_ints(1)),
    "scale_factor": _or_none(_factors),
    "align_corners": _or_none(_bool),
    "mode": _word("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear"),
}
_alpha: dict[str, Check] = {"alpha": is_number, **_flag}
_axis: dict[str, Check] = {"dim": _or_none(_dim)}
_adaptive: dict[str, Check] = {"output_size": _sizes}
_dropout: dict[str, Check] = {"p": _share, **_flag}

# Classes that take the same arguments, and those arguments.
_ARGUMENTS: list[tuple[tuple[type[nn.Module], ...], dict[str, Check]]] = [
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d, MaskedConv2d), _convolution),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d), _transposed),
    ((nn.Linear,), {"in_features": _count, "out_features": _count, "bias": _bool}),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d), _statistics),
    ((nn.GroupNorm,), {"num_groups": _count, "num_channels": _count, "eps": is_number, "affine": _bool}),
    ((nn.LayerNorm,), {"normalized_shape": _ints(1), "eps": is_number, "elementwise_affine": _bool, "bias": _bool}),
    ((nn.RMSNorm,), {"normalized_shape": _ints(1), "eps": _or_none(is_number), "elementwise_affine": _bool}),
    ((nn.LocalResponseNorm,), {"size": _count, "alpha": is_number, "beta": is_number, "k": is_number}),
    ((nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.SELU, nn.Hardswish, nn.Hardsigmoid), _flag),
    ((nn.Sigmoid, nn.Tanh, nn.Softsign, nn.LogSigmoid, nn.Identity), {}),
    ((nn.GELU,), {"approximate": _word("none", "tanh")}),
    ((nn.LeakyReLU,), {"negative_slope": is_number, **_flag}),
    ((nn.ELU, nn.CELU), _alpha),
    ((nn.Hardtanh,), {"min_val": is_number, "max_val": is_number, **_flag}),
    ((nn.Softplus,), {"beta": is_number, "threshold": is_number}),
    ((nn.PReLU,), {"num_parameters": _count}),
    ((nn.Softmax, nn.LogSoftmax), _axis),
    ((nn.GLU,), {"dim": _dim}),
    ((nn.MaxPool1d, nn.MaxPool2d), _max_pool),
    ((nn.AvgPool1d,), _average_pool),
    ((nn.AvgPool2d,), {**_average_pool, "divisor_override": _or_none(_count)}),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), _adaptive),
    ((nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d), {**_adaptive, "return_indices": _never}),
    ((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout), _dropout),
    ((nn.Flatten,), {"start_dim": _dim, "end_dim": _dim}),
    ((nn.ZeroPad2d,), {"padding": _ints(-_LARGEST)}),
    ((nn.ReflectionPad2d, nn.ReplicationPad2d), {"padding": _ints(0)}),
    ((nn.ConstantPad2d,), {"padding": _ints(-_LARGEST), "value": is_number}),
    ((nn.PixelShuffle,), {"upscale_factor": _count}),
    ((nn.PixelUnshuffle,), {"downscale_factor": _count}),
    ((nn.ChannelShuffle,), {"groups": _count}),
    ((nn.Upsample,), _upsample),
    ((Scatter,), {"channels": _count, "kept": _int(0)}),
]


@dataclass(frozen=True)
class ModuleKind:
    """A class of modules and the arguments that its constructor takes, each with what is allowed for it."""

    load: Callable[[], type[nn.Module]]  # the class: torchvision's is loaded when it is wanted
    arguments: dict[str, Check]

    @property
    def make(self) -> type[nn.Module]:
        """The class."""
        return self.load()

    def read(self, module: nn.Module) -> dict[str, Any]:
        """Return the arguments that made a module, from its attributes."""
        values = {name: getattr(module, name, None) for name in self.arguments}
        if "num_features" in values and values["num_features"] is None:  # torchvision's, which forgets it
            values["num_features"] = len(module.get_buffer("running_mean"))
        if "bias" in values:
            values["bias"] = values["bias"] is not None
        return {
            name: tuple(value) if isinstance(value, (list, torch.Size)) else value for name, value in values.items()
        }

    def wrong(self, arguments: dict[str, Any]) -> list[str]:
        """Return the names of arguments that are missing, unknown or not allowed."""
        unlike = self.arguments.keys() ^ arguments.keys()
        bad = [name for name, allowed in self.arguments.items() if name not in unlike and not allowed(arguments[name])]
        return sorted([*unlike, *bad])


def _loaded(kind: type[nn.Module]) -> Callable[[], type[nn.Module]]:
    return lambda: kind


MODULES = {kind.__name__: ModuleKind(_loaded(kind), arguments) for kinds, arguments in _ARGUMENTS for kind in kinds}
MODULES["StochasticDepth"] = ModuleKind(stochastic_depth, {"p": _share, "mode": _word("row", "batch")})
MODULES["FrozenBatchNorm2d"] = ModuleKind(frozen_batch_norm, {"num_features": _count, "eps": is_number})


def kind_of(module: nn.Module) -> str | None:
    """Return the name of a module's kind; None for a class that is not listed, or one derived of such."""
    name = type(module).__name__
    return name if name in MODULES and MODULES[name].make is type(module) else None


def _named(prefix: str, space: Any, names: str) -> dict[str, Any]:
    return {f"{prefix}.{name}": getattr(space, name) for name in names.split() if hasattr(space, name)}


_OPERATORS = "add sub mul truediv floordiv mod neg pow matmul getitem iadd isub imul itruediv"
_TORCH = """
    add sub mul div true_divide floor_divide neg abs exp log sqrt rsqrt square pow clamp relu sigmoid tanh softmax erf
    maximum minimum where matmul bmm cat concat stack split chunk unbind narrow flatten reshape permute transpose
    movedim unsqueeze squeeze mean sum amax amin var std roll relu_ sigmoid_ tanh_ clamp_ abs_ neg_ exp_ sqrt_ square_
"""
_FUNCTIONAL = """
    relu relu6 silu mish gelu selu elu celu leaky_relu prelu hardswish hardsigmoid hardtanh softplus softsign sigmoid
    tanh glu softmax log_softmax avg_pool2d max_pool2d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d
    conv1d conv2d conv_transpose2d linear batch_norm layer_norm group_norm instance_norm local_response_norm
    normalize pad interpolate pixel_shuffle pixel_unshuffle channel_shuffle scaled_dot_product_attention
    leaky_relu_ elu_ celu_ selu_ hardtanh_
"""
_METHODS = """
    add sub mul div neg abs exp sqrt rsqrt square pow clamp relu sigmoid tanh softmax matmul mean sum amax amin var std
    view reshape flatten permute transpose movedim unsqueeze squeeze expand expand_as contiguous chunk split unbind
    narrow size dim roll float half bfloat16 double type_as clone
    add_ sub_ mul_ div_ pow_ neg_ abs_ exp_ sqrt_ square_ clamp_ relu_ sigmoid_ tanh_
"""
_WORDS = """
    none tanh row batch zeros constant reflect replicate circular same valid floor trunc nearest nearest-exact linear
    bilinear bicubic trilinear area
"""

# Each computes a value from values, and does nothing else.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **_named("operator", operator, _OPERATORS),
    **_named("torch", torch, _TORCH),
    **_named("functional", functional, _FUNCTIONAL),
    "getattr": getattr,  # of ATTRIBUTES alone
}
ATTRIBUTES = frozenset({"shape", "ndim"})
METHODS = frozenset(_METHODS.split())
WORDS = ATTRIBUTES | frozenset(_WORDS.split())  # the only strings that may be an argument

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int64)
}
