"""A step of SGD over all parameters, which also writes the masked weights and the filter norms that follow it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import define

_ARGUMENTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, float lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov, bool maximize, bool first, Tensor? grad_scale, Tensor? found_inf, "
    "int layers, Tensor? mask, Tensor(c!)[] masked, Tensor(d!)? norms, int ord"
)


def _fake(
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
    *rest: Any,
) -> None:
    reference.check_sgd_step(params, grads, momenta, momentum, dampening, nesterov, *rest)


define(f"sgd_step_({_ARGUMENTS}) -> ()", reference.sgd_step_, _fake)


@torch.no_grad()
def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] = (),
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    layers: int = 0,
    mask: Tensor | None = None,
    masked: Sequence[Tensor] = (),
    norms: Tensor | None = None,
    ord: int = 1,
) -> None:
    """One step of stochastic gradient descent, in place, as :class:`torch.optim.SGD` defines it.

    With ``d = ±g · s + weight_decay · w`` (minus to maximize), ``s`` the float32 nearest to ``1 / grad_scale``, every
    element of every parameter becomes

    - ``w ← w − lr · d`` without momentum; with it,
    - ``b ← momentum · b + (1 − dampening) · d``, or ``b ← d`` in a first step, and then
    - ``w ← w − lr · b``, or ``w ← w − lr · (d + momentum · b)`` with ``nesterov``.

    In the same pass over memory, the first ``layers`` parameters, weights of convolutions, are written once more masked
    and cast for the next forward (``masked``), and measured for the next update of the masks (``norms``).

    Args:
        params: any number, any shapes: one dtype (float32, float64, bfloat16, float16), one device, each one dense run
            of memory. The first ``layers`` of them are as for :func:`fastprune.ops.filter_norms`; ``N`` counts their
            filters.
        grads: with the shapes, dtype and strides of ``params``. They are only read.
        momenta: ``b``, likewise; none if ``momentum`` is 0.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as for :class:`torch.optim.SGD`.
        first: whether this is the first step of these parameters; ``momenta`` may then hold anything.
        grad_scale: one float32 by which the gradients come multiplied, :class:`torch.amp.GradScaler`'s; None is 1.
        found_inf: one float32; where it is not 0, ``params`` and ``momenta`` stay as they are. No host reads it.
        layers: how many of ``params``, from the first, are weights of convolutions.
        mask: ``[N]`` bool, contiguous, True for kept filters; needed for ``masked``.
        masked: one tensor for each of the ``layers``, of its shape and strides and of any one supported dtype, which
            becomes what :func:`fastprune.ops.masked_weights` makes of the weights as they are after the step (also
            where ``found_inf`` left them alone); or none.
        norms: ``[N]`` float32, contiguous, which becomes what :func:`fastprune.ops.filter_norms` makes of them, but NaN
            for a filter whose norm is not finite; or None.
        ord: as for :func:`fastprune.ops.filter_norms`.

    Arithmetic is in float32 (float64 for float64), each result rounded once. No tensor may overlap another.

    Raises:
        RuntimeError: if an argument is not as described.

    Source:
        Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, in the form of
        :class:`torch.optim.SGD`.
    """
    if params:
        # fmt: off
        torch.ops.fastprune.sgd_step_(
            params, grads, momenta, lr, momentum, dampening, weight_decay, nesterov, maximize, first,
            grad_scale, found_inf, layers, mask, masked, norms, ord,
        )
        # fmt: on
