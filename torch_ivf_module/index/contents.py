"""All rows of a store by position, packed and pending ones, for code that moves some of them.

N packed rows, T pending rows, L lists, R rows that are read, d dim. Positions 0 to N - 1 are those of packed rows,
N to N + T - 1 those of pending ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional.cells import filled_groups
from ..functional.kmeans import sampled
from ..functional.lists import is_selected, lengths, lists_of
from ..functional.row_codes import as_float
from .groups import groups_in
from .store import ListStore


class Contents:
    """All rows of a store by position. The caller holds its lock."""

    def __init__(self, store: ListStore) -> None:
        store.check()
        self.packed, self.offsets, self.ids = store.packed, store.buffers["list_offsets"], store.buffers["list_ids"]
        self.d, self.nlist, self.n, updates = store.d, store.nlist, self.ids.shape[0], store._updates
        joined = updates.joined() if updates.rows else (self.packed[:0], self.ids[:0], self.ids[:0], None)
        self.pending, self.pending_ids, self.pending_lists, groups = joined
        self.groups = (groups_in(store.buffers), filled_groups(groups, self.pending_ids)) if store.grouped else None
        self.deleted = None if updates.deleted is None else updates.deleted.mask

    def sizes(self) -> Tensor:
        """The length of each list (L,), without deleted rows."""
        sizes = lengths(self.offsets) + torch.bincount(self.pending_lists, minlength=self.nlist)
        if self.deleted is None:
            return sizes
        gone = lists_of(self.offsets, torch.nonzero(self.deleted)[:, 0], self.n)
        return sizes - torch.bincount(gone, minlength=self.nlist)

    def of_lists(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The positions (R,) of the rows of some lists, and their lists (R,)."""
        lists = torch.tensor(numbers, dtype=torch.int64, device="cpu").to(self.ids.device)
        counts = lengths(self.offsets)[lists]
        shifts = self.offsets[lists] - (counts.cumsum(0) - counts)
        at = shifts.repeat_interleave(counts)
        at += torch.arange(at.shape[0], device=at.device)
        found = self._stored(torch.cat([at, self.n + torch.nonzero(is_selected(self.pending_lists, lists))[:, 0]]))
        return found, self.lists(found)

    def with_ids(self, ids: Tensor) -> Tensor:
        """The positions of all rows with one of some ids, in ascending order."""
        found = [torch.nonzero(is_selected(own, ids))[:, 0] for own in (self.ids, self.pending_ids)]
        return self._stored(torch.cat([found[0], self.n + found[1]]))

    def _stored(self, at: Tensor) -> Tensor:
        """Those of some positions that are not of deleted rows."""
        if self.deleted is None:
            return at
        return at[~torch.cat([self.deleted, self.deleted.new_zeros(self.pending_ids.shape)])[at]]

    def rows(self, at: Tensor) -> Tensor:
        """The rows (R, ...) at positions (R,) of which the packed ones are first."""
        return self._both(self.packed, self.pending, at)

    def ids_at(self, at: Tensor) -> Tensor:
        """Their ids (R,)."""
        return self._both(self.ids, self.pending_ids, at)

    def groups_at(self, at: Tensor) -> Tensor | None:
        """Their groups (R,), None if no row has one."""
        return None if self.groups is None else self._both(*self.groups, at)

    def lists(self, at: Tensor) -> Tensor:
        """Their lists (R,)."""
        packed, pending = at[at < self.n], at[at >= self.n] - self.n
        return torch.cat([lists_of(self.offsets, packed, self.n), self.pending_lists[pending]])

    def _both(self, packed: Tensor, pending: Tensor, at: Tensor) -> Tensor:
        return torch.cat([packed[at[at < self.n]], pending[at[at >= self.n] - self.n]])

    def sample(self, number: int, count: int, generator: torch.Generator) -> Tensor:
        """At most `count` rows of a list as vectors (S, d) float32."""
        at = self.of_lists([number])[0]
        return as_float(self.rows(at[sampled(at.shape[0], count, generator).to(at.device)]), self.d)
