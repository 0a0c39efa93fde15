"""Which packed rows carry an id, and which of several was added last.

N packed rows, L lists, n wanted ids, H hits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.id_lookup import last_of, rows_with
from .integrity import Sources, sources_of, unchanged


class Matches(NamedTuple):
    """The rows that carry one of some wanted ids, each with the place of that id among the wanted ones."""

    packed: Tensor  # (H,) rows
    of_packed: Tensor  # (H,) places
    pending: Tensor
    of_pending: Tensor

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.packed.shape[0] + self.pending.shape[0]


class IdLookup:
    """Finds packed rows by id. `buffers` are always all of those of the index, by name.

    `last_lists` has, for each id that several rows carry, the list of the last added one: rows of one list are in the
    order in which they were added, but those of different lists are not. A file does not keep it, so in an index that
    was loaded the last packed row counts.
    """

    def __init__(self, last_lists: dict[int, int] | None = None) -> None:
        self.last_lists = {} if last_lists is None else last_lists
        self._order: tuple[Sources, Tensor] | None = None

    @property
    def bytes(self) -> int:
        """Memory of the order of the ids, once it is made."""
        return 0 if self._order is None else self._order[1].nbytes

    def forget_order(self) -> None:
        """The packed ids are about to be replaced."""
        self._order = None

    def rows(self, buffers: Mapping[str, Tensor], wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The packed rows (H,) that carry one of the distinct ids `wanted` (n,), and the place in `wanted` of each.

        The first call sorts the ids, which takes 8 bytes a row from then on.
        """
        if self._order is None or not unchanged(self._order[0], buffers):
            order = torch.argsort(buffers["list_ids"], stable=True)
            self._order = sources_of(buffers, ["list_ids"]), order
        return rows_with(buffers["list_ids"], self._order[1], wanted)

    def last(self, offsets: Tensor, wanted: Tensor, rows: Tensor, which: Tensor) -> Tensor:
        """The row (n,) that was added last among `rows` (H,), which carry wanted ids at places `which` (H,); -1 for an
        id without rows. The lists have offsets (L + 1,)."""
        last = last_of(rows, which, wanted.shape[0])
        if not self.last_lists:
            return last
        noted = torch.tensor([self.last_lists.get(id, -1) for id in wanted.tolist()], device="cpu").to(wanted.device)
        number = torch.searchsorted(offsets, rows, right=True) - 1
        there = number == noted[which]
        in_list = last_of(rows[there], which[there], wanted.shape[0])
        return torch.where(in_list < 0, last, in_list)

    def note(self, packed_ids: Tensor, ids: Tensor, assigned: Tensor) -> None:
        """Rows with ids (n,) are added to the lists `assigned` (n,): remember the lists of ids that are not unique."""
        values, counts = torch.unique(torch.cat([packed_ids, ids]), return_counts=True)
        repeated = torch.isin(ids, values[counts > 1])
        self.last_lists.update(zip(ids[repeated].tolist(), assigned[repeated].tolist(), strict=True))
