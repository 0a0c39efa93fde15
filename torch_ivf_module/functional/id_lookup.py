"""The rows of an id. A row is a position, an id the user's label of it; several rows may have the same id.

N rows, W wanted ids, H hits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows_with(ids: Tensor, order: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """All rows that have a wanted id (W,): rows (H,), and the position of their id in `wanted` (H,), which ascends.

    `order` (N,) sorts the ids (N,), stably. Takes W log N time; the rows of one id ascend.

    >>> ids = torch.tensor([7, 5, 7])
    >>> rows_with(ids, torch.argsort(ids, stable=True), torch.tensor([7, 6]))
    (tensor([0, 2]), tensor([0, 0]))
    """
    first = torch.searchsorted(ids, wanted, sorter=order)
    counts = torch.searchsorted(ids, wanted, sorter=order, right=True) - first
    which = torch.repeat_interleave(torch.arange(wanted.shape[0], device=ids.device), counts)
    nth = torch.arange(which.shape[0], device=ids.device) - (counts.cumsum(0) - counts)[which]
    return order[first[which] + nth], which


def matches(ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """`rows_with` for wanted ids (W,) that ascend, without a sorted order: one pass over the ids; rows (H,) ascend."""
    if not wanted.shape[0]:
        return ids.new_empty(0), ids.new_empty(0)
    at = torch.searchsorted(wanted, ids).clamp_(max=wanted.shape[0] - 1)
    rows = torch.nonzero(wanted[at] == ids)[:, 0]
    return rows, at[rows]


def last_of(rows: Tensor, which: Tensor, count: int) -> Tensor:
    """The last row of each of `count` wanted ids (count,), -1 for none; rows and which (H,) as `rows_with` gives."""
    return rows.new_full((count,), -1).scatter_reduce_(0, which, rows, "amax")
