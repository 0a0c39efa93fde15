"""The rows of an id. A row is a position, an id the user's label of it; several rows may have the same id.

N rows, W wanted ids, H hits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class IdOrder(NamedTuple):
    """What sorts some ids (N,)."""

    rows: Tensor  # (N,) by ascending id, those of one id by number
    first: int | None  # the least id, if the others are the N - 1 next ones; else None


def order_of(ids: Tensor) -> IdOrder:
    """The order of ids (N,). Synchronizes with the device."""
    rows = torch.argsort(ids, stable=True)
    if not rows.shape[0]:
        return IdOrder(rows, None)
    in_order = ids[rows]
    return IdOrder(rows, int(in_order[0]) if bool((in_order.diff() == 1).all()) else None)


def rows_with(ids: Tensor, order: IdOrder, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """All rows that have a wanted id (W,): rows (H,), and the position of their id in `wanted` (H,), which ascends.

    `order` is that of the ids (N,). Takes W log N time, or W for consecutive ids; the rows of one id ascend.

    >>> ids = torch.tensor([7, 5, 7])
    >>> rows_with(ids, order_of(ids), torch.tensor([7, 6]))
    (tensor([0, 2]), tensor([0, 0]))
    """
    if order.first is not None:
        at = wanted - order.first
        which = torch.nonzero((at >= 0) & (at < ids.shape[0]))[:, 0]
        return order.rows[at[which]], which
    first = torch.searchsorted(ids, wanted, sorter=order.rows)
    counts = torch.searchsorted(ids, wanted, sorter=order.rows, right=True) - first
    which = torch.repeat_interleave(torch.arange(wanted.shape[0], device=ids.device), counts)
    nth = torch.arange(which.shape[0], device=ids.device) - (counts.cumsum(0) - counts)[which]
    return order.rows[first[which] + nth], which


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
