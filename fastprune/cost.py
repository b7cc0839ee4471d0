"""What a network costs: multiply-accumulates, FLOPs, parameters and activation memory, with its masks or without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .graph import quiet
from .inputs import check_placed, positional, told
from .nn import MaskedConv2d
from .op_counter import OpCounter
from .untouched import untouched

__all__ = ["Cost", "LayerCost", "cost"]


@dataclass(frozen=True)
class LayerCost:
    """The share of one module, without the modules in it. Units as for :class:`Cost`."""

    name: str
    kind: str
    macs: int = 0
    flops: int = 0
    parameters: int = 0
    activation_bytes: int = 0


@dataclass(frozen=True)
class Cost:
    """What one forward pass in eval mode costs, on input tensors of `input_shapes` (batch included).

    Attributes:
        macs: multiply-accumulates of convolutions and matrix products (attention's, too); their biases not counted.
        flops: floating-point operations: 2 for each MAC, and of all else 1 for each element that an elementwise op, a
            normalisation or a bias writes, k·k for each element that a pool with a k×k window writes, and 1 for each
            element that a mean or another reduction reads. Copies, views and anything not named are free.
        parameters: weights and biases, one by one; buffers are not counted.
        activation_bytes: all results that the ops write and that depend on the input, added up: about what training
            keeps for the backward pass.
        peak_activation_bytes: the most of them, the input with them, that are alive at one time in inference.
        layers: the same by module, in the order in which they are first called; what a module's own forward computes
            counts as its own. Modules without any are left out.
        masked: whether masks are honoured.
    """

    input_shapes: tuple[tuple[int, ...], ...]
    masked: bool
    macs: int
    flops: int
    parameters: int
    activation_bytes: int
    peak_activation_bytes: int
    layers: tuple[LayerCost, ...]

    def __str__(self) -> str:
        total = LayerCost("total", "", self.macs, self.flops, self.parameters, self.activation_bytes)
        rows: list[tuple[str, ...]] = [("layer", "kind", "MACs", "FLOPs", "parameters", "activations (bytes)")]
        for layer in (*self.layers, total):
            numbers = (layer.macs, layer.flops, layer.parameters, layer.activation_bytes)
            rows.append((layer.name, layer.kind, *(f"{number:,}" for number in numbers)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
            for row in rows
        ]
        shapes = ", ".join("×".join(map(str, shape)) for shape in self.input_shapes)
        told = "what the masks leave" if self.masked else "masks not counted"
        head = f"input {shapes}; {told}; 1 MAC = 2 FLOPs"
        peak = f"activations alive at one time: at most {self.peak_activation_bytes:,} bytes, the input with them"
        return "\n".join([head, *(line.rstrip() for line in lines), peak])


def cost(model: nn.Module, example_input: Any, masked: bool = True) -> Cost:
    """Return what a forward pass of ``model`` in eval mode costs. Nothing is computed: shapes alone go through it.

    Args:
        model: any module that PyTorch can run with fake tensors (no branches on values of tensors). Not changed.
        example_input: a tensor, or a tuple of positional inputs, each a tensor or a tuple, list or dict of them. Only
            shapes, dtypes and devices are read.
        masked: count what the masks of its :class:`fastprune.nn.MaskedConv2d` leave: not the pruned filters, not the
            channels they leave constant, not what no kept filter reads. That is the most
            that can be removed; :func:`fastprune.compact` keeps a filter whose channel another branch keeps. Masks of
            single weights count where they leave nothing of a filter. False: as if nothing were pruned.

    Raises:
        ValueError: for an example input that is no tensor, not where the model is, or that it does not run on; and with
            masks, if no tensors are found in the output.
    """
    inputs = positional(example_input)
    check_placed(model, example_input)
    shapes = tuple(tuple(x.shape) for x in tree_leaves(inputs) if isinstance(x, Tensor))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    state: dict[str, Tensor] = {
        name: fake.from_tensor(t) for name, t in [*model.named_parameters(), *model.named_buffers()]
    }
    fake_inputs = tree_map_only(Tensor, fake.from_tensor, inputs)
    # Without masks all that runs is counted, even what no one reads.
    masked = masked and any(isinstance(module, MaskedConv2d) for module in model.modules())
    counter = OpCounter(model, masked)
    with _counting(model, counter), fake, counter:
        counter.start(tree_leaves(fake_inputs))
        try:
            with untouched(model), quiet():
                output = torch.func.functional_call(model, state, fake_inputs)
        except Exception as error:  # the model's own code runs: anything may come
            said = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{type(model).__name__} does not run on the example input {told(inputs)}: {said}"
            ) from error
        counter.finish(output)
    return _sum_up(model, counter, shapes)


@contextmanager
def _counting(model: nn.Module, counter: OpCounter) -> Iterator[None]:
    """Eval mode, without gradients or fused fast paths, the counter knowing whose forward runs; then all as before."""
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(counter.entering(name)))
            handles.append(module.register_forward_hook(counter.leaving))
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, was in training.items():
            module.training = was


def _sum_up(model: nn.Module, counter: OpCounter, shapes: tuple[tuple[int, ...], ...]) -> Cost:
    macs, others, activations = counter.by_module()
    modules, seen = dict(model.named_modules()), set()
    order = dict.fromkeys([*counter.called, *modules])
    layers = []
    for name in order:
        parameters = 0
        for own, parameter in modules[name]._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                parameters += counter.kept_parameters(name, own, parameter.numel())
        flops = 2 * macs[name] + others[name]
        if flops or parameters or activations[name]:
            kind = type(modules[name]).__name__
            layers.append(LayerCost(name or "(the model)", kind, macs[name], flops, parameters, activations[name]))
    totals = {
        n: sum(getattr(layer, n) for layer in layers) for n in ("macs", "flops", "parameters", "activation_bytes")
    }
    return Cost(shapes, counter.masked, **totals, peak_activation_bytes=counter.peak_bytes(), layers=tuple(layers))
