"""Triton kernels, one file per op, installed as ``fastprune.kernels``. Importing this imports no Triton."""

import importlib
from collections.abc import Callable
from typing import Any

# By op, the module that has a function of its name, which takes the op's very arguments.
MODULES = {
    "decorrelation": "decorrelation",
    "decorrelation_backward": "decorrelation",
    "filter_norms": "filter_mask",
    "kth_threshold": "filter_mask",
    "filter_mask": "filter_mask",
    "update_filter_masks_": "filter_mask",
    "hyper_weight": "hyper_weight",
    "hyper_weight_backward": "hyper_weight",
    "masked_weights": "masked_weights",
    "masked_weights_backward": "masked_weights",
    "sgd_step_": "sgd_step",
    "weight_mask": "weight_mask",
}


def load(op: str) -> Callable[..., Any]:
    """The Triton implementation of an op."""
    return getattr(importlib.import_module(f"{__name__}.{MODULES[op]}"), op)
