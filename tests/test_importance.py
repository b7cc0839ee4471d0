"""Filter importances that are no norms: the geometric median, and functions of users."""

import pytest
import torch
from torch import Tensor, nn

from fastprune import FilterPruner
from fastprune.importance import fpgm, scores


def mean_distances(weight: Tensor) -> Tensor:
    rows = weight.double().flatten(1)
    return (rows[:, None] - rows[None]).norm(dim=2).mean(1) / rows.shape[1] ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (1, 4, 1, 1), (7, 33), (5, 1)])
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_fpgm_is_the_mean_distance(shape: tuple[int, ...], dtype: torch.dtype, shift: float) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(shape) + shift).to(dtype)
    torch.testing.assert_close(fpgm("", weight).double(), mean_distances(weight), rtol=1e-6, atol=1e-9)


def test_fpgm_of_equal_filters_is_zero_and_ties() -> None:
    weight = torch.randn(1, 3, 3, 3, generator=torch.Generator().manual_seed(0)).expand(6, 3, 3, 3).clone()
    assert torch.equal(fpgm("", weight), torch.zeros(6))


def test_fpgm_prunes_the_filter_in_the_middle() -> None:
    model = nn.Sequential(nn.Conv2d(1, 5, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([-9.0, -5.0, 0.5, 5.0, 9.0]).view(5, 1, 1, 1))
    pruner = FilterPruner(model, 0.0, "fpgm", every=1, removable_only=False)
    assert pruner.masks()["0"].tolist() == [True, True, False, True, True]


def test_a_function_decides() -> None:
    seen = []

    def last_first(name: str, weight: Tensor) -> Tensor:
        seen.append((name, tuple(weight.shape)))
        return torch.arange(len(weight), dtype=torch.float64)

    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 1))
    pruner = FilterPruner(model, 0.5, last_first, every=1, scope="layer", removable_only=False)
    assert seen == [("0", (4, 2, 3, 3)), ("1", (4, 4, 1, 1))]
    assert [mask.tolist() for mask in pruner.masks().values()] == [[False, False, False, True]] * 2


@pytest.mark.parametrize(
    ("result", "said"),
    [
        (torch.ones(3), r"layer only: importance must return \[2\] floating-point scores, got \[3\] of torch.float32"),
        (torch.ones(2, dtype=torch.int64), r"got \[2\] of torch.int64"),
        (1.0, "got float"),
    ],
)
def test_what_a_function_must_return(result: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scores({"only": torch.ones(2, 3)}, lambda name, weight: result)  # type: ignore[arg-type, return-value]


def test_scores_that_are_not_finite_name_the_layer() -> None:
    with pytest.raises(RuntimeError, match="layer only: a filter's score is NaN or Inf"):
        scores({"only": torch.ones(2, 3)}, lambda name, weight: torch.tensor([1.0, torch.nan]))


def test_unknown_importance() -> None:
    with pytest.raises(ValueError, match=r"importance must be l1, l2, fpgm, or a function .* got 'l3'"):
        FilterPruner(nn.Sequential(nn.Conv2d(1, 2, 1)), 0.5, "l3")  # type: ignore[arg-type]
