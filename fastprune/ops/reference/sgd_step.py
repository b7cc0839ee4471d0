"""The step of stochastic gradient descent, and the masked weights and norms that follow it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    DTYPES,
    check_channel_vector,
    check_dtype_and_device,
    check_filter_vector,
    check_ord,
    check_weights,
    is_dense,
    same_layout,
)
from .filter_mask import norms_of
from .masked_weights import masked_weights, per_filter

OP = "sgd_step_"


@dataclass(frozen=True, eq=False)
class SgdStep:
    """The arguments of the op, in the order of its schema; the contract says what they are."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momenta: Sequence[Tensor]
    lr: Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    first: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    layers: int
    mask: Tensor | None
    masked: Sequence[Tensor]
    filter_decay: Tensor | None
    norms: Tensor | None
    channel_norms: Tensor | None
    ord: int

    @property
    def weights(self) -> Sequence[Tensor]:
        """The params that are filters."""
        return self.params[: self.layers]

    def check(self) -> None:
        """Raise RuntimeError unless the arguments are as the contract says."""
        if not 0 <= self.layers <= len(self.params):
            raise RuntimeError(
                f"{OP}: layers must be in [0, {len(self.params)}], the number of params, got {self.layers}"
            )
        check_dtype_and_device(OP, "params", self.params)
        check_weights(OP, self.weights, "params")
        for i, param in enumerate(self.params):
            if not is_dense(param):
                raise RuntimeError(
                    f"{OP}: params[{i}] must be dense (one run of memory, in whatever order), "
                    f"got strides {list(param.stride())}"
                )
        self._check_like_params("grads", self.grads)
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise RuntimeError(f"{OP}: nesterov takes a momentum above 0 and no dampening")
        if self.momentum == 0 and self.momenta:
            raise RuntimeError(f"{OP}: without momentum there are no momenta, got {len(self.momenta)}")
        if self.momentum != 0:
            self._check_like_params("momenta", self.momenta)
        self._check_scalar("lr", self.lr, torch.float32, torch.float64)
        self._check_scalar("grad_scale", self.grad_scale, torch.float32)
        self._check_scalar("found_inf", self.found_inf, torch.float32)
        self._check_masked()
        for name, vector, dtype in (
            ("mask", self.mask, torch.bool),
            ("filter_decay", self.filter_decay, torch.float32),
            ("norms", self.norms, torch.float32),
        ):
            if vector is not None:
                check_filter_vector(OP, name, vector, self.weights, dtype)
                self._check_device(name, vector)
        if self.channel_norms is not None:
            check_channel_vector(OP, "channel_norms", self.channel_norms, self.weights)
            self._check_device("channel_norms", self.channel_norms)
        check_ord(OP, self.ord)

    def _is_elsewhere(self, tensor: Tensor) -> bool:
        return bool(self.params) and tensor.device != self.params[0].device

    def _check_device(self, name: str, tensor: Tensor) -> None:
        if self._is_elsewhere(tensor):
            raise RuntimeError(f"{OP}: {name} must be on the device of params")

    def _check_like_params(self, name: str, tensors: Sequence[Tensor]) -> None:
        if len(tensors) != len(self.params):
            raise RuntimeError(
                f"{OP}: {name} must have one tensor for each of {len(self.params)} params, got {len(tensors)}"
            )
        for i, (tensor, param) in enumerate(zip(tensors, self.params)):
            if tensor.dtype != param.dtype or tensor.device != param.device or not same_layout(tensor, param):
                raise RuntimeError(f"{OP}: {name}[{i}] must have the shape, dtype, strides and device of params[{i}]")

    def _check_scalar(self, name: str, scalar: Tensor | None, *dtypes: torch.dtype) -> None:
        if scalar is None:
            return
        if scalar.dtype not in dtypes or scalar.numel() != 1:
            raise RuntimeError(
                f"{OP}: {name} must be one {' or '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}, "
                f"got {str(scalar.dtype).removeprefix('torch.')} {list(scalar.shape)}"
            )
        self._check_device(name, scalar)

    def _check_masked(self) -> None:
        if len(self.masked) not in (0, self.layers):
            raise RuntimeError(
                f"{OP}: masked must have one tensor for each of {self.layers} layers, got {len(self.masked)}"
            )
        for i, (output, weight) in enumerate(zip(self.masked, self.weights)):
            if output.dtype not in DTYPES or output.dtype != self.masked[0].dtype:
                raise RuntimeError(
                    f"{OP}: masked must share one dtype of float32, float64, bfloat16, float16; "
                    f"masked[{i}] has {str(output.dtype).removeprefix('torch.')}"
                )
            if self._is_elsewhere(output) or not same_layout(output, weight):
                raise RuntimeError(f"{OP}: masked[{i}] must have the shape, strides and device of params[{i}]")
        if self.masked and self.mask is None:
            raise RuntimeError(f"{OP}: masked weights take a mask")


def sgd_step_(*arguments: Any, **named: Any) -> None:
    """Step params and momenta, then write the masked weights and the norms of the first ``layers`` params."""
    step = SgdStep(*arguments, **named)
    step.check()
    for i, (param, decay) in enumerate(zip(step.params, decays_of(step))):
        step_param(step, i, param, decay)
    if step.masked and step.mask is not None:
        for output, weight in zip(step.masked, masked_weights(step.weights, step.mask, step.masked[0].dtype, None)):
            output.copy_(weight)
    if step.weights and step.norms is not None:
        write_finite(step.norms, [norms_of(weight, step.ord) for weight in step.weights])
    if step.weights and step.channel_norms is not None:
        write_finite(step.channel_norms, [norms_of(weight.transpose(0, 1), step.ord) for weight in step.weights])


def decays_of(step: SgdStep) -> list[Tensor]:
    """The weight decay of each param, which broadcasts over it; a sum is rounded as all arithmetic of the op is."""
    compute = torch.float64 if step.params and step.params[0].dtype == torch.float64 else torch.float32
    decays = [param.new_tensor(step.weight_decay, dtype=compute) for param in step.params]
    if step.filter_decay is not None:
        for i, own in enumerate(per_filter(step.filter_decay, step.weights)):
            decays[i] = decays[i] + own.to(compute)
    return [decay.double() for decay in decays]


def step_param(step: SgdStep, i: int, param: Tensor, decay: Tensor) -> None:
    """Step the i-th param and its momentum."""
    sign = -1 if step.maximize else 1
    # Rounded as GradScaler rounds it.
    inverse = 1.0 if step.grad_scale is None else step.grad_scale.reshape(()).double().reciprocal().float().double()
    w, d = param.double(), step.grads[i].double() * (sign * inverse)
    d = torch.where(decay == 0, d, d + decay * w)  # 0 · Inf is not 0
    if step.momentum != 0:
        b = d if step.first else step.momentum * step.momenta[i].double() + (1 - step.dampening) * d
        d = d + step.momentum * b if step.nesterov else b
        write(step.momenta[i], b, step.found_inf)
    write(param, w - step.lr.reshape(()).double() * d, step.found_inf)


def write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    """Write the value, or nothing where ``found_inf`` says so; the device decides."""
    target.copy_(value if found_inf is None else torch.where(found_inf.reshape(()) != 0, target.double(), value))


def write_finite(target: Tensor, norms: Sequence[Tensor]) -> None:
    """Write the norms of all layers, NaN where one is not finite."""
    every = torch.cat(list(norms))
    target.copy_(every.masked_fill(~every.isfinite(), torch.nan))
