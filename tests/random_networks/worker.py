"""What a process of its own does; not in `__main__`, which such a process cannot import."""

from __future__ import annotations

from .checks import Result, check
from .draw import draw


def checked(seed: int) -> tuple[int, Result, frozenset[str]]:
    """Draw and check a network; returns what it used, too."""
    program = draw(seed)
    return seed, check(program), program.used
