"""Updates that are not packed yet: rows that were added, and packed rows that were removed.

Packing copies the whole index, so small updates are collected here. A search reads the pending rows as a second, small
set of inverted lists, and masks the deleted rows: `PendingRows` and `DeletedRows` are both as they were at one time.
N packed rows, T pending rows, H hits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.cells import Cells, cells_of, filled_groups, pack_by_group
from ..functional.id_lookup import matches
from ..functional.lists import InvertedLists, inverted_lists, kept_lists, mask_rows, pack
from .lazy import Latest

_FEW = 512  # up to so many pending rows are sorted again at every read, whatever the size of the index
_REMOVED = -1  # the id of a pending row that was removed; no stored row has it


class PendingRows:
    """The rows that were pending at one time, in the order in which they were added.

    `columns` are vectors, ids and lists, each in tensors that follow each other, and `groups` those of the same rows,
    None where they have none. Only tensors that the lists hold now count: others may be appended later. There are
    `stored` rows with removed ones, `rows` without, at least one, of so many `changes`.
    """

    def __init__(
        self, columns: tuple[list[Tensor], ...], groups: list[Tensor | None], rows: int, stored: int, changes: int
    ) -> None:
        self._columns = [(column, len(column)) for column in columns]
        self._groups = groups, len(groups)
        self.rows, self.changes, self._stored = rows, changes, stored
        self._sorted: Latest[Tensor, tuple[InvertedLists, Tensor | None]] = Latest()
        self._cells: Latest[InvertedLists, Cells] = Latest()

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The rows: x (T, d), ids (T,), lists (T,), groups (T,) or None."""
        x, ids, assigned = (parts[0] if count == 1 else torch.cat(parts[:count]) for parts, count in self._columns)
        groups = self._joined_groups()
        if self._stored > self.rows:
            kept = torch.nonzero(ids != _REMOVED)[:, 0]
            x, ids, assigned = (column.index_select(0, kept) for column in (x, ids, assigned))
            groups = None if groups is None else groups[kept]
        return x, ids, assigned, groups

    def _joined_groups(self) -> Tensor | None:
        """The groups of all stored rows, removed ones too."""
        parts, count = self._groups
        if all(part is None for part in parts[:count]):
            return None
        assigned = self._columns[-1][0][:count]  # in tensors of the same rows
        return torch.cat([filled_groups(*pair) for pair in zip(parts[:count], assigned, strict=True)])

    def lists(self, nlist: int, origin: Tensor, metric: str) -> InvertedLists:
        """The rows as inverted lists, those of each list sorted by group if they have groups."""

        def made(origin: Tensor) -> tuple[InvertedLists, Tensor | None]:
            x, ids, assigned, groups = self.joined()
            if groups is None:
                packed, offsets, ids = pack(x, ids, assigned, nlist)
            else:
                packed, offsets, ids, groups = pack_by_group(x, ids, groups, assigned, nlist)
            return inverted_lists(packed, offsets, ids, metrics.row_bias(packed, origin, metric)), groups

        return self._sorted.get(origin, made)[0]

    def cells(self, nlist: int, origin: Tensor, metric: str) -> Cells:
        """The cells of what `lists` returns."""
        lists = self.lists(nlist, origin, metric)
        groups = self._sorted.value[1] if self._sorted.value else None
        return self._cells.get(lists, lambda lists: cells_of(lists.offsets, filled_groups(groups, lists.ids)))

    @property
    def bytes(self) -> int:
        """Memory of the lists and cells made for searching."""
        lists = self._sorted.value[0] if self._sorted.value else ()
        return sum(tensor.nbytes for tensor in (*lists, *(self._cells.value or ())))


class DeletedRows:
    """Which packed rows were removed at one time: `mask` (N,) bool, true for `rows` of them."""

    def __init__(self, mask: Tensor, rows: int) -> None:
        self.mask, self.rows = mask, rows
        self._masked: Latest[InvertedLists, InvertedLists] = Latest()
        self._left_out: Latest[InvertedLists, InvertedLists] = Latest()

    def masked(self, lists: InvertedLists) -> InvertedLists:
        """The packed lists with deleted rows masked. The sizes of the lists still count them."""
        return self._masked.get(lists, lambda lists: mask_rows(lists, ~self.mask))

    def left_out(self, lists: InvertedLists) -> InvertedLists:
        """Copies of the packed lists without the deleted rows."""
        return self._left_out.get(lists, lambda lists: kept_lists(lists, ~self.mask))

    @property
    def bytes(self) -> int:
        """Memory of the mask, and of biases and lists made for searching."""
        masked, copied = self._masked.value, self._left_out.value
        made = [*([] if masked is None else [masked.bias]), *(copied or ())]
        return self.mask.nbytes + sum(tensor.nbytes for tensor in made)


