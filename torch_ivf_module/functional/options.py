"""The options of a search as one value, and what a scan of one segment reads as another.

Q queries, L lists, P probes, d dim, k results.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .budget import Budget
from .lists import InvertedLists, most_rows


class SearchOptions(NamedTuple):
    """Every option of a search; no tensors."""

    k: int
    nprobe: int
    metric: str
    mode: str = "auto"  # one of strategies.MODES
    max_codes: int | None = None
    budget: Budget | None = None
    max_bytes: int = 256 << 20  # workspace
    exact: bool = False  # score every row of the probed lists exactly, not only the candidates of a scan


class Probes(NamedTuple):
    """The queries of a scan, and the rows that each of them reads."""

    x: Tensor  # (Q, d) finite queries as `metric.prepare` gives them
    lists: Tensor  # (Q, P) probed lists, nearest first, L for none
    limits: Tensor | None  # (Q, P) rows to read of each list, None for all

    def at(self, queries: Tensor) -> Probes:
        """The probes of the queries with these positions (q,)."""
        return Probes(self.x[queries], self.lists[queries], None if self.limits is None else self.limits[queries])

    def sizes(self, lists: InvertedLists) -> Tensor:
        """Rows that each query reads of each of its lists, (Q, P)."""
        return lists.sizes[self.lists] if self.limits is None else self.limits

    def width(self, lists: InvertedLists) -> int:
        """The most rows that a query reads; on an accelerator no fewer, since reading it back would wait for it."""
        if self.x.is_cpu:
            return min(int(self.sizes(lists).sum(1).max()), lists.packed.shape[0])
        return most_rows(lists, self.lists.shape[1])
