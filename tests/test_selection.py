"""The rule that turns scores into masks, against the same rule in numpy, layer by layer and filter by filter."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastprune.selection import Selection


def rule(layers: list[np.ndarray], rate: float, scope: str, min_kept: int, round_to: int) -> list[bool]:
    """Threshold first; then each layer takes its best pruned filters back, the first of equals, one by one."""
    ranked = np.sort(np.concatenate(layers))
    mask: list[bool] = []
    for scores in layers:
        own = ranked if scope == "global" else np.sort(scores)
        kept = scores > own[int(len(own) * rate)]
        wanted = max(int(kept.sum()), min_kept)
        wanted = min(-(-wanted // round_to) * round_to, len(scores))
        while kept.sum() < wanted:
            kept[max((i for i in range(len(scores)) if not kept[i]), key=lambda i: (scores[i], -i))] = True
        mask += kept.tolist()
    return mask


# Whole numbers tie often.
LAYERS = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=5)


@given(LAYERS, st.floats(0, 0.99), st.sampled_from(["global", "layer"]), st.integers(0, 4), st.integers(1, 4))
def test_follows_the_rule(values: list[list[int]], rate: float, scope: str, min_kept: int, round_to: int) -> None:
    layers = [np.array(row, np.float32) for row in values]
    selection = Selection(tuple(map(len, layers)), scope, min_kept, round_to)  # type: ignore[arg-type]
    scores = torch.from_numpy(np.concatenate(layers))
    mask = selection.bring_back(scores, selection.by_threshold(scores, rate))
    assert mask.tolist() == rule(layers, rate, scope, min_kept, round_to)


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
    ],
)
def test_bad_arguments(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Selection((3,), **arguments)  # type: ignore[arg-type]
