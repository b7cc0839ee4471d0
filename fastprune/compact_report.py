"""What became of each layer of a network that was made smaller."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CompactReport", "LayerChange"]


@dataclass(frozen=True)
class LayerChange:
    """One convolution or linear layer.

    Attributes:
        name: in the model.
        filters: before.
        pruned: filters that are zero.
        kept: filters of the small network.
        inputs: channels (features) that it reads, before and after.
        why: why pruned filters are kept; empty where none is.
    """

    name: str
    filters: int
    pruned: int
    kept: int
    inputs: tuple[int, int]
    why: str


@dataclass(frozen=True)
class CompactReport:
    """What :func:`compact` did; prints as a table.

    Attributes:
        layers: of the network, in order.
        parameters: before and after.
        unsafe: layers whose training on this CPU runs into a fault of PyTorch's, see :mod:`fastprune.onednn`.
    """

    layers: tuple[LayerChange, ...]
    parameters: tuple[int, int]
    unsafe: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  filters  pruned   kept   inputs           pruned, but kept"]
        for row in self.layers:
            inputs = f"{row.inputs[0]:,} -> {row.inputs[1]:,}"
            lines.append(f"{row.name:<{width}}  {row.filters:7,}{row.pruned:8,}{row.kept:7,}   {inputs:<15}  {row.why}")
        before, after = self.parameters
        lines.append(f"parameters: {before:,} -> {after:,} ({after / max(before, 1):.1%})")
        if self.unsafe:
            lines.append(
                f"before training it here in float32 and channels_last, call fastprune.onednn.protect(model): "
                f"PyTorch's gradient of {', '.join(self.unsafe)} corrupts memory on this CPU (docs/known_problems.md)"
            )
        return "\n".join(lines)
