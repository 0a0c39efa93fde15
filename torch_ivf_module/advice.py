"""Rules of thumb for the settings of an inverted file.

N vectors, L lists.
"""

from __future__ import annotations

import math

__all__ = ["nlist_for", "nlist_range"]

FEWEST_ROWS = 39  # of training a list, below which faiss warns, and so do we


def nlist_for(rows: int) -> int:
    """Lists for so many vectors: 4 * sqrt(N), which balances choosing lists and reading them, or what can be trained.

    >>> nlist_for(1_000_000), nlist_for(1_000)
    (4000, 25)
    """
    return max(1, min(round(4 * math.sqrt(rows)), rows // FEWEST_ROWS))


def nlist_range(rows: int) -> tuple[int, int]:
    """The fewest and the most lists that are usual: sqrt(N) and 16 * sqrt(N)."""
    most = max(1, rows // FEWEST_ROWS)
    return min(round(math.sqrt(rows)) or 1, most), min(round(16 * math.sqrt(rows)) or 1, most)
