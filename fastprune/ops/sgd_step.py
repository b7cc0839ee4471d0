"""A step of SGD over all parameters, which also writes the masked weights and the filter norms that follow it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import reference
from ._backend import define

_ARGUMENTS = (
    "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor lr, float momentum, float dampening, "
    "float weight_decay, bool nesterov, bool maximize, bool first, Tensor? grad_scale, Tensor? found_inf, "
    "int layers, Tensor? mask, Tensor(c!)[] masked, Tensor? filter_decay, Tensor(d!)? norms, "
    "Tensor(e!)? channel_norms, int ord"
)


def _fake(*arguments: Any) -> None:
    reference.SgdStep(*arguments).check()


define(f"sgd_step_({_ARGUMENTS}) -> ()", reference.sgd_step_, _fake)


def _on_device(lr: float | Tensor, device: torch.device) -> Tensor:
    """The learning rate as a tensor; a number becomes one of float64, and only where no graph would keep it."""
    if isinstance(lr, Tensor):
        return lr
    if device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"sgd_step_: lr must be a tensor on {device} while a CUDA graph is captured, got the number {lr}, which "
            "every replay would use; make the tensor before the capture, and change it by lr.fill_() between replays"
        )
    return torch.full((), lr, dtype=torch.float64, device=device)


@torch.no_grad()
def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
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
    filter_decay: Tensor | None = None,
    norms: Tensor | None = None,
    channel_norms: Tensor | None = None,
    ord: int = 1,
) -> None:
    """One step of stochastic gradient descent, in place, as :class:`torch.optim.SGD` defines it.

    With ``d = ±g · s + λ · w`` (minus to maximize), ``s`` the float32 nearest to ``1 / grad_scale`` and
    ``λ = weight_decay``, for filter n ``weight_decay + filter_decay[n]``, every element of every parameter becomes

    - ``w ← w − lr · d`` without momentum; with it,
    - ``b ← momentum · b + (1 − dampening) · d``, or ``b ← d`` in a first step, and then
    - ``w ← w − lr · b``, or ``w ← w − lr · (d + momentum · b)`` with ``nesterov``.

    Where ``λ`` is 0 nothing is added, whatever ``w`` is. In the same pass over memory, the first ``layers`` parameters,
    weights of convolutions, are written once more masked and cast for the next forward (``masked``), and measured for
    the next update of the masks (``norms``); a second pass measures their input channels (``channel_norms``)::

        norms[n]         = mean over channels and kernel positions of |w[f, c, …]|      (or w² for ord 2)
        channel_norms[m] = mean over filters and kernel positions of the same

    Args:
        params: any number, any shapes: one dtype (float32, float64, bfloat16, float16), one device, each one dense run
            of memory. The first ``layers`` of them are as for :func:`fastprune.ops.filter_norms`; ``N`` counts their
            filters.
        grads: with the shapes, dtype and strides of ``params``. They are only read.
        momenta: ``b``, likewise; none if ``momentum`` is 0.
        lr: one float32 or float64 on the device of ``params``, where it is read: a CUDA graph replays with what the
            tensor holds by then. A number is made a float64 tensor, which on a GPU costs a launch; during the capture
            of a graph it is refused.
        momentum, dampening, weight_decay, nesterov, maximize: as for :class:`torch.optim.SGD`.
        first: whether this is the first step of these parameters; ``momenta`` may then hold anything.
        grad_scale: one float32 by which the gradients come multiplied, :class:`torch.amp.GradScaler`'s; None is 1.
        found_inf: one float32; where it is not 0, ``params`` and ``momenta`` stay as they are. No host reads it.
        layers: how many of ``params``, from the first, are weights of convolutions.
        mask: ``[N]`` bool, contiguous, True for kept filters; needed for ``masked``.
        masked: one tensor for each of the ``layers``, of its shape and strides and of any one supported dtype, which
            becomes what :func:`fastprune.ops.masked_weights` makes of the weights as they are after the step (also
            where ``found_inf`` left them alone); or none.
        filter_decay: ``[N]`` float32, contiguous: added to ``weight_decay`` for each filter; it may be negative. None
            is 0. Parameters that are no filters have ``weight_decay`` alone.
        norms: ``[N]`` float32, contiguous, which becomes what :func:`fastprune.ops.filter_norms` makes of them, but NaN
            for a filter whose norm is not finite; or None.
        channel_norms: ``[M]`` float32, contiguous, which becomes the means over each input channel, NaN where one is
            not finite; or None. Input channels are the indices of dimension 1 of a weight (of a grouped convolution
            those within a group); ``M`` counts those of all ``layers``, one layer after the other.
        ord: as for :func:`fastprune.ops.filter_norms`.

    Arithmetic is in float32 (float64 for float64), each result rounded once. No tensor may overlap another.

    Raises:
        RuntimeError: if an argument is not as described.

    Source:
        Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013, in the form of
        :class:`torch.optim.SGD`.
    """
    device = params[0].device if params else torch.device("cpu")
    # fmt: off
    torch.ops.fastprune.sgd_step_(
        params, grads, momenta, _on_device(lr, device), momentum, dampening, weight_decay,
        nesterov, maximize, first, grad_scale, found_inf,
        layers, mask, masked, filter_decay, norms, channel_norms, ord,
    )
    # fmt: on
