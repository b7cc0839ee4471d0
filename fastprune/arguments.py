"""Checks of numbers that callers give: what was expected, and what came."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np


def whole_number(name: str, value: Any, least: int | None = None) -> int:
    """Return ``value`` as an int.

    Raises:
        TypeError: for what is not a whole number; True and 2.0 are none.
        ValueError: if it is below ``least``.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def finite_number(name: str, value: Any) -> float:
    """Return ``value`` as a float.

    Raises:
        TypeError: for what is not a number; True is none.
        ValueError: for NaN and infinity.
    """
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def rate(name: str, value: Any) -> float:
    """Return a share of filters or weights to prune, in [0, 1).

    Raises:
        TypeError, ValueError: as :func:`finite_number`, and for what is out of range.
    """
    number = finite_number(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return number
