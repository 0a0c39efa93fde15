"""Splitting the longest lists of an inverted file and merging the shortest with others: methods of `IndexIVF`.

N packed rows, L lists, R rows that are read or moved, n ids, d dim. A position is that of a row in `Contents`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..functional.id_lookup import last_of
from ..functional.probe import coarse_of, nearest_lists
from ..functional.rebalance import fit, imbalance_of, plan
from ..functional.row_codes import as_float
from ..params import positive
from .contents import Contents
from .eager import eager, without_autocast
from .pending import many_deleted
from .store import ListStore
from .transactions import transaction

if TYPE_CHECKING:
    from .ivf import IndexIVF


class Rebalanced(NamedTuple):
    """The result of `IndexIVF.rebalance`."""

    split: int  # lists that were split
    merged: int  # lists that were merged with others, and whose numbers the new parts got
    moved: int  # vectors that are in another list than before
    read: int  # vectors that were read
    total: int  # vectors in the index
    too_long: int  # lists that were not split since they have more than `max_rows` vectors
    imbalance_before: float  # see IndexIVF.imbalance_factor
    imbalance: float


@eager
def rebalance(self: IndexIVF, *, max_rows: int = 1 << 16, seed: int = 1234) -> Rebalanced:
    """Split the longest lists, merge the shortest lists, and move rows between these lists and their neighbours.

    For an index whose vectors have changed since training, if `retrain` would take too long. A call reads at most
    `max_rows` vectors, and vectors that share an id with a moved one; it also reads all ids. The number of lists is
    constant: the parts of a split list get the numbers of merged lists. A list of more than `max_rows` vectors is not
    split, and is counted as `too_long`. While calls move vectors, another call may improve the lists further.

    Moved vectors are pending, like added ones, and are packed if there are many; see docs/drift.md. `list_ordering` is
    "none" afterwards. Searches of all lists return the same results as before. Raises RuntimeError before training,
    ValueError for max_rows < 1. The index is then unchanged.

    A list that is n times as long as the mean is split by k-means into n parts. Then the centroids of the parts, of
    merged lists, of their neighbours, and of the lists that have grown or shrunk most since their centroid was
    computed, are fitted together, and their rows are assigned again. This is LIRE of SPFresh (Xu et al., SOSP 2023,
    arXiv 2410.14452) with the local k-means of Ada-IVF (Mohoney et al., arXiv 2411.00970), which also counts the
    changes of each list, and of Quake (Mohoney et al., arXiv 2506.03437), which also compares the gain of a split with
    the cost of a merge.

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


def _rebalance(index: IndexIVF, max_rows: int, seed: int) -> Rebalanced:
    store = index.store
    with store.lock, torch.no_grad(), without_autocast(store.device):
        contents, generator = Contents(store), torch.Generator(device="cpu").manual_seed(seed)
        sizes, sample = contents.sizes(), functools.partial(contents.sample, generator=generator)
        fitted, coarse = _fitted_sizes(index, sizes), coarse_of(store.buffers["centroids"], store.metric)
        planned = plan(sizes, fitted, sample, coarse, store.metric, max_rows, generator)
        splits, numbers = planned.splits, planned.numbers
        moved, after, read = 0, sizes, splits.wasted
        if numbers:
            at, old = contents.of_lists(numbers)
            rows = contents.rows(at)
            centroids = fit(as_float(rows, store.d), planned, store.metric, generator)
            new = nearest_lists(rows, coarse_of(centroids, store.metric), store.metric)
            after = sizes + torch.bincount(new, minlength=store.nlist) - torch.bincount(old, minlength=store.nlist)
            changed = torch.nonzero(new != old)[:, 0]
            moved, read = changed.shape[0], read + at.shape[0]
            read += _move(store, contents, at[changed], new[changed], centroids)
            fitted = fitted.clone()
            fitted[numbers] = after[numbers]
            index._fitted = centroids, fitted
        merged = sum(len(split.short) for split in splits.splits)
        return Rebalanced(
            split=len(splits.splits),
            merged=merged,
            moved=moved,
            read=read,
            total=int(sizes.sum()),
            too_long=splits.too_long,
            imbalance_before=imbalance_of(sizes),
            imbalance=imbalance_of(after),
        )


def _fitted_sizes(index: IndexIVF, sizes: Tensor) -> Tensor:
    """The length that each list had when its centroid was computed (L,); 0, so that all are out of date, if the
    centroids are not those of the last call."""
    known = index._fitted
    if known is None or known[0] is not index.store.buffers["centroids"]:
        return torch.zeros_like(sizes)
    return known[1]


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
    rows, ids, groups = contents.rows(every)[order], contents.ids_at(every)[order], contents.groups_at(every)
    updates = store._updates.copied()
    updates.remove(every[every >= contents.n] - contents.n)
    updates.delete(every[every < contents.n], contents.n)
    updates.push(rows, ids, targets[order], None if groups is None else groups[order], custom_ids=repeated)
    with transaction(store):
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
    last = store.ids.last(store.buffers, wanted, at[packed], which[packed])
    pending = last_of(at[~packed], which[~packed], wanted.shape[0])
    last = torch.where(pending < 0, last, pending)  # pending rows were added later than packed ones
    is_last = at == last[which]
    return torch.cat([torch.nonzero(~is_last)[:, 0], torch.nonzero(is_last)[:, 0]])
