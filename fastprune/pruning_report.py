"""What a pruner keeps of each layer, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One convolution.

    Attributes:
        name: in the model.
        filters: ``F``.
        kept: filters that are not pruned (of single weights: those with a weight left).
        share: of the layer's weights that its mask keeps, 0 to 1.
        why: what decided.
    """

    name: str
    filters: int
    kept: int
    share: float
    why: str


@dataclass(frozen=True)
class PruningReport:
    """All convolutions of a model, those that are left alone too; prints as a table."""

    layers: tuple[LayerReport, ...]

    @property
    def filters(self) -> int:
        """Of all layers."""
        return sum(layer.filters for layer in self.layers)

    @property
    def kept(self) -> int:
        """Of all layers."""
        return sum(layer.kept for layer in self.layers)

    def __str__(self) -> str:
        width = max([len("layer"), *(len(layer.name) for layer in self.layers)])
        lines = [f"{'layer':<{width}}  filters   kept  weights  why"]
        for layer in self.layers:
            lines.append(f"{layer.name:<{width}}  {layer.filters:7,}{layer.kept:7,}  {layer.share:6.1%}   {layer.why}")
        share = self.kept / self.filters if self.filters else 1.0
        return "\n".join([*lines, f"{'all':<{width}}  {self.filters:7,}{self.kept:7,}  ({share:.1%} of the filters)"])