class PendingUpdates:
    """Pending rows in the order they were added, with their ids and lists, and which packed rows are deleted."""

    def __init__(self) -> None:
        # Lists of tensors that are appended to or replaced, not changed otherwise: a `PendingRows` may have them.
        self._x: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._assigned: list[Tensor] = []
        self._groups: list[Tensor | None] = []  # None for rows without groups
        self.rows = 0  # pending rows, without removed ones
        self.changes = 0  # calls that added them
        self._stored_rows = 0  # rows of `_x`, with removed ones
        self.custom_ids = False  # whether callers chose some of the ids, so that packed rows may have them too
        self._now: PendingRows | None = None  # the pending rows, if they were asked for since the last change
        self.deleted: DeletedRows | None = None

    def __bool__(self) -> bool:
        """True if there are updates that are not packed."""
        return bool(self.rows or self.deleted)

    @property
    def deleted_rows(self) -> int:
        """The number of packed rows that are deleted."""
        return 0 if self.deleted is None else self.deleted.rows

    @property
    def bytes(self) -> int:
        """Memory of the pending rows, of the mask of deleted ones, and of the lists made for searching."""
        stored = [*self._x, *self._ids, *self._assigned, *(part for part in self._groups if part is not None)]
        made = sum(part.bytes for part in (self._now, self.deleted) if part is not None)
        return sum(tensor.nbytes for tensor in stored) + made

    def copied(self) -> PendingUpdates:
        """The same updates, for changes that are to be seen all at once or not at all; tensors are not copied."""
        other = copy.copy(self)
        other._x, other._ids = list(self._x), list(self._ids)
        other._assigned, other._groups = list(self._assigned), list(self._groups)
        return other

    def snapshot(self) -> tuple[PendingUpdates, list[int]]:
        """The state for `restored`. It copies no list: they are appended to or replaced, so their lengths will do."""
        return copy.copy(self), [len(column) for column in self._columns()]

    @staticmethod
    def restored(snapshot: tuple[PendingUpdates, list[int]]) -> PendingUpdates:
        """The updates as they were at the snapshot; the present ones must not be used any more."""
        updates, counts = snapshot
        for column, count in zip(updates._columns(), counts, strict=True):
            del column[count:]
        return updates

    def _columns(self) -> tuple[list[Any], ...]:
        return self._x, self._ids, self._assigned, self._groups

    # -- pending rows --------------------------------------------------------------------------------------

    @property
    def grouped(self) -> bool:
        """Whether pending rows have groups."""
        return any(part is not None for part in self._groups)

    def pending(self) -> PendingRows | None:
        """The pending rows as they are now, None if there are none."""
        if self._now is None and self.rows:
            self._now = self._as_they_are()
        return self._now

    def _as_they_are(self) -> PendingRows:
        columns = self._x, self._ids, self._assigned
        return PendingRows(columns, self._groups, self.rows, self._stored_rows, self.changes)

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
        self.changes += 1
        self._stored_rows += x.shape[0]
        self._now = None

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """All pending rows: x (T, d), ids (T,), lists (T,), groups (T,) or None. There must be at least one."""
        if len(self._x) > 1 or self._stored_rows > self.rows:
            x, ids, assigned, groups = self._as_they_are().joined()
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
            self._now = None
            if not self.rows:
                self._x, self._ids, self._assigned, self._groups = [], [], [], []
                self._stored_rows, self.changes, self.custom_ids = 0, 0, False
            elif self._stored_rows > 2 * self.rows + _FEW:
                self.joined()

    def _all_ids(self) -> Tensor:
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids)]
        return self._ids[0]

    # -- deleted packed rows -------------------------------------------------------------------------------

    def delete(self, rows: Tensor, total: int) -> None:
        """Mark packed rows (H,) of `total` as deleted; each must be distinct and not marked yet."""
        if rows.shape[0]:
            old = self.deleted
            mask = torch.zeros(total, dtype=torch.bool, device=rows.device) if old is None else old.mask
            self.deleted = DeletedRows(mask.index_fill(0, rows, True), self.deleted_rows + rows.shape[0])


def few(pending: int, changes: int, packed: int) -> bool:
    """Whether reading `pending` rows, added by so many changes, as a second set of lists is cheaper than packing them.

    A search after each change sorts T pending rows; packing copies all N rows, once in C changes. The sum is least
    where T = N / C. Besides, a search reads at most a sixteenth more rows than it has to.
    """
    return pending <= _FEW or (pending * changes <= packed and 16 * pending <= packed)


def many_deleted(deleted: int, packed: int) -> bool:
    """Whether the deleted ones of the packed rows are to be taken out of them: when they are more than an eighth.

    So a removal costs the copying of eight rows, whatever the size of the index, and a search reads at most a seventh
    more rows than it has to.
    """
    return 8 * deleted > packed
