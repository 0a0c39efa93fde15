"""What changed since the buffers were packed: rows that were added, and packed rows that were removed.

Packing costs a copy of the whole index, so single changes wait here. A search reads the waiting rows as a second,
small set of inverted lists, and passes over the removed ones; when either are many, the index is packed. N packed
rows, T waiting rows, H hits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.id_lookup import matches
from ..functional.lists import InvertedLists, inverted_lists, only, pack

_FEW = 512  # waiting rows that are cheap to sort again at every read, whatever the size of the index
_NONE = -1  # the id of a waiting row that was removed again; no other row may have it


class PendingUpdates:
    """Rows in the order they were added, each with its id and the list it was assigned to; and which are gone."""

    def __init__(self) -> None:
        self._x: list[Tensor] = []
        self._ids: list[Tensor] = []
        self._assigned: list[Tensor] = []
        self.rows = 0  # that wait, those removed again left out
        self._held = 0  # with them
        self.custom_ids = False
        self._lists: tuple[Tensor, InvertedLists] | None = None
        self.gone: Tensor | None = None  # (N,) bool: packed rows that were removed
        self.gone_rows = 0
        self._left: tuple[InvertedLists, InvertedLists] | None = None

    @property
    def pending(self) -> bool:
        """Whether the buffers are not all there is to know."""
        return bool(self.rows or self.gone_rows)

    @property
    def bytes(self) -> int:
        """Memory of the waiting rows and of the marks, and of what was made of them for searching."""
        tensors = [*self._x, *self._ids, *self._assigned, *([] if self.gone is None else [self.gone])]
        tensors += [] if self._lists is None else list(self._lists[1])
        tensors += [] if self._left is None else [self._left[1].bias]
        return sum(tensor.nbytes for tensor in tensors)

    # -- rows that wait ------------------------------------------------------------------------------------

    def push(self, x: Tensor, ids: Tensor, assigned: Tensor, *, custom_ids: bool) -> None:
        """Keep rows x (n, d), ids (n,) and lists (n,); the tensors are taken over, not copied.

        `custom_ids` says that the ids are the caller's, so that some may be there already.
        """
        if not x.shape[0]:  # nothing is pending, in whatever dtype and on whatever device the index is next
            return
        self.custom_ids |= custom_ids
        self._x.append(x)
        self._ids.append(ids)
        self._assigned.append(assigned)
        self.rows += x.shape[0]
        self._held += x.shape[0]
        self._lists = None

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """All waiting rows: x (T, d), ids (T,), lists (T,). At least one must have been pushed."""
        if len(self._x) > 1 or self._held > self.rows:
            x, ids, assigned = torch.cat(self._x), self._all_ids(), torch.cat(self._assigned)
            if self._held > self.rows:
                kept = torch.nonzero(ids != _NONE)[:, 0]
                x, ids, assigned = (column.index_select(0, kept) for column in (x, ids, assigned))
            self._x, self._ids, self._assigned = [x], [ids], [assigned]
            self._held = self.rows
        return self._x[0], self._ids[0], self._assigned[0]

    def find(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The waiting rows that carry a wanted id, see `by_id.matches`: positions (H,), and places in `wanted`."""
        if not self.rows:
            return wanted.new_empty(0), wanted.new_empty(0)
        ids = self._all_ids()
        at, which = matches(ids, wanted)
        kept = ids[at] != _NONE
        return at[kept], which[kept]

    def remove(self, at: Tensor) -> None:
        """Remove the waiting rows at positions (H,), as `find` gives them."""
        if at.shape[0]:
            # Out of place: a tensor made in inference mode may not be written to outside.
            self._ids = [self._all_ids().index_fill(0, at, _NONE)]
            self.rows -= at.shape[0]
            self._lists = None
            if not self.rows:
                self._x, self._ids, self._assigned, self._held, self.custom_ids = [], [], [], 0, False
            elif self._held > 2 * self.rows + _FEW:
                self.joined()

    def lists(self, nlist: int, origin: Tensor, metric: str) -> InvertedLists:
        """The waiting rows as inverted lists."""
        if self._lists is None or self._lists[0] is not origin:
            packed, offsets, ids = pack(*self.joined(), nlist)
            bias = metrics.row_bias(packed, origin, metric)
            self._lists = origin, inverted_lists(packed, offsets, ids, bias)
        return self._lists[1]

    def _all_ids(self) -> Tensor:
        if len(self._ids) > 1:
            self._ids = [torch.cat(self._ids)]
        return self._ids[0]

    # -- packed rows that are gone -------------------------------------------------------------------------

    def drop(self, rows: Tensor, total: int) -> None:
        """Mark packed rows (H,) as gone, of `total`; each must be distinct and not marked yet."""
        if rows.shape[0]:
            gone = torch.zeros(total, dtype=torch.bool, device=rows.device) if self.gone is None else self.gone
            self.gone = gone.index_fill(0, rows, True)
            self.gone_rows += rows.shape[0]
            self._left = None

    def left(self, lists: InvertedLists) -> InvertedLists:
        """The packed lists with nothing to be found where a row is gone. Their sizes count such rows still."""
        if self.gone is None:
            return lists
        if self._left is None or self._left[0] is not lists:
            self._left = lists, only(lists, ~self.gone)
        return self._left[1]


def few(waiting: int, packed: int) -> bool:
    """Whether reading `waiting` rows apart is cheaper than packing them.

    A read sorts T waiting rows; packing copies all N once every T reads. The sum is least at T = sqrt(N).
    """
    return waiting <= max(_FEW, math.isqrt(packed))
