"""Splitting the longest lists of an inverted file and dissolving the shortest: methods of `IndexIVF`.

N packed rows, T pending rows, L lists, R rows that are read, d dim. A position is a row: packed ones are 0 to N - 1,
pending ones N to N + T - 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..functional.id_lookup import last_of
from ..functional.kmeans import kmeans, sampled
from ..functional.lists import is_selected, lengths, lists_of
from ..functional.probe import coarse_of, nearest_lists
from ..functional.rebalance import Splits, find_splits, imbalance_of, neighbours, numbered, outdated
from ..functional.row_codes import as_float
from ..params import positive
from .eager import eager, opaque, without_autocast
from .pending import many_deleted
from .store import ListStore

if TYPE_CHECKING:
    from .ivf import IndexIVF

P = ParamSpec("P")
R = TypeVar("R")

_NITER = 2  # iterations of k-means over the split lists and their neighbours
_CHECKS = 64  # `auto_rebalance` looks at the lists after changes of this part of the rows
_READ = 8  # rows that `auto_rebalance` reads at most for each row that was changed
_LEAST_READ = 1 << 12  # or so many, in small indexes


class Rebalanced(NamedTuple):
    """The result of `IndexIVF.rebalance`."""

    split: int  # lists that were split
    merged: int  # lists whose rows were moved to others, and whose numbers the new parts got
    moved: int  # vectors that are in another list than before
    read: int  # vectors that were read
    total: int  # vectors in the index
    too_long: int  # lists that were not split since they have more than `max_rows` vectors
    imbalance_before: float  # see IndexIVF.imbalance_factor
    imbalance: float


# -- methods -----------------------------------------------------------------------------------------------


@eager
def rebalance(self: IndexIVF, *, max_rows: int = 1 << 16, seed: int = 1234) -> Rebalanced:
    """Split the longest lists, dissolve the shortest, and move rows between these and their neighbours only.

    For an index whose vectors have changed since training, where `retrain` would take too long. A call reads at most
    `max_rows` vectors, and those that share an id with one that moves. The number of lists stays: the parts of a list
    get the numbers of dissolved ones. A list of more than `max_rows` vectors is not split, and counted as `too_long`.
    As long as calls move vectors, another one may do more.

    Moved vectors are pending as added ones are, and packed when they are many; see docs/drift.md. `list_ordering` is
    "none" afterwards. Searches that probe all lists return what they did before. Raises RuntimeError before training;
    ValueError for max_rows < 1.

    A list is split by k-means into as many parts as it is longer than the mean. Then the centroids of the parts, of
    their neighbours, and of the lists that have grown or shrunk most since theirs were computed, are fitted together,
    and their rows are assigned again. That is SPFresh's LIRE (Xu et al., SOSP 2023, arXiv 2410.14452) with the local
    k-means of Ada-IVF (Mohoney et al., arXiv 2411.00970), which also counts the changes of each list, and of Quake
    (Mohoney et al., arXiv 2506.03437), which also weighs what a split saves against what a merge costs.

    >>> from torch_ivf_module import IndexIVFFlat
    >>> x = torch.randn(800, 8, generator=torch.Generator().manual_seed(0))
    >>> index = IndexIVFFlat(8, nlist=16).train(x)
    >>> index.add(x * 0.2 + 2)
    >>> report = index.rebalance()
    >>> report.split > 0, report.imbalance < report.imbalance_before, index.nlist
    (True, True, 16)
    """
    self.store.require_trained("rebalance")
    return _rebalance(self, positive(max_rows, "max_rows"), seed)


def _get(self: IndexIVF) -> float | None:
    """The `imbalance_factor` above which changes call `rebalance`: None for never, 1 for whatever it is.

    The lists are looked at after 64th parts of the rows were added, updated or removed. Such a call then reads at most
    8 vectors for each vector changed since (4,096 in a small index), so that it takes a bounded part of the time.
    """
    return self._auto_rebalance


def _set(self: IndexIVF, value: float | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 1):
        raise ValueError(f"auto_rebalance must be None or an imbalance factor from 1 on, as 1.5, got {value!r}")
    self._auto_rebalance = None if value is None else float(value)


auto_rebalance = property(_get, _set)


def balanced(method: Callable[Concatenate[IndexIVF, P], R]) -> Callable[Concatenate[IndexIVF, P], R]:
    """`method`, which adds, replaces or removes rows, followed by what `auto_rebalance` asks for."""

    @functools.wraps(method)
    def changing(self: IndexIVF, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._auto_rebalance is None:
            return method(self, *args, **kwargs)
        store = self.store
        rows, added = store.ntotal, store.unordered
        result = method(self, *args, **kwargs)
        _after_changes(self, max(abs(store.ntotal - rows), store.unordered - added))
        return result

    return opaque(changing)


def _after_changes(index: IndexIVF, rows: int) -> None:
    """After `rows` rows were added, replaced or removed: rebalance if enough were since the last time."""
    store = index.store
    with store.lock:
        index._rows_changed += rows
        if index._auto_rebalance is None or _CHECKS * index._rows_changed < max(store.ntotal, store.nlist):
            return
        most, index._rows_changed = max(_READ * index._rows_changed, _LEAST_READ), 0
        sizes = Contents(store).sizes()
        if imbalance_of(sizes) > index._auto_rebalance:
            rebalance(index, max_rows=max(most, 2 * int(sizes.max())))


# -- functions ---------------------------------------------------------------------------------------------


class Contents:
    """All rows of a store by position. The caller holds its lock."""

    def __init__(self, store: ListStore) -> None:
        store.check()
        self.format, self.d, self.nlist = store.format, store.d, store.nlist
        self.packed, self.offsets, self.ids = store.packed, store.buffers["list_offsets"], store.buffers["list_ids"]
        self.n, self.updates = self.ids.shape[0], store._updates
        empty = self.ids[:0]
        joined = self.updates.joined() if self.updates.rows else (self.packed[:0], empty, empty)
        self.pending, self.pending_ids, self.pending_lists = joined
        self.deleted = None if self.updates.deleted is None else self.updates.deleted.mask

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


def _rebalance(index: IndexIVF, max_rows: int, seed: int) -> Rebalanced:
    store = index.store
    with store.lock, torch.no_grad(), without_autocast(store.device):
        contents = Contents(store)
        sizes, generator = contents.sizes(), torch.Generator(device="cpu").manual_seed(seed)
        total, before, lengths_now = int(sizes.sum()), imbalance_of(sizes), sizes.tolist()
        sample = functools.partial(contents.sample, generator=generator)
        splits = find_splits(lengths_now, sample, store.metric, max_rows, generator)
        coarse = store.coarse()
        numbers = [number for number, _ in numbered(splits.splits)]
        numbers += neighbours(splits, lengths_now, coarse, store.metric, max_rows // 2)
        left = max_rows - splits.wasted - sum(lengths_now[number] for number in numbers)
        fitted = _fitted_sizes(index, sizes)
        numbers += outdated(sizes, fitted, numbers, left)
        if not numbers:
            return Rebalanced(0, 0, 0, splits.wasted, total, splits.too_long, before, before)
        at, old = contents.of_lists(numbers)
        rows = contents.rows(at)
        centroids = _fitted(as_float(rows, store.d), numbers, splits, coarse.centroids, store.metric, generator)
        new = nearest_lists(rows, coarse_of(centroids, store.metric), store.metric)
        after = sizes + torch.bincount(new, minlength=store.nlist) - torch.bincount(old, minlength=store.nlist)
        read, moved = splits.wasted + at.shape[0], torch.nonzero(new != old)[:, 0]
        read += _move(store, contents, at[moved], new[moved], centroids)
        fitted[numbers] = after[numbers]
        index._fitted = centroids, fitted
        merged = sum(len(split.short) for split in splits.splits)
        counts = len(splits.splits), merged, moved.shape[0], read, total, splits.too_long
        return Rebalanced(*counts, before, imbalance_of(after))


def _fitted_sizes(index: IndexIVF, sizes: Tensor) -> Tensor:
    """The length that each list had when its centroid was computed (L,); 0, so that all are out of date, if the
    centroids are not those of the last call."""
    known = index._fitted
    if known is None or known[0] is not index.store.buffers["centroids"]:
        return torch.zeros_like(sizes)
    return known[1].clone()


def _fitted(
    x: Tensor, numbers: Sequence[int], splits: Splits, centroids: Tensor, metric: str, generator: torch.Generator
) -> Tensor:
    """The centroids (L, d) after k-means of the lists `numbers` on their rows x (R, d), with lists split."""
    centroids = centroids.clone()
    for number, centroid in numbered(splits.splits):
        centroids[number] = centroid
    if x.shape[0] < len(numbers):
        return centroids
    at = torch.tensor(numbers, device="cpu").to(x.device)
    start = centroids[at]
    centroids[at] = kmeans(x, len(numbers), niter=_NITER, metric=metric, generator=generator, start=start)[0]
    return centroids


def _move(store: ListStore, contents: Contents, at: Tensor, lists: Tensor, centroids: Tensor) -> int:
    """Replace the centroids, and move the rows at positions (R,) to `lists` (R,). The number of other rows read.

    These are rows with the ids of rows that move: all rows of such an id become pending, the one added last at the end,
    so that it stays the last one.
    """
    wanted = contents.ids_at(at).unique()
    every = contents.with_ids(wanted)
    targets, repeated = contents.lists(every), every.shape[0] > wanted.shape[0]
    by_position = at.argsort()
    targets[torch.searchsorted(every, at[by_position])] = lists[by_position]
    if repeated:
        order = _last_at_the_end(store, contents, every, wanted)
    else:
        order = torch.arange(every.shape[0], device=every.device)
    rows, ids = contents.rows(every)[order], contents.ids_at(every)[order]
    updates = store._updates.copied()
    updates.remove(every[every >= contents.n] - contents.n)
    updates.delete(every[every < contents.n], contents.n)
    updates.push(rows, ids, targets[order], custom_ids=repeated)
    store.put(centroids=centroids)
    store._updates, store.ordering = updates, "none"
    store.unordered += rows.shape[0]
    store.new_version()
    if many_deleted(updates.deleted_rows, contents.n) or updates.rows >= max(contents.n, 1):
        store.pack()
    return every.shape[0] - at.shape[0]


def _last_at_the_end(store: ListStore, contents: Contents, at: Tensor, wanted: Tensor) -> Tensor:
    """The order of rows at ascending positions (R,) in which the last added of each id `wanted` (n,) are at the end."""
    which = torch.searchsorted(wanted, contents.ids_at(at))
    packed = at < contents.n
    last = store.ids.last(contents.offsets, wanted, at[packed], which[packed])
    pending = last_of(at[~packed], which[~packed], wanted.shape[0])
    last = torch.where(pending < 0, last, pending)  # pending rows were added later than packed ones
    is_last = at == last[which]
    return torch.cat([torch.nonzero(~is_last)[:, 0], torch.nonzero(is_last)[:, 0]])
