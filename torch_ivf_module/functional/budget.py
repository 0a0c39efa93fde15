"""How many rows of each list a query may read.

Q queries, P probes.
"""

from __future__ import annotations

from torch import Tensor


def within_max_codes(sizes: Tensor, max_codes: int) -> Tensor:
    """Which probes (Q, P) are read under a cap on rows: whole lists, nearest first, until the next would pass it.

    `sizes` (Q, P) are the lengths of the probed lists, nearest first. The nearest list is always read.
    """
    keep = sizes.cumsum(1) <= max_codes
    keep[:, :1] = True
    return keep
