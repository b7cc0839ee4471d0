"""The learning rate at the ends and at the corners of each schedule."""

import pytest

from fastprune.schedule import Schedule, learning_rate


def rates(schedule: Schedule, total: int = 100, warmup: int = 0, peak: float = 0.4) -> list[float]:
    return [learning_rate(schedule, step, total, peak, warmup) for step in range(total)]


def test_constant_is_constant() -> None:
    assert rates("constant") == [0.4] * 100


def test_warm_up_rises_linearly_to_the_peak() -> None:
    assert rates("constant", warmup=3)[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_cosine_falls_from_the_peak_to_nearly_nothing() -> None:
    values = rates("cosine")
    assert values[0] == 0.4
    assert values[50] == pytest.approx(0.2)
    assert 0 < values[-1] < 0.001
    assert values == sorted(values, reverse=True)


def test_cosine_starts_after_the_warm_up() -> None:
    values = rates("cosine", warmup=20)
    assert values.index(max(values)) == 20
    assert values[20] == 0.4
    assert values[60] == pytest.approx(0.2)


@pytest.mark.parametrize(("warmup", "top"), [(0, 30), (10, 30), (50, 50)])
def test_one_cycle_peaks_after_30_percent_or_a_longer_warm_up_and_falls_linearly(warmup: int, top: int) -> None:
    values = rates("one-cycle", warmup=warmup)
    assert values.index(max(values)) == top
    assert values[top] == 0.4
    assert values[:top] == pytest.approx([0.4 * (step + 1) / (top + 1) for step in range(top)])
    assert values[top:] == pytest.approx([0.4 * (1 - i / (100 - top)) for i in range(100 - top)])


def test_multistep_drops_at_half_and_at_three_quarters() -> None:
    values = rates("multistep")
    assert values[:50] == [0.4] * 50
    assert values[50:75] == pytest.approx([0.04] * 25)
    assert values[75:] == pytest.approx([0.004] * 25)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle", "multistep"])
def test_the_shortest_runs_have_a_rate(schedule: Schedule) -> None:
    assert 0 < learning_rate(schedule, 0, 1, 0.4, 0) <= 0.4
    assert 0 < learning_rate(schedule, 0, 1, 0.4, 5) <= 0.4  # a warm-up longer than the run


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        learning_rate("step", 0, 1, 0.4, 0)  # type: ignore[arg-type]
