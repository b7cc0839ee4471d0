"""The ops: one contract each, written once in the docstring of its function; several implementations.

In reverse mode (``torch.func.grad``, ``vjp``, ``jacrev``) function transforms give autograd's gradients. ``torch.vmap``
calls an op once for each sample; one that writes to its arguments raises. Ops with a gradient raise in forward mode
(``torch.func.jvp``, ``jacfwd``, ``torch.autograd.forward_ad``); the others pass no derivative on, in either mode.

All tensors of a call are on one device.
"""

from ._backend import (
    Implementation,
    backends,
    cpu_isa,
    cpu_isas,
    get_backend,
    load_compiled,
    set_backend,
    set_cpu_isa,
)
from .decorrelation import decorrelation
from .filter_mask import filter_mask, filter_norms, kth_threshold, update_filter_masks_
from .hyper_weight import hyper_weight
from .masked_weights import masked_weight, masked_weights
from .reference import DECORRELATION_KINDS, PRECISIONS
from .sgd_step import sgd_step_
from .weight_mask import weight_mask

load_compiled()

__all__ = [
    "DECORRELATION_KINDS",
    "PRECISIONS",
    "Implementation",
    "backends",
    "cpu_isa",
    "cpu_isas",
    "decorrelation",
    "filter_mask",
    "filter_norms",
    "get_backend",
    "hyper_weight",
    "kth_threshold",
    "masked_weight",
    "masked_weights",
    "set_backend",
    "set_cpu_isa",
    "sgd_step_",
    "update_filter_masks_",
    "weight_mask",
]
