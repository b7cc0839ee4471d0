"""SGD in one op, which measures the filters for the next update of the masks on its way."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import ops
from .nn import MaskedConv2d, is_capturing
from .ops.checks import DTYPES, count_filters, same_layout
from .pruner import FilterPruner


class PrunedSGD(torch.optim.Optimizer):
    """:class:`torch.optim.SGD`, with one op for each parameter group, whatever the number of layers.

    Attached to a :class:`fastprune.FilterPruner`, each step also writes the norms of all filters, and the pruner's next
    update of the masks uses them instead of reading the weights again, unless a weight has changed in between. With
    ``masked_dtype``, it writes the masked weights for the next forward too, which then makes none, unless a weight or
    mask has changed in between. Both take all of the pruner's weights in one parameter group, each with a gradient;
    otherwise pruner and forward read the weights as ever.

    What changes a weight is told by its version counter. Writes through ``.data`` (as some exponential averages are
    swapped in) and other optimizers with ``fused=True`` do not raise it: no other optimizer may step these weights,
    and after such a write call ``pruner.masked_weights.renew()``; norms are right again after the next step. Masks that
    change between a forward and its backward make the backward fail, as any tensor does that autograd needs.

    ``state_dict`` is that of :class:`torch.optim.SGD`, and each loads the other's. With :class:`torch.amp.GradScaler`,
    gradients are unscaled as they are read and stay scaled in ``.grad``; nothing waits for the device, except for a
    parameter's first step under a scaler.

    A CUDA graph may capture ``step()`` once a step has been taken outside of it. Replays read ``lr`` on the device:
    make it a tensor there and change it with ``lr.fill_()``, as PyTorch's schedulers do (``load_state_dict`` puts
    another in its place: capture again). The other settings stay as they were captured. Masks may change between
    replays; after other changes of weights call ``pruner.masked_weights.renew()``.

    Args:
        params: parameters or parameter groups; float32, float64, bfloat16 or float16, each dense in memory.
        lr: a number, or a tensor of one float32 or float64.
        momentum, dampening, weight_decay, nesterov, maximize: as for :class:`torch.optim.SGD`.
        pruner: whose weights are among ``params``. It is not part of the state, nor of a copy of the optimizer.
        masked_dtype: the dtype in which the model computes (autocast's, or that of the weights). None: the forward
            masks the weights.

    Raises:
        ValueError: for values out of range, and for a pruner of another model.
        TypeError: for a pruner of another kind.
        RuntimeError: from ``step()``, for sparse gradients, parameters that are not as described, and what a CUDA graph
            cannot capture.
    """

    # GradScaler leaves the scale and the verdict on Inf in `grad_scale` and `found_inf` around step().
    _step_supports_amp_scaling = True
    # Copies and unpickled optimizers have neither.
    pruner: FilterPruner | None = None
    masked_dtype: torch.dtype | None = None
    _norms: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        pruner: FilterPruner | None = None,
        masked_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        if pruner is not None and not isinstance(pruner, FilterPruner):
            raise TypeError(
                f"pruner must be a FilterPruner, whose masks come of filter norms; got {type(pruner).__name__}"
            )
        if masked_dtype is not None and (pruner is None or masked_dtype not in DTYPES):
            raise ValueError(
                f"masked_dtype takes a pruner, and one of float32, float64, bfloat16, float16; got {masked_dtype}"
            )
        self.pruner, self.masked_dtype = pruner, masked_dtype
        every = {param for group in self.param_groups for param in group["params"]}
        if pruner is not None and every.isdisjoint(layer.weight for layer in pruner.layers.values()):
            raise ValueError("none of the pruner's weights is among params: is it the pruner of another model?")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; the others are the defaults."""
        settings = self.defaults | param_group
        lr = settings["lr"]
        if isinstance(lr, Tensor) and (lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64)):
            raise ValueError(
                f"lr must be a number or a tensor of one float32 or float64, got {lr.dtype} of {list(lr.shape)}"
            )
        for name in ("lr", "momentum", "weight_decay"):
            if not settings[name] >= 0:
                raise ValueError(f"{name} must be at least 0, got {settings[name]}")
        if settings["nesterov"] and (settings["momentum"] <= 0 or settings["dampening"] != 0):
            raise ValueError("nesterov takes a momentum above 0 and no dampening")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of states that a torch without them wrote
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient.

        Args:
            closure: if given, computes the loss and the gradients anew.

        Returns:
            What ``closure`` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (_, _, first), params in self._alike(group).items():
                self._step(group, params, first)
        return loss

    def _alike(self, group: dict[str, Any]) -> dict[tuple[torch.device, torch.dtype, bool], list[Tensor]]:
        """The group's parameters that have a gradient, in lists for one op each; the pruner's weights come first."""
        filters = {layer.weight: i for i, layer in enumerate(self.pruner.layers.values())} if self.pruner else {}
        alike: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
        for param in sorted(group["params"], key=lambda param: filters.get(param, len(filters))):
            if param.grad is not None:
                if param.grad.is_sparse:
                    raise RuntimeError("PrunedSGD takes no sparse gradients; use torch.optim.SGD for those parameters")
                first = group["momentum"] != 0 and self.state.get(param, {}).get("momentum_buffer") is None
                alike.setdefault((param.device, param.dtype, first), []).append(param)
        return alike

    def _step(self, group: dict[str, Any], params: list[Tensor], first: bool) -> None:
        device = params[0].device
        lr = _learning_rate(group["lr"], device)
        if first and is_capturing(device):
            raise RuntimeError(
                "a CUDA graph cannot capture the first step of a parameter, which its replays would take again and "
                "again: take a step before the capture"
            )
        grad_scale, found_inf = (
            None if scalar is None else scalar.to(device)
            for scalar in (getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        )
        if first and found_inf is not None and found_inf.item():
            return  # the host must know: a step that is skipped leaves no momentum behind
        momenta = self._momenta(params, first) if group["momentum"] != 0 else []
        layers = self._layers_of(params)
        norms = self._norms_of(layers)
        with self._masked_of(layers) as masked:
            ops.sgd_step_(
                params,
                [_side_by_side(param.grad, param) for param in params if param.grad is not None],
                momenta,
                lr=lr,
                momentum=group["momentum"],
                dampening=group["dampening"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
                first=first,
                grad_scale=grad_scale,
                found_inf=found_inf,
                layers=len(layers),
                mask=torch.cat([layer.mask for layer in layers]) if masked else None,
                masked=masked,
                norms=norms,
                ord=1 if self.pruner is None or self.pruner.ord is None else self.pruner.ord,
            )
        for param, momentum in zip(params, momenta):
            self.state[param]["momentum_buffer"] = momentum
        if norms is not None and self.pruner is not None:
            self.pruner.take_norms(norms)

    def _momenta(self, params: list[Tensor], first: bool) -> list[Tensor]:
        if first:
            return [torch.empty_like(param) for param in params]
        # A checkpoint may have brought them in another layout.
        return [_side_by_side(self.state[param]["momentum_buffer"], param) for param in params]

    def _layers_of(self, params: list[Tensor]) -> list[MaskedConv2d]:
        """The pruner's layers, if these parameters begin with the weights of all of them; else none."""
        layers = [] if self.pruner is None else list(self.pruner.layers.values())
        if len(params) < len(layers) or any(layer.weight is not param for layer, param in zip(layers, params)):
            return []
        return layers

    def _norms_of(self, layers: list[MaskedConv2d]) -> Tensor | None:
        """[N] float32 for the pruner's norms, the same each time; None if it has no use for them."""
        if not layers or self.pruner is None or self.pruner.ord is None:  # its importance is no norm
            return None
        weights = [layer.weight for layer in layers]
        n = count_filters(weights)
        if self._norms is None or self._norms.shape != (n,) or self._norms.device != weights[0].device:
            self._norms = torch.empty(n, dtype=torch.float32, device=weights[0].device)
        return self._norms

    def _masked_of(self, layers: list[MaskedConv2d]) -> AbstractContextManager[Sequence[Tensor]]:
        """Within, the tensors that the layers' masked weights are to be written to; none where none are wanted."""
        if self.pruner is None or self.masked_dtype is None or not layers or not self.pruner.masked_weights.in_use:
            return nullcontext(())
        return self.pruner.masked_weights.writing(self.masked_dtype)


def _learning_rate(lr: float | Tensor, device: torch.device) -> float | Tensor:
    """The learning rate as the op takes it."""
    if is_capturing(device) and not (isinstance(lr, Tensor) and lr.device == device):
        where = f"a tensor on {lr.device}" if isinstance(lr, Tensor) else f"the number {lr}"
        raise RuntimeError(
            f"a CUDA graph would keep the learning rate, {where}, for all its replays: make PrunedSGD with "
            f"lr=torch.tensor({float(lr):g}, device='{device}'), and change it by lr.fill_()"
        )
    if isinstance(lr, Tensor) and lr.device != device:
        return float(lr) if lr.device.type == "cpu" else lr.to(device)  # a copy from there would wait for the device
    return lr


def _side_by_side(tensor: Tensor, param: Tensor) -> Tensor:
    """The tensor itself if it lies in memory as the parameter does, else a copy that does."""
    return tensor if same_layout(tensor, param) else torch.empty_like(param).copy_(tensor)
