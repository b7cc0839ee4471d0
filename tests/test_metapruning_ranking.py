"""Kendall's τ."""

import math

import pytest

from fastprune.metapruning.ranking import kendall_tau


def test_the_order_alone_counts() -> None:
    assert kendall_tau([1, 2, 3, 4], [10, 20, 300, 4000]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)


def test_ties_are_accounted_for() -> None:
    # Worked by hand: 4 of 6 pairs agree, none disagrees; one is tied in the first, one in the second.
    assert kendall_tau([1, 1, 2, 3], [1, 2, 3, 3]) == pytest.approx(4 / math.sqrt(5 * 5))
    assert math.isnan(kendall_tau([1, 1, 1], [1, 2, 3]))


def test_fewer_than_two_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 and 1"):
        kendall_tau([1], [1])
    with pytest.raises(ValueError, match="got 2 and 3"):
        kendall_tau([1, 2], [1, 2, 3])
