"""The rule that turns scores into masks, against the same rule in numpy, layer by layer and filter by filter."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastprune.selection import Selection


def rule(
    layers: list[np.ndarray], rate: float, scope: str, min_kept: int, round_to: int, pinned: list[np.ndarray]
) -> list[bool]:
    """Threshold first; then each layer takes its best pruned filters back, the first of equals, one by one."""
    free = [scores[~stays] for scores, stays in zip(layers, pinned)]
    mask: list[bool] = []
    for scores, others, stays in zip(layers, free, pinned):
        own = np.sort(np.concatenate(free) if scope == "global" else others)
        kept = (scores > own[int(len(own) * rate)]) | stays
        wanted = max(int(kept.sum()), min_kept)
        wanted = min(-(-wanted // round_to) * round_to, len(scores))
        while kept.sum() < wanted:
            kept[max((i for i in range(len(scores)) if not kept[i]), key=lambda i: (scores[i], -i))] = True
        mask += kept.tolist()
    return mask


# Whole numbers tie often.
LAYERS = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=5)


@given(
    LAYERS,
    st.floats(0, 0.99),
    st.sampled_from(["global", "layer"]),
    st.integers(0, 4),
    st.integers(1, 4),
    st.none() | st.integers(0, 2**45 - 1),
)
def test_follows_the_rule(
    values: list[list[int]], rate: float, scope: str, min_kept: int, round_to: int, bits: int | None
) -> None:
    layers = [np.array(row, np.float32) for row in values]
    stays = np.array([bool(bits and bits >> i & 1) for i in range(sum(map(len, layers)))])
    pinned = np.split(stays, np.cumsum([len(row) for row in layers])[:-1])
    for row in pinned:
        row[0] = False  # in place: no layer is pinned as a whole
    places = tuple(np.flatnonzero(stays).tolist())
    selection = Selection(tuple(map(len, layers)), scope, min_kept, round_to, places)  # type: ignore[arg-type]
    mask, above = selection.select(torch.from_numpy(np.concatenate(layers)), rate)
    assert mask.tolist() == rule(layers, rate, scope, min_kept, round_to, pinned)
    assert above.tolist() == rule(layers, rate, scope, 0, 1, pinned)


def test_every_layer_lives_where_the_threshold_would_prune_it_whole() -> None:
    scores = torch.tensor([0.1, 0.3, 0.2, 5.0, 6.0, 7.0, 8.0])
    alone = Selection((3, 4), min_kept=0)
    assert not alone.by_threshold(scores, 0.5)[:3].any()
    one = Selection((3, 4))
    assert one.bring_back(scores, one.by_threshold(scores, 0.5)).tolist() == [False, True, *[False] * 2, *[True] * 3]


def test_an_empty_layer_keeps_nothing() -> None:
    selection = Selection((0, 2), min_kept=2)
    assert selection.bring_back(torch.tensor([1.0, 2.0]), torch.tensor([False, False])).tolist() == [True, True]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scope": "local"}, "scope must be global or layer, got 'local'"),
        ({"min_kept": -1}, "min_kept must be at least 0, got -1"),
        ({"round_to": 0}, "round_to must be at least 1, got 0"),
        ({"min_kept": 1.5}, "min_kept must be a whole number, got 1.5"),
        ({"round_to": True}, "round_to must be a whole number, got True"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        Selection((3,), **arguments)  # type: ignore[arg-type]
