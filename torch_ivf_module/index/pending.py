"""Updates that are not packed yet: rows that were added, and packed rows that were removed.

Packing copies the whole index, so small updates are collected here. A search reads the pending rows as a second, small
set of inverted lists, and masks the deleted rows: `PendingRows` and `DeletedRows` are both as they were at one time.
N packed rows, T pending rows, H hits.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.id_lookup import matches
from ..functional.lists import InvertedLists, inverted_lists, kept_lists, mask_rows, pack
from .lazy import Latest

_FEW = 512  # up to so many pending rows are sorted again at every read, whatever the size of the index
_REMOVED = -1  # the id of a pending row that was removed; no stored row has it


class PendingRows:
    """The rows that were pending at one time, in the order in which they were added.

    `columns` are vectors, ids and lists, each in tensors that follow each other. Only tensors that the lists hold now
    count: others may be appended later. There are `stored` rows with removed ones, `rows` without, at least one.
    """

    def __init__(self, columns: tuple[list[Tensor], ...], rows: int, stored: int) -> None:
        self._columns = [(column, len(column)) for column in columns]
        self.rows, self._stored = rows, stored
        self._lists: Latest[Tensor, InvertedLists] = Latest()

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows: x (T, d), ids (T,), lists (T,)."""
        x, ids, assigned = (parts[0] if count == 1 else torch.cat(parts[:count]) for parts, count in self._columns)
        if self._stored > self.rows:
            kept = torch.nonzero(ids != _REMOVED)[:, 0]
            x, ids, assigned = (column.index_select(0, kept) for column in (x, ids, assigned))
        return x, ids, assigned

    def lists(self, nlist: int, origin: Tensor, metric: str) -> InvertedLists:
        """The rows as inverted lists."""

        def made(origin: Tensor) -> InvertedLists:
            packed, offsets, ids = pack(*self.joined(), nlist)
            return inverted_lists(packed, offsets, ids, metrics.row_bias(packed, origin, metric))

        return self._lists.get(origin, made)

    @property
    def bytes(self) -> int:
        """Memory of the lists made for searching."""
        return sum(tensor.nbytes for tensor in self._lists.value or ())


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
        self.rows = 0  # pending rows, without removed ones
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
        stored = sum(tensor.nbytes for tensor in (*self._x, *self._ids, *self._assigned))
        return stored + sum(part.bytes for part in (self._now, self.deleted) if part is not None)

    def copied(self) -> PendingUpdates:
        """The same updates, for changes that are to be seen all at once or not at all; tensors are not copied."""
        other = copy.copy(self)
        other._x, other._ids, other._assigned = list(self._x), list(self._ids), list(self._assigned)
        return other

    # -- pending rows --------------------------------------------------------------------------------------

    def pending(self) -> PendingRows | None:
        """The pending rows as they are now, None if there are none."""
        if self._now is None and self.rows:
            self._now = PendingRows((self._x, self._ids, self._assigned), self.rows, self._stored_rows)
        return self._now

    def push(self, x: Tensor, ids: Tensor, assigned: Tensor, *, custom_ids: bool) -> None:
        """Append rows x (n, d), ids (n,) and lists (n,); the tensors are kept, not copied."""
        if not x.shape[0]:  # a tensor without rows may have another dtype or device than later ones
            return
        self.custom_ids |= custom_ids
        self._x.append(x)
        self._ids.append(ids)
        self._assigned.append(assigned)
        self.rows += x.shape[0]
        self._stored_rows += x.shape[0]
        self._now = None

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """All pending rows: x (T, d), ids (T,), lists (T,). There must be at least one."""
        if len(self._x) > 1 or self._stored_rows > self.rows:
            x, ids, assigned = PendingRows((self._x, self._ids, self._assigned), self.rows, self._stored_rows).joined()
            self._x, self._ids, self._assigned = [x], [ids], [assigned]
            self._stored_rows = self.rows
        return self._x[0], self._ids[0], self._assigned[0]

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
                self._x, self._ids, self._assigned, self._stored_rows, self.custom_ids = [], [], [], 0, False
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
