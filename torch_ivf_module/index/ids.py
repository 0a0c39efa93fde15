"""Which packed rows have an id, and which of several was added last.

N packed rows, L lists, n wanted ids, H hits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.cells import NO_GROUP, filled_groups
from ..functional.id_lookup import IdOrder, last_of, order_of, rows_with
from .integrity import Sources, sources_of, unchanged
from .lazy import Latest
from .schema import GROUPS


class Matches(NamedTuple):
    """The rows that have one of some wanted ids, and the position of that id among the wanted ids."""

    packed: Tensor  # (H,) packed rows
    of_packed: Tensor  # (H,) positions of their ids
    pending: Tensor  # (H,) pending rows
    of_pending: Tensor  # (H,) positions of their ids

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.packed.shape[0] + self.pending.shape[0]


class IdLookup:
    """Finds packed rows by id. `buffers` are all buffers of the index, by name.

    `last_places` has, for each id that several rows have, the list and the group of the row added last: the rows of one
    list that have one group are in the order in which they were added, but others are not. It is not saved, so in an
    index that was loaded the last packed row is taken.
    """

    def __init__(self) -> None:
        self.last_places: dict[int, tuple[int, int]] = {}
        self._order: tuple[Sources, IdOrder] | None = None
        self._searched: Latest[Tensor, IdOrder] = Latest()

    @property
    def bytes(self) -> int:
        """Memory of the sorted orders of the ids, if there are any."""
        orders = (None if self._order is None else self._order[1], self._searched.value)
        return sum(order.rows.nbytes for order in orders if order is not None)

    def forget_order(self) -> None:
        """Discard the sorted orders, before the packed ids are replaced."""
        self._order, self._searched = None, Latest()

    def rows(self, buffers: Mapping[str, Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The packed rows (H,) with one of the distinct ids `wanted` (n,), and the position of its id in `wanted` (H,).

        The first call sorts the ids; the order is kept, 8 bytes per row.
        """
        return rows_with(buffers["list_ids"], self.order(buffers), wanted)

    def order(self, buffers: Mapping[str, Tensor]) -> IdOrder:
        """What sorts ``buffers["list_ids"]`` (N,)."""
        if self._order is None or not unchanged(self._order[0], buffers):
            self._order = sources_of(buffers, ["list_ids"]), order_of(buffers["list_ids"])
        return self._order[1]

    def order_for_search(self, ids: Tensor) -> IdOrder:
        """What sorts the ids (N,) of a version of the packed lists, without the lock that changes hold."""
        return self._searched.get(ids, order_of)

    def last(self, buffers: Mapping[str, Tensor], wanted: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        """For each wanted id (n,) the row added last among `rows` (H,), -1 if it has none.

        `which` (H,) is the position in `wanted` of the id of each row.
        """
        last = last_of(rows, which, wanted.shape[0])
        if not self.last_places:
            return last
        noted = [self.last_places.get(id, (-1, NO_GROUP)) for id in wanted.tolist()]
        noted_of = torch.tensor(noted, dtype=torch.int64, device="cpu").view(-1, 2).to(wanted.device)[which]
        lists, groups = noted_of.unbind(1)
        there = torch.searchsorted(buffers["list_offsets"], rows, right=True) - 1 == lists
        if GROUPS in buffers:
            there &= buffers[GROUPS][rows] == groups
        last_there = last_of(rows[there], which[there], wanted.shape[0])
        return torch.where(last_there < 0, last, last_there)

    def latest(
        self, buffers: Mapping[str, Tensor], wanted: Tensor, found: Matches, packed: Tensor, pending: Tensor | None
    ) -> Tensor:
        """Of each wanted id (n,) the entry of the row added last: of `packed` (N, ...), or of the pending rows.

        `found` are the rows of the ids; `pending` (T, ...) are the entries of the pending rows, -1 without them.
        KeyError for an id without a row.
        """
        rows = self.last(buffers, wanted, found.packed, found.of_packed)
        at = last_of(found.pending, found.of_pending, wanted.shape[0])
        unknown = wanted[(rows < 0) & (at < 0)]
        if unknown.shape[0]:
            raise KeyError(f"id {int(unknown[0])} is not in the index")
        out = packed.new_empty(wanted.shape[0], *packed.shape[1:])
        out[at < 0] = packed[rows[at < 0]]  # pending rows were added later than packed ones
        out[at >= 0] = -1 if pending is None else pending[at[at >= 0]]
        return out

    def note(self, packed_ids: Tensor, ids: Tensor, assigned: Tensor, groups: Tensor | None) -> None:
        """Before rows with ids (n,) and groups (n,) are added to the lists `assigned` (n,): update `last_places` for
        repeated ids."""
        values, counts = torch.unique(torch.cat([packed_ids, ids]), return_counts=True)
        repeated = torch.isin(ids, values[counts > 1])
        kept = None if groups is None else groups[repeated]
        self.last_places = {**self.last_places, **places(ids[repeated], assigned[repeated], kept)}


def places(ids: Tensor, assigned: Tensor, groups: Tensor | None) -> dict[int, tuple[int, int]]:
    """The list and the group of each id (n,), of a repeated one those of the last row; lists and groups (n,)."""
    pairs = zip(assigned.tolist(), filled_groups(groups, ids).tolist(), strict=True)
    return dict(zip(ids.tolist(), pairs, strict=True))
