"""How many rows of each list a query reads. It reads the first rows of a list.

Q queries, L lists, P probes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FALL = 3.0  # the weight of a list at the median distance is exp(-3) times that of the nearest
_FARTHEST = 8.0  # largest z, see `distance_weights`
# Shares are rounded up to multiples of 1/256 of the budget. On the headline (1,500 queries, budgets of 16,384 / 32,768
# / 65,536 / 131,072) the recall is 0.843 / 0.939 / 0.983 / 0.998; with shares rounded to a row, which leaves far lists
# out, 0.817 / 0.918 / 0.971 / 0.993, for 9 to 5% fewer rows.
_PARTS = 256
_ROUNDING = 1e-3  # of 1/256: a share that exceeds a multiple by less, as by the rounding of its weight, is not raised


class Budget(NamedTuple):
    """The rows that a query may read, and how they are divided among its lists; 0 means no limit."""

    rows: int = 0
    weighted: bool = True  # shares fall with the distance of a list; otherwise they are equal
    even_cap: bool = False  # at most ceil(rows / P) of each list
    strict: bool = False  # the total never exceeds `rows`
    drop_far: bool = False  # lists are not read from the first on whose minimum no longer fits
    least: int = 0  # minimum of each list, or all its rows if it has fewer
    most: int = 0  # maximum of each list


def row_limits(scores: Tensor, sizes: Tensor, budget: Budget) -> Tensor:
    """Rows (Q, P) int64 that each query reads of its lists, nearest first; never more than a list has.

    `scores` (Q, P) are the ranking scores of the centroids, best first, `sizes` (Q, P) the lengths of the lists.
    Each list gets a share of the budget, rounded up to a multiple of 1/256 of it, raised to `least` and then capped. At
    least one row of the nearest list is read.

    >>> scores, sizes = torch.tensor([[0.0, -1.0, -2.0]]), torch.tensor([[50, 50, 50]])
    >>> row_limits(scores, sizes, Budget(40))
    tensor([[39,  3,  1]])
    """
    caps = sizes
    if budget.most:
        caps = caps.clamp(max=budget.most)
    if not budget.rows:
        return caps
    even = -(-budget.rows // max(1, sizes.shape[1]))
    if budget.even_cap:
        caps = caps.clamp(max=even)
    base = caps.clamp(max=min(budget.least, budget.rows))
    if budget.drop_far:
        base = _fitting(base, budget.rows)
    if not budget.weighted:
        wanted = torch.full_like(caps, even)
    elif budget.drop_far:
        read = (base > 0) | (budget.least == 0)
        remaining = budget.rows - base.sum(1, keepdim=True)
        wanted = base + _shares(distance_weights(scores) * read, remaining)
    else:
        wanted = _shares(distance_weights(scores), torch.full_like(caps[:, :1], budget.rows))
    limits = torch.minimum(torch.maximum(wanted, base), caps)
    if budget.strict:
        limits = _within(limits, base, budget.rows)
    limits[:, :1] = torch.maximum(limits[:, :1], caps[:, :1].clamp(max=1))
    return limits


def distance_weights(scores: Tensor) -> Tensor:
    """exp(-3 z) with z = (d - d_min) / (d_median - d_min), at most 8; (Q, P) for ranking scores best first.

    A ranking score is a multiple of the negated distance plus a term per query, which cancels in the differences.
    """
    best, median = scores[:, :1], scores[:, (scores.shape[1] - 1) // 2, None]
    z = (best - scores) / (best - median).clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.exp(-_FALL * z.nan_to_num(nan=_FARTHEST).clamp(0, _FARTHEST))


def _shares(weights: Tensor, rows: Tensor) -> Tensor:
    """`rows` (Q, 1) divided by weight, each share rounded up to a multiple of 1/256; 0 for a weight of 0."""
    total = weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    parts = torch.ceil(weights * (_PARTS / total) - _ROUNDING).long().clamp(min=1) * (weights > 0)
    return torch.div(parts * rows + (_PARTS - 1), _PARTS, rounding_mode="floor")


def _fitting(least: Tensor, rows: int) -> Tensor:
    """The minima of the nearest lists that fit into `rows` together; 0 for the others."""
    fits = least.cumsum(1) <= rows
    return torch.where(fits, least, 0)


def _within(limits: Tensor, base: Tensor, rows: int) -> Tensor:
    """`limits` (Q, P) reduced so that their total is at most `rows`.

    The rows above `base` are reduced in proportion. If `base` alone exceeds `rows`, the farthest lists lose theirs.
    """
    base = torch.minimum(base, (rows - (base.cumsum(1) - base)).clamp(min=0))
    extra, remaining = limits - base, rows - base.sum(1, keepdim=True)
    wanted = extra.sum(1, keepdim=True)
    return base + torch.where(wanted > remaining, extra * remaining // wanted.clamp(min=1), extra)


def within_max_codes(sizes: Tensor, max_codes: int) -> Tensor:
    """Which lists (Q, P) are read under `max_codes`: nearest first, up to the last with which the total is within it.

    `sizes` (Q, P) are the rows to read of the probed lists, nearest first. The nearest list is always read.
    """
    read = sizes.cumsum(1) <= max_codes
    read[:, :1] = True
    return read
