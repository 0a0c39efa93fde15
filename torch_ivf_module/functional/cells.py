"""Cells: the rows of one list that have one group. In each list rows are sorted by group, so a cell is a range of rows.

Cells are inverted lists, more and shorter ones, so every scan reads them as it reads lists. N rows, L lists, G groups,
C cells, Q queries, P probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .kernels import Kernel
from .lists import InvertedLists, lengths, narrow, offsets_of

NO_GROUP = -1  # of rows that were added without one


class Cells(NamedTuple):
    """Cell c is the rows ``offsets[c] : offsets[c] + sizes[c]``. Cell C, an additional one, is empty."""

    groups: Tensor  # (G,) int64, distinct, ascending
    keys: Tensor  # (C + 1,) int64, ascending: number of the list * G + position of the group in `groups`
    offsets: Tensor  # (C + 1,) int64
    sizes: Tensor  # (C + 1,) int64


def filled_groups(groups: Tensor | None, ids: Tensor) -> Tensor:
    """The groups (N,) of rows with ids (N,): NO_GROUP for all if there are none."""
    return torch.full_like(ids, NO_GROUP) if groups is None else groups


def cells_of(offsets: Tensor, groups: Tensor) -> Cells:
    """The cells of lists with offsets (L + 1,), whose rows have `groups` (N,), sorted within each list."""
    distinct, position = groups.unique(return_inverse=True)
    numbers = torch.arange(max(0, offsets.shape[0] - 1), device=groups.device)
    assigned = torch.repeat_interleave(numbers, lengths(offsets)) if numbers.shape[0] else groups[:0]
    keys, counts = torch.unique_consecutive(assigned * distinct.shape[0] + position, return_counts=True)
    keys = torch.cat([keys, keys.new_full((1,), torch.iinfo(torch.int64).max)])
    return Cells(distinct, keys, pad(counts.cumsum(0), (1, 0)), pad(counts, (0, 1)))


def cells_probed(
    cells: Cells, lists: InvertedLists, probed: Tensor, groups: Tensor, kernel: Kernel | None = None
) -> tuple[InvertedLists, Tensor]:
    """The cells of the groups (Q,) in the lists probed (Q, P), as lists of their own, and which of them each query
    reads (Q, P): an empty one for each list that has no row of the group.
    """
    if kernel is not None:
        offsets, sizes, moved = kernel.cells(probed, groups, cells)
        return lists._replace(offsets=offsets, sizes=sizes), moved
    none = cells.keys.shape[0] - 1
    if not none:
        return lists._replace(offsets=cells.offsets, sizes=cells.sizes), torch.zeros_like(probed)
    at = torch.searchsorted(cells.groups, groups).clamp_(max=cells.groups.shape[0] - 1)
    key = torch.add(at[:, None], probed, alpha=cells.groups.shape[0])
    key = key.masked_fill_((cells.groups.take(at) != groups)[:, None], -1)
    cell = torch.searchsorted(cells.keys, key)
    used = pad(cell.masked_fill_(cells.keys.take(cell) != key, none).flatten(), (0, 1), value=none)
    used, moved = used.unique(return_inverse=True)
    new = lists._replace(offsets=cells.offsets.take(used), sizes=cells.sizes.take(used))
    return new, moved[: probed.numel()].view(probed.shape)


def groups_at(cells: Sequence[Cells], rows: Tensor) -> Tensor:
    """The groups of rows (...) that are numbered over the segments to which the cells belong; NO_GROUP for -1."""
    result, before = torch.full_like(rows, NO_GROUP), 0
    for part in cells:
        count = int(part.offsets[-1])
        inside = (rows >= before) & (rows < before + count)
        cell = torch.searchsorted(part.offsets, rows[inside] - before, right=True) - 1
        result[inside] = part.groups[part.keys[cell] % max(1, part.groups.shape[0])]
        before += count
    return result


def order_by_group(assigned: Tensor, groups: Tensor, nlist: int) -> Tensor:
    """The order (N,) that sorts rows by list, those of a list by group, and is stable."""
    order = torch.sort(groups, stable=True).indices
    return order[torch.sort(narrow(assigned[order], nlist), stable=True).indices]


def pack_by_group(
    x: Tensor, ids: Tensor, groups: Tensor, assigned: Tensor, nlist: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort vectors (N, d), ids (N,) and groups (N,) by list and group, stably: packed, offsets, ids, groups."""
    order = order_by_group(assigned, groups, nlist)
    return x.index_select(0, order), offsets_of(assigned, nlist), ids[order], groups[order]


def append_by_group(
    packed: Tensor, offsets: Tensor, labels: Tensor, x: Tensor, new_labels: Tensor, assigned: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`lists.append` that keeps rows sorted by group; labels (N, 2) and new_labels (n, 2) are ids and groups."""
    nlist, old = offsets.shape[0] - 1, packed.shape[0]
    lists = torch.repeat_interleave(torch.arange(nlist, device=packed.device), lengths(offsets))
    lists, labels = torch.cat([lists, assigned]), torch.cat([labels, new_labels])
    order = order_by_group(lists, labels[:, 1], nlist)
    at = torch.empty_like(order)
    at[order] = torch.arange(order.shape[0], device=order.device)
    out = packed.new_empty(order.shape[0], x.shape[1])
    out.index_copy_(0, at[:old], packed).index_copy_(0, at[old:], x)  # copies each vector once
    return out, offsets_of(lists, nlist), labels[order]
