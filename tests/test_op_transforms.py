"""Every op under torch.func (grad, vmap, jvp), in forward mode, and given tensors of several devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Implementation
from test_ops import OPCHECKS
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fastprune import ops

fastprune = torch.ops.fastprune
WRITES = ("update_filter_masks_", "sgd_step_")
# Those with a gradient, of what is no constant of theirs.
DIFFERENTIABLE = [name for name in OPCHECKS if name.split("-")[0].startswith(("masked", "hyper", "decorrelation"))]


def plain(name: str) -> tuple[Any, tuple[Any, ...]]:
    """The op and arguments without a gradient."""
    op, arguments = OPCHECKS[name]()
    return op, tree_map_only(Tensor, torch.Tensor.detach, arguments)


def assert_same(first: Any, second: Any) -> None:
    pairs = list(zip(tree_flatten(first)[0], tree_flatten(second)[0], strict=True))
    assert pairs
    for a, b in pairs:
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------------------- gradients

W, V = (torch.randn(6, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(2))
MASK = torch.tensor([True, False, True, True, False, True])
FEEDBACK = torch.linspace(0, 1, 6)
ROWS, BIAS = W.flatten().view(36, 2), V.flatten()[:36].clone()
HYPER = {"out_channels": 2, "in_channels": 3, "shape": (3, 3, 2, 2)}
# name: a scalar function of the weight [6, 3, 2, 2]
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_weights": lambda w: ops.masked_weights([w], MASK, None, FEEDBACK)[0].pow(3).sum(),
    "masked_weight": lambda w: ops.masked_weight(w, MASK, torch.float64, FEEDBACK).pow(3).sum(),
    "hyper_weight": lambda w: ops.hyper_weight(w.flatten()[:2], w.flatten().view(36, 2), BIAS, **HYPER).pow(3).sum(),  # type: ignore[arg-type]
    **{kind: lambda w, kind=kind: ops.decorrelation([w], kind) for kind in ops.DECORRELATION_KINDS},  # type: ignore[misc]
}


def autograd(loss: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    leaf = weight.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name: str) -> None:
    loss = LOSSES[name]
    expected = torch.stack([autograd(loss, W), autograd(loss, V)])
    assert expected.abs().sum() > 0
    torch.testing.assert_close(torch.func.grad(loss)(W), expected[0])
    torch.testing.assert_close(torch.func.jacrev(loss)(W), expected[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(torch.stack([W, V])), expected)
    total = torch.func.grad(lambda pair: torch.func.vmap(loss, in_dims=1)(pair).sum())
    torch.testing.assert_close(total(torch.stack([W, V], 1)).unbind(1), expected.unbind())


@pytest.mark.parametrize("name", ["masked_weights", "masked_weight", "hyper_weight"])
def test_second_derivatives(name: str) -> None:
    loss, leaf = LOSSES[name], W.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    expected = autograd(lambda w: torch.func.grad(loss)(w).square().sum(), W)
    torch.testing.assert_close(torch.autograd.grad(first.square().sum(), leaf)[0], expected)
    twice = torch.func.grad(lambda w: torch.func.grad(loss)(w).square().sum())
    torch.testing.assert_close(twice(W), expected)


def test_a_penalty_has_no_second_derivative() -> None:
    with pytest.raises(RuntimeError, match="decorrelation has no second derivative"):
        torch.func.grad(lambda w: torch.func.grad(LOSSES["covariance"])(w).sum())(W)


# --------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize("name", [name for name in OPCHECKS if name not in WRITES])
@pytest.mark.parametrize("batched", ["all", "first"])
def test_vmap(name: str, batched: str) -> None:
    op, arguments = plain(name)
    # As the samples of a batch lie in memory: some results are in the order of memory.
    leaves, structure = tree_flatten(tree_map_only(Tensor, torch.Tensor.contiguous, arguments))
    first = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    batch = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and (batched == "all" or i == first)]
    flipped = [leaf.flip(0) if i in batch and leaf.dim() else leaf for i, leaf in enumerate(leaves)]
    samples = [leaves, flipped]
    stacked = [torch.stack([s[i] for s in samples], -1) if i in batch else leaf for i, leaf in enumerate(leaves)]
    dims = [-1 if i in batch else None for i in range(len(leaves))]
    results = torch.func.vmap(op, in_dims=tuple(tree_unflatten(dims, structure)))(*tree_unflatten(stacked, structure))
    expected = [op(*tree_unflatten(sample, structure)) for sample in samples]
    for n, sample in enumerate(expected):
        assert_same(tree_map_only(Tensor, lambda t, n=n: t[n], results), sample)  # type: ignore[misc]


def test_vmap_of_vmap() -> None:
    weights = torch.stack([torch.stack([W, V]), torch.stack([V, W])])
    masks = torch.func.vmap(torch.func.vmap(lambda w: ops.filter_mask([w], 0.5)))(weights)
    assert torch.equal(masks[0, 1], ops.filter_mask([V], 0.5))
    assert torch.equal(masks[1, 1], ops.filter_mask([W], 0.5))


@pytest.mark.parametrize("name", WRITES)
def test_vmap_of_what_writes(name: str) -> None:
    op, arguments = plain(name)
    leaves, structure = tree_flatten(arguments)
    dims = tree_unflatten([0 if isinstance(leaf, Tensor) else None for leaf in leaves], structure)
    batch = tree_map_only(Tensor, lambda tensor: torch.stack([tensor, tensor]), arguments)
    with pytest.raises(RuntimeError, match=f"{name} writes to its arguments: call it outside of torch.vmap"):
        torch.func.vmap(op, in_dims=tuple(dims))(*batch)


def test_vmap_of_nothing() -> None:
    with pytest.raises(RuntimeError, match=r"masked_weights: torch.vmap must have at least one sample, got 0"):
        torch.func.vmap(lambda w: ops.masked_weights([w], MASK)[0])(torch.empty(0, 6, 3))


# ------------------------------------------------------------------------------------------------------- forward mode

NO_TANGENT = r"{} has no forward-mode derivative .* take the derivative in reverse mode"


def floating(arguments: tuple[Any, ...]) -> list[int]:
    """Which leaves of the arguments could have a tangent."""
    leaves = tree_flatten(arguments)[0]
    return [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_is_refused(name: str) -> None:
    op, arguments = plain(name)
    leaves, structure = tree_flatten(arguments)
    message = NO_TANGENT.format(name.split("-")[0])
    for i in floating(arguments):

        def call(tensor: Tensor, i: int = i) -> Any:
            return op(*tree_unflatten([*leaves[:i], tensor, *leaves[i + 1 :]], structure))

        with pytest.raises(RuntimeError, match=message):
            torch.func.jvp(call, (leaves[i],), (leaves[i],))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(leaves[i], leaves[i])
            with pytest.raises(RuntimeError, match=message):
                call(dual)
            with pytest.raises(RuntimeError, match=message):
                call(forward_ad.make_dual(leaves[i].clone().requires_grad_(), leaves[i]))
            call(leaves[i])  # without a tangent


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_is_refused_through_other_transforms(name: str) -> None:
    loss = LOSSES[name]
    for derivative in (
        lambda w: torch.func.jvp(torch.func.grad(loss), (w,), (w,)),
        torch.func.grad(lambda w: torch.func.jvp(loss, (w,), (w,))[1]),
        torch.func.hessian(loss),
        torch.func.jacfwd(loss),
    ):
        with pytest.raises(RuntimeError, match="has no forward-mode derivative"):
            derivative(W)


@pytest.mark.parametrize("form", ["one", "written", "all"])
def test_a_gradient_with_a_tangent_is_refused(form: str) -> None:
    leaf = W.clone().requires_grad_()
    written = W.clone() if form == "written" else None
    if form == "all":
        masked = ops.masked_weights([leaf], MASK, None, FEEDBACK)[0]
    else:
        masked = ops.masked_weight(leaf, MASK, torch.float64, FEEDBACK, written)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=NO_TANGENT.format("masked_weights_backward")):
        torch.autograd.grad(masked, leaf, forward_ad.make_dual(V, V))


def test_a_tangent_of_what_the_result_is_multiplied_with_is_refused() -> None:
    def gradient(factor: Tensor) -> Tensor:
        return torch.func.grad(lambda w: (ops.masked_weights([w], MASK, None, FEEDBACK)[0] * factor).sum())(W)

    with pytest.raises(RuntimeError, match=NO_TANGENT.format("masked_weights_backward")):
        torch.func.jvp(gradient, (V,), (V,))


# ------------------------------------------------------------------------------------------------------------ devices


def tensors_of(name: str) -> list[int]:
    return [i for i, leaf in enumerate(tree_flatten(plain(name)[1])[0]) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", [name for name in OPCHECKS if name != "kth_threshold"])
def test_one_tensor_elsewhere(name: str) -> None:
    op, arguments = plain(name)
    leaves, structure = tree_flatten(arguments)
    for i in tensors_of(name):
        mixed = [*leaves[:i], leaves[i].to("meta"), *leaves[i + 1 :]]
        devices = r"\(meta\), got cpu" if i == tensors_of(name)[0] else r"\(cpu\), got meta"
        with pytest.raises(RuntimeError, match=rf"{name.split('-')[0]}: \S+ must be on the device of \S+ {devices}"):
            op(*tree_unflatten(mixed, structure))


def test_the_tensor_elsewhere_is_named() -> None:
    pair, mask = [torch.ones(4, 3), torch.ones(2, 3)], torch.ones(6, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"^masked_weights: mask must be on the device of weights \(cpu\), got meta"):
        ops.masked_weights(pair, mask.to("meta"))
    with pytest.raises(RuntimeError, match=r"^filter_norms: weights\[1\] must be on the device of weights \(cpu\)"):
        ops.filter_norms([pair[0], pair[1].to("meta")])
    with pytest.raises(RuntimeError, match=r"^masked_weights: feedback must be on the device of weights \(cpu\), got"):
        ops.masked_weight(pair[0], mask[:4], torch.float32, torch.ones(4, device="meta"))


@pytest.mark.parametrize("name", OPCHECKS)
def test_all_on_meta(name: str) -> None:
    op, arguments = plain(name)
    results = op(*tree_map_only(Tensor, lambda tensor: tensor.to("meta"), arguments))
    shapes = tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype), op(*arguments))
    assert tree_map_only(Tensor, lambda tensor: (tensor.shape, tensor.dtype), results) == shapes


def test_fakes_check_all_arguments() -> None:
    weights, grad = [torch.ones(4, 3, device="meta")], torch.ones((), device="meta")
    with pytest.raises(RuntimeError, match=r"decorrelation_backward: coefficients must be the forward's, int32 \[4\]"):
        fastprune.decorrelation_backward(grad, weights, grad, "covariance", True, None, "highest")
    with pytest.raises(RuntimeError, match=r"kth_threshold: k must be in \[0, 3\), got 3"):
        ops.kth_threshold(torch.ones(3, device="meta"), 3)
    with pytest.raises(RuntimeError, match=r"weights\[0\] must be \[filters, ...\]"):
        ops.update_filter_masks_([torch.ones(4, device="meta")], 0.5, torch.ones(4, dtype=torch.bool, device="meta"))


# --------------------------------------------------------------------------------------------------------- dimensions


@pytest.mark.parametrize("dimensions", [5, 8, 9, 10, 16, 40])
def test_many_dimensions(registered: Implementation, dimensions: int) -> None:
    shape = (3, *[2] * min(dimensions - 1, 11), *[1] * (dimensions - 12))
    flat = torch.randn(3, 2 ** min(dimensions - 1, 11), generator=torch.Generator().manual_seed(0))
    weight, mask = flat.view(shape), torch.tensor([True, False, True])
    torch.testing.assert_close(ops.filter_norms([weight]), ops.filter_norms([flat]))
    assert torch.equal(ops.masked_weights([weight], mask)[0], ops.masked_weights([flat], mask)[0].view(shape))
    assert torch.equal(ops.weight_mask([weight], 0.5)[0], ops.weight_mask([flat], 0.5)[0].view(shape))
    torch.testing.assert_close(ops.decorrelation([weight]), ops.decorrelation([flat]))
    turned = weight.clone().permute(0, *reversed(range(1, dimensions)))  # each filter is one run still
    torch.testing.assert_close(ops.filter_norms([turned]), ops.filter_norms([flat]))
    stepped = turned.clone()
    ops.sgd_step_([stepped], [turned], lr=0.5, layers=1)
    torch.testing.assert_close(stepped, turned / 2)
    with pytest.raises(RuntimeError, match=r"weights\[0\] must be contiguous or channels_last"):
        ops.filter_norms([weight.movedim(0, -1)])
    with pytest.raises(RuntimeError, match=r"params\[0\] must be dense"):
        ops.sgd_step_([flat.new_empty(4, *shape)[:2].movedim(0, -1)[:1]], [weight], lr=0.5)


# -------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("shape", [(2**32, 2**32, 1, 1), (2**62, 2, 1, 1), (3, 2**61, 3, 7), (2**21, 2**21, 2**21, 2)])
def test_rows_beyond_int64(registered: Implementation, shape: tuple[int, ...]) -> None:
    hidden, nothing, message = torch.ones(4), torch.ones(0, 4), r"O·I·kh·kw must be below 2\^63, got shape = \[{}, "
    with pytest.raises(RuntimeError, match="^hyper_weight: " + message.format(shape[0])):
        ops.hyper_weight(hidden, nothing, nothing[:, 0], out_channels=1, in_channels=1, shape=shape)
    with pytest.raises(RuntimeError, match="^hyper_weight_backward: " + message.format(shape[0])):
        fastprune.hyper_weight_backward(torch.ones(1, 1, *shape[2:])[:, :, :1, :1], hidden, nothing, shape)


@pytest.mark.parametrize("layers", [1, 3])
def test_coefficients_beyond_int64(registered: Implementation, tmp_path: Path, layers: int) -> None:
    filters = 3_037_000_500 if layers == 1 else 2_000_000_000
    # A file of zeros that takes no block of the disk.
    weight = torch.from_file(str(tmp_path / "zeros"), shared=True, size=filters, dtype=torch.bfloat16).view(-1, 1)
    with pytest.raises(RuntimeError, match=f"^decorrelation: the coefficients of {filters} filters are more than 2"):
        ops.decorrelation([weight] * layers, "correlation")


@pytest.mark.parametrize(("kind", "filters"), [("correlation", 2**32), ("covariance", 2**34)])
def test_fakes_count_coefficients(kind: str, filters: int) -> None:
    with pytest.raises(RuntimeError, match=f"^decorrelation: the coefficients of {filters} filters are more than 2"):
        ops.decorrelation([torch.empty(filters, 1, device="meta")], kind)
