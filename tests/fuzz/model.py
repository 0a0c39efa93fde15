"""The expected contents of an index after a sequence of calls, and which rows a query must and may find.

N rows, Q queries, L lists, d dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tests.oracle import LARGEST, Reach, StoredRows, comparable, decoded, scores_of, unit
from torch_ivf_module.functional import metric as metrics
from torch_ivf_module.functional.row_codes import encode

LAST_ID = 2**63 - 1
ROUNDING = 3e-6  # lists count as equally near if their scores differ by this part of the distance (l2) or of |x| |c|
SAFE = LARGEST / 4  # squared norms and products of norms beyond it may overflow on the way to a score


class Model:
    """Rows in the order of adding, each with its id and the vector by which its list was chosen."""

    def __init__(self, d: int, metric: str, dtype: torch.dtype, bits: int | None = None) -> None:
        self.d, self.metric, self.dtype = d, metric, dtype
        self.bits = bits  # of codes, None for rows of floats
        self.centroids: Tensor | None = None  # (L, d) float32, None for a flat index
        self.ids = torch.empty(0, dtype=torch.int64)
        self.stored = torch.empty(0, d, dtype=dtype)
        self.placed = torch.empty(0, d, dtype=torch.float64)
        self.lists = torch.empty(0, dtype=torch.int64)  # where that is not the nearest list, the list; else -1
        self.groups = torch.empty(0, dtype=torch.int64)  # -1 without one
        self.next_id = 0
        self.unordered: set[int] = set()  # ids of which any row may be the last one

    @property
    def n(self) -> int:
        return len(self.ids)

    @property
    def trainable(self) -> bool:
        """Whether there are enough rows for the lists, and no row is so long that means of them may overflow."""
        if self.centroids is None or self.n < len(self.centroids):
            return False
        return bool((self.stored.double().square().sum(1) < SAFE).all())

    # -- changes -------------------------------------------------------------------------------------------

    def add(self, x: Tensor, ids: Tensor, groups: Tensor | None = None) -> None:
        """Add rows x (n, d) in the storage dtype, or encoded and decoded; at unit length for cosine."""
        prepared = metrics.prepare(x, self.metric)
        if self.metric == "cosine":
            assert ((prepared.double() - unit(x)).abs() < 1e-6).all()
        placed = prepared.to(self.dtype)
        stored = placed if self.bits is None else decoded(encode(prepared, self.bits), self.d).float()
        self.stored = torch.cat([self.stored, stored])
        self.placed = torch.cat([self.placed, placed.double()])
        self.ids = torch.cat([self.ids, ids])
        self.lists = torch.cat([self.lists, torch.full_like(ids, -1)])
        self.groups = torch.cat([self.groups, torch.full_like(ids, -1) if groups is None else groups])
        self.unordered -= set(ids.tolist())

    def keep(self, kept: Tensor) -> int:
        """Keep the rows where `kept` (N,) is true; return how many were removed."""
        for name in ("ids", "stored", "placed", "lists", "groups"):
            setattr(self, name, getattr(self, name)[kept])
        return int((~kept).sum())

    def number_after(self, ids: Tensor) -> int:
        """next_id after rows with `ids` were added."""
        return max(self.next_id, min(int(ids.max()), LAST_ID - 1) + 1) if len(ids) else self.next_id

    def convert(self, dtype: torch.dtype) -> None:
        self.stored, self.dtype = self.stored.to(dtype), dtype

    def place_again(self) -> None:
        """Assign every row to its nearest list."""
        self.placed, self.lists = self.stored.double(), torch.full_like(self.ids, -1)

    def forget_order(self) -> None:
        """A file does not store which row of a duplicate id was added last if they are in different lists."""
        if self.centroids is not None:
            ids, counts = self.ids.unique(return_counts=True)
            self.unordered = set(ids[counts > 1].tolist())

    def forget_groups(self) -> None:
        """faiss has none; the rows of a list remain in the order of their groups."""
        several = [id for id in self.ids.unique().tolist() if len(self.groups[self.ids == id].unique()) > 1]
        self.unordered |= set(several)
        self.groups = torch.full_like(self.groups, -1)

    # -- searches ------------------------------------------------------------------------------------------

    @property
    def rows(self) -> StoredRows:
        return StoredRows(self.ids, self.stored.double(), torch.zeros_like(self.ids))

    def rows_of(self, id: int) -> Tensor:
        """The vectors that `reconstruct` may return for an id: the last one, or all if that is unknown."""
        rows = self.stored[self.ids == id]
        return rows if id in self.unordered else rows[-1:]

    def reach(
        self, queries: Tensor, nprobe: int, max_codes: int | None = None, selected: Tensor | None = None
    ) -> Reach:
        """Rows (Q, N) that queries must read and may read; `selected` (Q, N) says which may be found at all."""
        queries = comparable(queries, self.metric)
        required = allowed = torch.ones(len(queries), self.n, dtype=torch.bool)
        if self.centroids is not None:
            lists = self.in_lists()
            must, may = nearest_lists(queries, self.centroids, nprobe, self.metric)
            if max_codes is not None:
                must, may = self._capped(queries, nprobe, max_codes, lists, may)
            allowed = may.float() @ lists.float().T > 0
            required = ~((~must).float() @ lists.float().T > 0)
        if selected is not None:
            required, allowed = required & selected, allowed & selected
        stored = self.stored.double()
        x_norm, norm = queries.norm(dim=1)[:, None], stored.norm(dim=1)
        if self.metric == "l2":
            sure = (scores_of(queries, stored, "l2").abs() < 0.99 * LARGEST) & (x_norm**2 < SAFE) & (norm**2 < SAFE)
        else:
            sure = x_norm * norm < SAFE
        return Reach(required & sure, allowed)

    def in_lists(self) -> Tensor:
        """The lists that a row may be in, bool (N, L): one, unless two are equally near."""
        assert self.centroids is not None
        nearest = nearest_lists(self.placed, self.centroids, 1, self.metric).allowed
        known = torch.arange(len(self.centroids)) == self.lists[:, None]
        return torch.where(self.lists[:, None] < 0, nearest, known)

    def _capped(self, queries: Tensor, nprobe: int, max_codes: int, lists: Tensor, may: Tensor) -> ListReach:
        """The nearest lists that have at most `max_codes` rows together, and always the nearest one.

        Only for queries for which the sizes of the lists and the order of the nearest are not tied.
        """
        assert self.centroids is not None
        nlist = len(self.centroids)
        unjudged = ListReach(torch.zeros_like(may), may)
        if (lists.sum(1) != 1).any():
            return unjudged
        # The rank of each list, from the searches for the 1, 2, ... nearest lists.
        orders = [nearest_lists(queries, self.centroids, width, self.metric) for width in range(1, nlist + 1)]
        clear = torch.stack([must.eq(may).all(1) for must, may in orders]).all(0)
        rank = torch.stack([~must for must, _ in orders]).sum(0)  # (Q, L), from 0
        sizes = lists.sum(0).expand_as(rank)
        order = rank.argsort(dim=1)[:, :nprobe]
        kept = sizes.gather(1, order).cumsum(1) <= max_codes
        kept[:, :1] = True
        read = torch.zeros_like(may).scatter_(1, order, kept)
        return ListReach(read & clear[:, None], read | (may & ~clear[:, None]))


class ListReach(NamedTuple):
    """Lists that a query must probe and lists that it may probe, bool (Q, L)."""

    required: Tensor
    allowed: Tensor


def nearest_lists(queries: Tensor, centroids: Tensor, width: int, metric: str) -> ListReach:
    """The `width` nearest lists of comparable queries (Q, d). All lists that are tied for the last rank are allowed."""
    centroids = centroids.double()
    everything = torch.ones(len(queries), len(centroids), dtype=torch.bool)
    if width >= len(centroids):
        return ListReach(everything, everything)
    scores = scores_of(queries, centroids, metric)
    if metric == "l2":
        margin = ROUNDING * (scores.abs() + torch.finfo(torch.float32).tiny)
    else:
        margin = ROUNDING * (queries.norm(dim=1)[:, None] * centroids.norm(dim=1) + torch.finfo(torch.float32).tiny)
    low, high = scores - margin, scores + margin
    # (Q, L, L): whether list j may be, or must be, nearer than list i
    may_precede = (high[:, None, :] >= low[:, :, None]).sum(2) - 1  # itself left out
    must_precede = (low[:, None, :] > high[:, :, None]).sum(2)
    unclear = ~(scores.abs() < SAFE).all(1, keepdim=True)
    return ListReach((may_precede < width) & ~unclear, (must_precede < width) | unclear)
