"""How well one score ranks what another one measures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's τ-b of two scores of the same things: 1 for the same order, −1 for the reverse, ties accounted for.

    NaN where all of one score are equal.

    Raises:
        ValueError: if they are not of equal length, or of fewer than two things.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"a rank correlation takes two scores of two things or more, got {len(first)} and {len(second)}"
        )
    agreement = tied_first = tied_second = pairs = 0
    for i, j in combinations(range(len(first)), 2):
        one, other = _sign(first[i] - first[j]), _sign(second[i] - second[j])
        agreement += one * other
        tied_first += one == 0
        tied_second += other == 0
        pairs += 1
    free = (pairs - tied_first) * (pairs - tied_second)
    return agreement / free**0.5 if free else float("nan")


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
