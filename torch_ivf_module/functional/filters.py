"""Which ids each query may find: a mask over ids, lists of ids that may be found, and lists of ids that may not.

Q queries, F filters, which queries may share, n ids, T ids of all lists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .lists import lengths, narrow, offsets_of


class IdLists(NamedTuple):
    """Lists of ids, each ascending: list f is ``ids[first[f] : last[f]]``."""

    first: Tensor  # (F,) int64
    last: Tensor  # (F,) int64
    ids: Tensor  # (T,) int64

    def contain(self, numbers: Tensor, ids: Tensor) -> Tensor:
        """Whether the list of each number has the id, bool; `numbers` and `ids` can be broadcast together."""
        end = self.last[numbers]
        low, high = self.first[numbers].expand_as(ids), end.expand_as(ids)
        if not self.ids.shape[0]:
            return torch.zeros_like(ids, dtype=torch.bool)
        beyond = self.ids.shape[0] - 1
        for _ in range(int((self.last - self.first).max()).bit_length()):  # halve what is left of each list
            middle = (low + high) >> 1
            smaller = (low < high) & (self.ids[middle.clamp(max=beyond)] < ids)
            low, high = torch.where(smaller, middle + 1, low), torch.where(smaller, high, middle)
        return (low < end) & (self.ids[low.clamp(max=beyond)] == ids)


class Filter(NamedTuple):
    """What each query may find. Query q has filter ``numbers[q]`` of each of the other fields that is not None."""

    numbers: Tensor  # (Q,) int64
    mask: Tensor | None = None  # (F, n) bool: entry i is for id i, other ids may not be found
    allowed: IdLists | None = None  # F lists, without duplicates: other ids may not be found
    excluded: IdLists | None = None  # F lists: these ids may not be found

    def at(self, queries: Tensor | slice) -> Filter:
        """The filter of the queries with these positions (q,)."""
        return self._replace(numbers=self.numbers[queries])

    def repeated(self, queries: int) -> Filter:
        """The filter of so many queries, a multiple of Q: those of all queries again and again."""
        return self._replace(numbers=self.numbers.repeat(queries // max(1, self.numbers.shape[0])))

    def passes(self, ids: Tensor) -> Tensor:
        """Whether query q may find ``ids[q]``, bool (Q, ...), for ids (Q, ...)."""
        numbers = self.numbers.view(-1, *[1] * (ids.dim() - 1))
        passing = torch.ones_like(ids, dtype=torch.bool)
        if self.mask is not None:
            passing = masked_ids(self.mask, numbers, ids)
        if self.allowed is not None:
            passing &= self.allowed.contain(numbers, ids)
        if self.excluded is not None:
            passing &= ~self.excluded.contain(numbers, ids)
        return passing

    def passing_rows(self, ids: Tensor, rows: Tensor) -> Tensor:
        """Rows (Q, K) with -1 for those that the query may not find; ids (N,) of all rows."""
        passing = self.passes(ids[rows.clamp(min=0)]) if ids.shape[0] else rows >= 0
        return rows.masked_fill(~passing, -1)


def masked_ids(mask: Tensor, numbers: Tensor, ids: Tensor) -> Tensor:
    """Whether row `numbers` of the mask (F, n) has the id; ids at or beyond n, and negative ones, it has not."""
    if not mask.shape[1]:
        return torch.zeros_like(ids, dtype=torch.bool)
    inside = (ids >= 0) & (ids < mask.shape[1])
    return mask[numbers, ids.clamp(0, mask.shape[1] - 1)] & inside


def rows_in_mask(mask: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    """Whether query q may find ``rows[q]`` by its mask (Q, n) over ids, bool (Q, ...); ids (N,) of all rows.

    Of static shapes, for graphs; what it says of negative rows has no meaning.
    """
    at = ids[rows.clamp(min=0)].clamp(-1, mask.shape[1]) + 1
    padded = torch.nn.functional.pad(mask, (1, 1))  # for negative ids, and for ids beyond the end of the mask
    return padded.gather(1, at.flatten(1)).view(at.shape)


def id_lists(ids: Tensor, offsets: Tensor) -> IdLists:
    """Lists without duplicates, of ids (T,) in any order: list f is ``ids[offsets[f] : offsets[f + 1]]``.

    Ids that ascend in each list are not copied. Synchronizes with the device.

    >>> id_lists(torch.tensor([7, 5, 3, 5]), torch.tensor([0, 1, 4]))
    IdLists(first=tensor([0, 1]), last=tensor([1, 3]), ids=tensor([7, 3, 5]))
    """
    falls = torch.nn.functional.pad(ids[1:] <= ids[:-1], (1, 0))
    falls = falls.index_fill_(0, offsets[:-1][offsets[:-1] < ids.shape[0]], False)
    if bool(falls.any()):
        numbers = torch.arange(offsets.shape[0] - 1, device=ids.device).repeat_interleave(lengths(offsets))
        order = torch.argsort(ids, stable=True)
        order = order[torch.sort(narrow(numbers[order], offsets.shape[0]), stable=True).indices]
        numbers, ids = numbers[order], ids[order]
        new = torch.nn.functional.pad((numbers[1:] != numbers[:-1]) | (ids[1:] != ids[:-1]), (1, 0), value=True)
        kept = torch.nonzero(new)[:, 0]
        ids, offsets = ids[kept], offsets_of(numbers[kept], offsets.shape[0] - 1)
    return IdLists(offsets[:-1], offsets[1:], ids)


def rows_as_lists(ids: Tensor) -> IdLists:
    """One list of each row of ids (F, m), for `contain` alone: they may have duplicates."""
    ends = torch.arange(ids.shape[0] + 1, device=ids.device) * ids.shape[1]
    return IdLists(ends[:-1], ends[1:], ids.sort(1).values.flatten())

