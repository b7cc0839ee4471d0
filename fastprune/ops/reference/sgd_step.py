"""The step of stochastic gradient descent, and the masked weights and norms that follow it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import (
    DTYPES,
    check_dtype_and_device,
    check_filter_vector,
    check_ord,
    check_weights,
    is_dense,
    same_layout,
)
from .filter_mask import norms_of
from .masked_weights import masked_weights

OP = "sgd_step_"


def check_sgd_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    momentum: float,
    dampening: float,
    nesterov: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    layers: int,
    mask: Tensor | None,
    masked: Sequence[Tensor],
    norms: Tensor | None,
    ord: int,
) -> None:
    """Raise unless the arguments of ``sgd_step_`` are right."""
    if not 0 <= layers <= len(params):
        raise RuntimeError(f"{OP}: layers must be in [0, {len(params)}], the number of params, got {layers}")
    check_dtype_and_device(OP, "params", params)
    check_weights(OP, params[:layers], "params")
    for i, param in enumerate(params):
        if not is_dense(param):
            raise RuntimeError(
                f"{OP}: params[{i}] must be dense (one run of memory, in whatever order), "
                f"got strides {list(param.stride())}"
            )
    check_like(params, "grads", grads)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise RuntimeError(f"{OP}: nesterov takes a momentum above 0 and no dampening")
    if momentum == 0 and momenta:
        raise RuntimeError(f"{OP}: without momentum there are no momenta, got {len(momenta)}")
    if momentum != 0:
        check_like(params, "momenta", momenta)
    for name, scalar in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if scalar is not None and (
            scalar.dtype != torch.float32 or scalar.numel() != 1 or is_elsewhere(scalar, params)
        ):
            raise RuntimeError(
                f"{OP}: {name} must be one float32 on the device of params, "
                f"got {str(scalar.dtype).removeprefix('torch.')} {list(scalar.shape)}"
            )
    check_outputs(params[:layers], mask, masked, norms)
    check_ord(OP, ord)


def is_elsewhere(tensor: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether the tensor is on another device than the params."""
    return bool(params) and tensor.device != params[0].device


def check_like(params: Sequence[Tensor], name: str, tensors: Sequence[Tensor]) -> None:
    """Raise unless there is one tensor for each param, side by side with it in memory."""
    if len(tensors) != len(params):
        raise RuntimeError(f"{OP}: {name} must have one tensor for each of {len(params)} params, got {len(tensors)}")
    for i, (tensor, param) in enumerate(zip(tensors, params)):
        if tensor.dtype != param.dtype or tensor.device != param.device or not same_layout(tensor, param):
            raise RuntimeError(f"{OP}: {name}[{i}] must have the shape, dtype, strides and device of params[{i}]")


def check_outputs(
    weights: Sequence[Tensor], mask: Tensor | None, masked: Sequence[Tensor], norms: Tensor | None
) -> None:
    """Raise unless what is written besides the step fits the filter weights."""
    if len(masked) not in (0, len(weights)):
        raise RuntimeError(f"{OP}: masked must have one tensor for each of {len(weights)} layers, got {len(masked)}")
    for i, (output, weight) in enumerate(zip(masked, weights)):
        if output.dtype not in DTYPES or output.dtype != masked[0].dtype:
            raise RuntimeError(
                f"{OP}: masked must share one dtype of float32, float64, bfloat16, float16; "
                f"masked[{i}] has {str(output.dtype).removeprefix('torch.')}"
            )
        if is_elsewhere(output, weights) or not same_layout(output, weight):
            raise RuntimeError(f"{OP}: masked[{i}] must have the shape, strides and device of params[{i}]")
    if masked and mask is None:
        raise RuntimeError(f"{OP}: masked weights take a mask")
    if mask is not None:
        check_filter_vector(OP, "mask", mask, weights, torch.bool)
    if norms is not None:
        check_filter_vector(OP, "norms", norms, weights, torch.float32)


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    layers: int,
    mask: Tensor | None,
    masked: Sequence[Tensor],
    norms: Tensor | None,
    ord: int,
) -> None:
    """Step params and momenta, then write the masked weights and the norms of the first ``layers`` params."""
    check_sgd_step(
        params, grads, momenta, momentum, dampening, nesterov, grad_scale, found_inf, layers, mask, masked, norms, ord
    )
    sign = -1 if maximize else 1
    # Rounded as GradScaler rounds it.
    scale = sign if grad_scale is None else sign * grad_scale.double().reciprocal().float().double().reshape(())
    for i, (param, grad) in enumerate(zip(params, grads)):
        w, d = param.double(), grad.double() * scale
        if weight_decay != 0:
            d = d + weight_decay * w
        if momentum != 0:
            b = d if first else momentum * momenta[i].double() + (1 - dampening) * d
            d = d + momentum * b if nesterov else b
            write(momenta[i], b, found_inf)
        write(param, w - lr * d, found_inf)
    weights = params[:layers]
    if masked and mask is not None:
        for output, weight in zip(masked, masked_weights(weights, mask, masked[0].dtype, None)):
            output.copy_(weight)
    if norms is not None and weights:
        every = torch.cat([norms_of(weight, ord) for weight in weights])
        norms.copy_(every.masked_fill(~every.isfinite(), torch.nan))


def write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Write the value, or nothing where ``found_inf`` says so; the device decides."""
    target.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) != 0, target.double(), value))
