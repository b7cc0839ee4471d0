"""The ops under function transforms: gradients (``torch.func.grad`` too), vmap, and forward mode, which is refused."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction


def in_forward_mode() -> bool:
    """Whether tensors may have tangents: within ``dual_level`` or ``torch.func.jvp``."""
    return forward_ad._current_level >= 0


def autograd_kernel(
    name: str, setup_context: Callable[..., None] | None, backward: Callable[..., Any]
) -> Callable[..., Any]:
    """What the dispatcher calls for the op ``name`` where a gradient may be wanted.

    Args:
        name: of the op.
        setup_context: ``(ctx, inputs, output)``, as for :func:`torch.library.register_autograd`.
        backward: ``(ctx, *grads)``; of an op that returns a list, ``(ctx, grads)``. It returns a gradient for each
            argument: None, or for a list of tensors a list.
    """
    op = getattr(torch.ops.fastprune, name).default
    returns_list = op._schema.returns[0].type.kind() == "ListType"

    def forward(ctx: Any, arguments: tuple[Any, ...], *_: Any) -> Any:
        output = _below_autograd(op, arguments)
        if setup_context is not None:
            setup_context(ctx, arguments, output)
        return tuple(output) if returns_list else output

    def differentiate(ctx: Any, *grads: Tensor) -> Any:
        gradients = backward(ctx, grads) if returns_list else backward(ctx, *grads)
        return None, *_leaves(gradients)

    # A torch.autograd.Function would go through all levels of transforms by itself; the dispatcher calls at each.
    methods = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    apply: Callable[..., Any] = type(f"fastprune_{name}", (_SingleLevelFunction,), methods).apply  # type: ignore[attr-defined]

    def kernel(*arguments: Any) -> Any:
        if in_forward_mode():
            _refuse_tangents(name, arguments)
        if not torch.is_grad_enabled() or not torch._C._any_requires_grad(*arguments):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*arguments)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                output = apply(arguments, *_leaves(arguments))
        else:
            output = apply(arguments, *_leaves(arguments))
        return list(output) if returns_list else output

    return kernel


def _below_autograd(op: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call the op in the forward of a function, which has switched gradients off; outer transforms need them."""
    with torch._C._AutoDispatchBelowAutograd():
        if not torch._C._are_functorch_transforms_active():
            return op(*arguments)
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return op(*arguments)


def _leaves(arguments: Iterable[Any]) -> list[Any]:
    """The arguments, with the tensors (or None) of a list one by one."""
    leaves: list[Any] = []
    for argument in arguments:
        if isinstance(argument, (list, tuple)) and not any(isinstance(part, int) for part in argument):
            leaves.extend(argument)
        else:
            leaves.append(argument)
    return leaves


def _refuse_tangents(name: str, arguments: tuple[Any, ...]) -> None:
    for tensor in _leaves(arguments):
        if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(
                f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, linearize, forward_ad.dual_level): "
                "take the derivative in reverse mode (torch.func.vjp, jacrev or grad, backward())"
            )


def vmap_rule(name: str, writes: bool) -> Callable[..., Any]:
    """The op's rule for :func:`torch.library.register_vmap`: sample by sample, as its layers differ in size anyway.

    Args:
        name: of the op.
        writes: whether it writes to its arguments; such an op is refused.
    """
    op = getattr(torch.ops.fastprune, name).default

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        if writes:
            raise RuntimeError(f"{name} writes to its arguments: call it outside of torch.vmap, once for each sample")
        if info.batch_size == 0:
            raise RuntimeError(f"{name}: torch.vmap must have at least one sample, got 0")
        batches = [_samples(argument, dim, info.batch_size) for argument, dim in zip(arguments, in_dims)]
        outputs = [op(*sample) for sample in zip(*batches)]
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        stacked = [torch.stack(parts) for parts in zip(*outputs)]
        return type(outputs[0])(stacked), type(outputs[0])([0] * len(stacked))

    return rule


def _samples(argument: Any, dim: Any, count: int) -> list[Any]:
    """What each of the samples has for an argument; their dimension goes first, so that each is contiguous."""
    if isinstance(argument, Tensor):
        return [argument] * count if dim is None else list(argument.movedim(dim, 0).contiguous().unbind())
    if not isinstance(argument, (list, tuple)) or not argument or dim is None:
        return [argument] * count
    return [list(sample) for sample in zip(*(_samples(part, d, count) for part, d in zip(argument, dim)))]
