"""Encodings: how many channels each part of a network has, as numbers from 0 to 30."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHOICES = 31
SCALES: tuple[float, ...] = tuple((10 + 3 * choice) / 100 for choice in range(CHOICES))
"""The share of the channels that each choice keeps: 0.10, 0.13, …, 1.00."""
WIDEST = CHOICES - 1

Encoding: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Width:
    """A number of channels: a share of ``maximum`` that a gene chooses, or all of them.

    Attributes:
        maximum: channels of the widest network.
        gene: index of the gene that chooses; ``None`` for a number that is fixed.
    """

    maximum: int
    gene: int | None = None

    def choice(self, encoding: Sequence[int]) -> int:
        """The choice made, 0 to 30."""
        return WIDEST if self.gene is None else encoding[self.gene]

    def scale(self, encoding: Sequence[int]) -> float:
        """The share of the channels that are there."""
        return SCALES[self.choice(encoding)]

    def channels(self, encoding: Sequence[int]) -> int:
        """``int(maximum · scale)``."""
        return self.maximum * (10 + 3 * self.choice(encoding)) // 100

    def channels_of_all(self, population: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same for every row of a population ``[P, genes]``: ``[P]``, or ``[]`` where it is fixed."""
        if self.gene is None:
            return np.asarray(self.maximum, dtype=np.int64)
        return self.maximum * (10 + 3 * population[:, self.gene]) // 100


def check_population(population: ArrayLike, genes: int, network: str) -> NDArray[np.int64]:
    """The encodings as int64 ``[P, genes]``.

    Raises:
        ValueError: for another number of genes, and for genes that are not integers from 0 to 30.
    """
    rows = np.asarray(population)
    if rows.ndim != 2 or rows.shape[1] != genes:
        found = f"{rows.shape[-1]} genes" if rows.ndim == 2 else f"an array of shape {list(rows.shape)}"
        raise ValueError(f"an encoding of {network} has {genes} genes, got {found}")
    if not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"genes are integers from 0 to {WIDEST}, got {rows.dtype}")
    if rows.size and (rows.min() < 0 or rows.max() > WIDEST):
        raise ValueError(f"genes are integers from 0 to {WIDEST}, got {rows.min()} to {rows.max()}")
    return rows.astype(np.int64, copy=False)


def check_encoding(encoding: Sequence[int], genes: int, network: str) -> Encoding:
    """The encoding as a tuple of ints; raises as :func:`check_population` does."""
    if len(encoding) != genes:
        raise ValueError(f"an encoding of {network} has {genes} genes, got {len(encoding)}")
    return tuple(int(gene) for gene in check_population([list(encoding)], genes, network)[0])


def nearest_choice(share: float) -> int:
    """The choice whose scale is nearest to ``share``, the larger of two."""
    return max(range(CHOICES), key=lambda choice: (-abs(SCALES[choice] - share), choice))


def as_text(encoding: Iterable[int]) -> str:
    """``12-30-4``."""
    return "-".join(str(gene) for gene in encoding)


def from_text(text: str) -> Encoding:
    """The encoding that :func:`as_text` wrote; its length is not checked.

    Raises:
        ValueError: for any other text.
    """
    parts = text.split("-")
    if not all(part.isascii() and part.isdigit() and int(part) <= WIDEST for part in parts):
        raise ValueError(f"an encoding is written as genes from 0 to {WIDEST} with '-' between, got {text!r}")
    return tuple(int(part) for part in parts)
