"""How many rows of each list a query may read: always the first rows of the list, so many of them.

Q queries, L lists, P probes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_FALL = 3.0  # a list as far away as the median weighs exp(-3) of the nearest
_FARTHEST = 8.0
# Shares are rounded up to so many parts of the budget. On the headline (1,500 queries, budgets of 16,384 / 32,768 /
# 65,536 / 131,072) the recall is 0.843 / 0.939 / 0.983 / 0.998; with shares rounded to a row, which leaves far lists
# out, 0.817 / 0.918 / 0.971 / 0.993, for 9 to 5% fewer rows.
_PARTS = 256
_SURE = 1e-3  # of a part: a share is not rounded up for the rounding of its weight


class Budget(NamedTuple):
    """A query's budget of rows and how it is shared out among the lists; 0 means no such limit."""

    rows: int = 0
    weighted: bool = True  # shares fall with the distance of a list, or are all the same
    even_cap: bool = False  # no list gives more than ceil(rows / P)
    strict: bool = False  # the total never passes `rows`
    drop_far: bool = False  # lists whose least share no longer fits are not read at all
    least: int = 0  # of each list, as far as it has them
    most: int = 0  # of each list


def row_limits(scores: Tensor, sizes: Tensor, budget: Budget) -> Tensor:
    """Rows (Q, P) int64 that each query reads of its lists, nearest first; never more than a list has.

    `scores` (Q, P) are the ranking scores of the centroids, best first, `sizes` (Q, P) the lengths of the lists.
    Shares of the budget, rounded up to 256ths of it, raised to `least` and then capped; the nearest list gives a row at
    least.

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
        kept = (base > 0) | (budget.least == 0)
        left = budget.rows - base.sum(1, keepdim=True)
        wanted = base + _shares(distance_weights(scores) * kept, left)
    else:
        wanted = _shares(distance_weights(scores), torch.full_like(caps[:, :1], budget.rows))
    limits = torch.minimum(torch.maximum(wanted, base), caps)
    if budget.strict:
        limits = _within(limits, base, budget.rows)
    limits[:, :1] = torch.maximum(limits[:, :1], caps[:, :1].clamp(max=1))
    return limits


def distance_weights(scores: Tensor) -> Tensor:
    """exp(-3 z) with z = (d - d_min) / (d_median - d_min), at most 8; (Q, P) for ranking scores best first.

    A ranking score is a multiple of the negated distance, but for a term that cancels in the differences.
    """
    best, median = scores[:, :1], scores[:, (scores.shape[1] - 1) // 2, None]
    z = (best - scores) / (best - median).clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.exp(-_FALL * z.nan_to_num(nan=_FARTHEST).clamp(0, _FARTHEST))


def _shares(weights: Tensor, rows: Tensor) -> Tensor:
    """`rows` (Q, 1) shared out by weight, each share rounded up to 256ths; a weight of 0 has none."""
    total = weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    parts = torch.ceil(weights * (_PARTS / total) - _SURE).long().clamp(min=1) * (weights > 0)
    return torch.div(parts * rows + (_PARTS - 1), _PARTS, rounding_mode="floor")


def _fitting(least: Tensor, rows: int) -> Tensor:
    """The least shares of the lists, nearest first, that fit into `rows` together; 0 for the others."""
    fits = least.cumsum(1) <= rows
    return torch.where(fits, least, 0)


def _within(limits: Tensor, base: Tensor, rows: int) -> Tensor:
    """`limits` cut so that no total passes `rows`: in proportion what exceeds `base`, then that, farthest first."""
    base = torch.minimum(base, (rows - (base.cumsum(1) - base)).clamp(min=0))
    spare, left = limits - base, rows - base.sum(1, keepdim=True)
    wanted = spare.sum(1, keepdim=True)
    return base + torch.where(wanted > left, spare * left // wanted.clamp(min=1), spare)


def within_max_codes(sizes: Tensor, max_codes: int) -> Tensor:
    """Which probes (Q, P) are read under a cap on rows: whole lists, nearest first, until the next would pass it.

    `sizes` (Q, P) are the rows to read of the probed lists, nearest first. The nearest list is always read.
    """
    keep = sizes.cumsum(1) <= max_codes
    keep[:, :1] = True
    return keep
