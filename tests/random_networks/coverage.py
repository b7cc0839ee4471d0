"""How often networks have each known layer, function, method and argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from .draw import RECIPES

WANTED = sorted(
    {key for recipe in RECIPES.values() for key in (recipe.kind, *(f"{recipe.kind}.{o}" for o in recipe.options))}
)
WANTED += sorted(f"nn.Masked{key[3:]}" for key in WANTED if key == "nn.Conv2d" or key.startswith("nn.Conv2d."))


def rare(covered: Mapping[str, int], networks: int, share: float = 0.01) -> dict[str, float]:
    """What is in fewer networks than that share."""
    return {key: covered.get(key, 0) / networks for key in WANTED if covered.get(key, 0) < share * networks}


def table(covered: Counter[str], networks: int) -> str:
    """As text, the rarest first."""
    lines = [f"{covered[key] / networks:7.2%}  {key}" for key in sorted(WANTED, key=lambda key: (covered[key], key))]
    return "\n".join(["in networks", *lines])
