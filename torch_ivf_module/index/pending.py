"""Updates that are not packed yet: rows that were added, and packed rows that were removed.

Packing copies the whole index, so small updates are collected here. A search reads the pending rows as a second, small
set of inverted lists, and masks the deleted rows. N packed rows, T pending rows, H hits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.cells import NO_GROUP, Cells, cells_of, pack_by_group
from ..functional.id_lookup import matches
from ..functional.lists import InvertedLists, inverted_lists, mask_rows, pack

_FEW = 512  # up to so many pending rows are sorted again at every read, whatever the size of the index
_REMOVED = -1  # the id of a pending row that was removed; no stored row has it


class PendingUpdates:
    """Pending rows in the order they were added, with their ids and lists, and which packed rows are deleted."""

    def __init__(self) -> None:
        self._x: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._assigned: list[Tensor] = []
        self._groups: list[Tensor | None] = []  # None for rows without groups
        self.rows = 0  # pending rows, without removed ones
        self._stored_rows = 0  # rows of `_x`, with removed ones
        self.custom_ids = False  # whether callers chose some of the ids, so that packed rows may have them too
        # The origin that they are relative to, the pending rows as lists, and their groups in that order.
        self._lists: tuple[Tensor, InvertedLists, Tensor | None] | None = None
        self.deleted: Tensor | None = None  # (N,) bool: packed rows that were removed
        self.deleted_rows = 0
        self._masked: tuple[InvertedLists, InvertedLists] | None = None  # packed lists, and those without deleted rows

    def __bool__(self) -> bool:
        """True if there are updates that are not packed."""
        return bool(self.rows or self.deleted_rows)

    @property
    def bytes(self) -> int:
        """Memory of the pending rows, of the mask of deleted ones, and of the lists made for searching."""
        tensors = [*self._x, *self._ids, *self._assigned, *(part for part in self._groups if part is not None)]
        tensors += [] if self.deleted is None else [self.deleted]
        tensors += [] if self._lists is None else list(self._lists[1])
        tensors += [] if self._masked is None else [self._masked[1].bias]
        return sum(tensor.nbytes for tensor in tensors)

    # -- pending rows --------------------------------------------------------------------------------------

    @property
    def grouped(self) -> bool:
        """Whether pending rows have groups."""
        return any(part is not None for part in self._groups)

    def push(
        self, x: Tensor, ids: Tensor, assigned: Tensor, groups: Tensor | None = None, *, custom_ids: bool
    ) -> None:
        """Append rows x (n, d), ids (n,), lists (n,) and groups (n,); the tensors are kept, not copied."""
        if not x.shape[0]:  # a tensor without rows may have another dtype or device than later ones
            return
        self.custom_ids |= custom_ids
        self._x.append(x)
        self._ids.append(ids)
        self._assigned.append(assigned)
        self._groups.append(groups)
        self.rows += x.shape[0]
        self._stored_rows += x.shape[0]
        self._lists = None

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All pending rows: x (T, d), ids (T,), lists (T,), groups (T,) or None. There must be at least one."""
        if len(self._x) > 1 or self._stored_rows > self.rows:
            x, ids, assigned = torch.cat(self._x), self._all_ids(), torch.cat(self._assigned)
            groups = self._all_groups()
            if self._stored_rows > self.rows:
                kept = torch.nonzero(ids != _REMOVED)[:, 0]
                x, ids, assigned = (column.index_select(0, kept) for column in (x, ids, assigned))
                groups = None if groups is None else groups[kept]
            self._x, self._ids, self._assigned, self._groups = [x], [ids], [assigned], [groups]
            self._stored_rows = self.rows
        return self._x[0], self._ids[0], self._assigned[0], self._groups[0]

    def find(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The pending rows (H,) with one of the ascending ids `wanted`, and the position of its id in `wanted` (H,)."""
        if not self.rows:
            return wanted.new_empty(0), wanted.new_empty(0)
        ids = self._all_ids()
        at, which = matches(ids, wanted)
        kept = ids[at] != _REMOVED
        return at[kept], which[kept]

    def remove(self, at: Tensor) -> None:
        """Remove the pending rows at positions (H,), as `find` gives them."""
        if at.shape[0]:
            # Out of place: a tensor made in inference mode may not be written to outside.
            self._ids = [self._all_ids().index_fill(0, at, _REMOVED)]
            self.rows -= at.shape[0]
            self._lists = None
            if not self.rows:
                self._x, self._ids, self._assigned, self._groups = [], [], [], []
                self._stored_rows, self.custom_ids = 0, False
            elif self._stored_rows > 2 * self.rows + _FEW:
                self.joined()

    def lists(self, nlist: int, origin: Tensor, metric: str) -> InvertedLists:
        """The pending rows as inverted lists."""
        if self._lists is None or self._lists[0] is not origin:
            x, ids, assigned, groups = self.joined()
            if groups is None:
                packed, offsets, ids = pack(x, ids, assigned, nlist)
            else:
                packed, offsets, ids, groups = pack_by_group(x, ids, groups, assigned, nlist)
            bias = metrics.row_bias(packed, origin, metric)
            self._lists = origin, inverted_lists(packed, offsets, ids, bias), groups
        return self._lists[1]

    def cells(self, nlist: int, origin: Tensor, metric: str) -> Cells:
        """The cells of what `lists` returns."""
        lists = self.lists(nlist, origin, metric)
        groups = None if self._lists is None else self._lists[2]
        return cells_of(lists.offsets, torch.full_like(lists.ids, NO_GROUP) if groups is None else groups)

    def _all_groups(self) -> Tensor | None:
        if not self.grouped:
            return None
        parts = zip(self._groups, self._assigned, strict=True)
        return torch.cat([torch.full_like(lists, NO_GROUP) if part is None else part for part, lists in parts])

    def _all_ids(self) -> Tensor:
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids)]
        return self._ids[0]

    # -- deleted packed rows -------------------------------------------------------------------------------

    def delete(self, rows: Tensor, total: int) -> None:
        """Mark packed rows (H,) of `total` as deleted; each must be distinct and not marked yet."""
        if rows.shape[0]:
            mask = torch.zeros(total, dtype=torch.bool, device=rows.device) if self.deleted is None else self.deleted
            self.deleted = mask.index_fill(0, rows, True)
            self.deleted_rows += rows.shape[0]
            self._masked = None

    def without_deleted(self, lists: InvertedLists) -> InvertedLists:
        """The packed lists with deleted rows masked. The sizes of the lists still count them."""
        if self.deleted is None:
            return lists
        if self._masked is None or self._masked[0] is not lists:
            self._masked = lists, mask_rows(lists, ~self.deleted)
        return self._masked[1]


def few(pending: int, packed: int) -> bool:
    """Whether reading `pending` rows as a second set of lists is cheaper than packing them.

    A read sorts T pending rows; packing copies all N once every T reads. The sum is least at T = sqrt(N).
    """
    return pending <= max(_FEW, math.isqrt(packed))


def many_deleted(deleted: int, packed: int) -> bool:
    """Whether the deleted ones of the packed rows are to be taken out of them: when they are more than an eighth.

    So a removal costs the copying of eight rows, whatever the size of the index, and a search reads at most a seventh
    more rows than it has to.
    """
    return 8 * deleted > packed
