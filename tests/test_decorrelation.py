"""The regulariser as a term of the loss."""

import pytest
import torch
from torch import nn

from fastprune import Decorrelation, FilterPruner, WeightPruner, models, ops


def convolutions(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("kind", ops.DECORRELATION_KINDS)
def test_it_is_alpha_times_the_op_and_has_a_gradient(kind: str) -> None:
    torch.manual_seed(0)
    model = models.create("resnet20")
    term = Decorrelation(model, kind, alpha=0.7)
    value = term()
    expected = ops.decorrelation(convolutions(model), kind)
    torch.testing.assert_close(value, 0.7 * expected)
    assert value > 0, "the authors' term was always 0"
    (value + model(torch.randn(2, 3, 32, 32)).sum() * 0).backward()
    gradients = torch.autograd.grad(expected, convolutions(model))
    for weight, gradient in zip(convolutions(model), gradients):
        torch.testing.assert_close(weight.grad, 0.7 * gradient)


@pytest.mark.parametrize("kind", ["covariance", "correlation"])
def test_descending_it_decorrelates(kind: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 12, 3)
    with torch.no_grad():
        conv.weight.copy_(conv.weight + 2 * conv.weight[:1])  # filters that resemble each other
    term = Decorrelation(nn.Sequential(conv), kind, include_diagonal=False)

    def mean_correlation() -> float:
        pearson = torch.corrcoef(conv.weight.detach().flatten(1))
        return float((pearson - pearson.diag().diag()).abs().mean())

    before = mean_correlation()
    optimizer = torch.optim.SGD(conv.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        term().backward()
        optimizer.step()
    assert mean_correlation() < before / 2


def test_pruned_filters_can_be_left_out() -> None:
    torch.manual_seed(0)
    model = models.create("resnet20")
    pruner = FilterPruner(model, 0.5, every=1)
    every, kept = Decorrelation(model), Decorrelation(model, include_pruned=False)
    mask = torch.cat(list(pruner.masks().values()))
    torch.testing.assert_close(kept(), ops.decorrelation(convolutions(model), mask=mask))
    assert kept() < every()
    kept().backward()
    for layer in pruner.layers.values():
        assert layer.weight.grad[~layer.mask].eq(0).all()


def test_masks_of_single_weights_keep_a_filter_with_any_weight_left() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    WeightPruner(model, 0.5)
    model[0].mask[2] = False
    model[0].mask[1, 0] = False
    expected = ops.decorrelation([model[0].weight], mask=torch.tensor([True, True, False, True]))
    torch.testing.assert_close(Decorrelation(model, include_pruned=False)(), expected)


def test_without_masks_include_pruned_makes_no_difference() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    torch.testing.assert_close(Decorrelation(model, include_pruned=False)(), Decorrelation(model)())


def test_ignore_and_diagonal() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    term = Decorrelation(model, ignore=["0"], include_diagonal=False)
    torch.testing.assert_close(term(), ops.decorrelation([model[1].weight], include_diagonal=False))


def test_bad_arguments() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match=r"kind must be one of covariance.*'reg_cov'"):
        Decorrelation(model, "reg_cov")
    with pytest.raises(ValueError, match=r"precision must be one of highest, high, medium; got 'tf32'"):
        Decorrelation(model, precision="tf32")
    with pytest.raises(ValueError, match="alpha"):
        Decorrelation(model, alpha=-1)
    for alpha in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha must be finite, got {alpha}"):
            Decorrelation(model, alpha=alpha)
    for wrong in ("1e-4", True, None):
        with pytest.raises(TypeError, match=f"alpha must be a number, got {wrong!r}"):
            Decorrelation(model, alpha=wrong)
    with pytest.raises(ValueError, match="no Conv2d"):
        Decorrelation(nn.Linear(3, 3))
