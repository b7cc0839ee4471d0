"""Every op in plain PyTorch: slow, obvious, float64-capable. This is the definition of right.

The contracts (shapes, dtypes, errors, sources) are the docstrings of the public functions in the folder above.
Losses, norms and steps are computed in float64 and rounded once, so that an implementation can be judged by its error.
"""

from .decorrelation import (
    DECORRELATION_KINDS,
    PRECISIONS,
    accumulation_dtype,
    check_decorrelation,
    check_decorrelation_backward,
    coefficients_like,
    decorrelation,
    decorrelation_backward,
)
from .filter_mask import filter_mask, filter_norms, kth_threshold, update_filter_masks_
from .hyper_weight import (
    check_hyper_weight,
    check_hyper_weight_backward,
    hyper_weight,
    hyper_weight_backward,
)
from .masked_weights import check_masked_weights, masked_weights, masked_weights_backward
from .sgd_step import SgdStep, sgd_step_
from .weight_mask import check_weight_mask, weight_mask

__all__ = [
    "DECORRELATION_KINDS",
    "PRECISIONS",
    "SgdStep",
    "accumulation_dtype",
    "check_decorrelation",
    "check_decorrelation_backward",
    "check_hyper_weight",
    "check_hyper_weight_backward",
    "check_masked_weights",
    "check_weight_mask",
    "coefficients_like",
    "decorrelation",
    "decorrelation_backward",
    "filter_mask",
    "filter_norms",
    "hyper_weight",
    "hyper_weight_backward",
    "kth_threshold",
    "masked_weights",
    "masked_weights_backward",
    "sgd_step_",
    "update_filter_masks_",
    "weight_mask",
]
