"""Adding, removing, replacing, merging and copying vectors: methods of `IndexBase`, and the functions they share.

N vectors, L lists, d dim, n rows of a call.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.lists import lengths
from ..functional.probe import Coarse, nearest_lists
from . import schema, validation
from .eager import eager
from .groups import kept_rows
from .store import ListStore
from .transactions import transaction

if TYPE_CHECKING:
    from .base import IndexBase

Self = TypeVar("Self", bound="IndexBase")

# -- methods -----------------------------------------------------------------------------------------------


@eager
def add(self: IndexBase, x: Tensor, *, groups: Tensor | None = None) -> None:
    """Add vectors x (n, d) under the ids from ``next_id`` on.

    `groups` (n,) int64 are the groups of the rows, for `SearchParams(groups=...)`; -1, the default, means no group.

    Vectors are converted to the storage dtype and detached; for cosine they are scaled to unit length. Raises
    ValueError for a wrong shape or device or a row that is not finite, TypeError for a wrong dtype, and RuntimeError
    before training or if ids would exceed 2^63 - 2. The index is then unchanged.
    """
    x = validation.vectors(x, "x", self.d, self.device)
    _add(self.store, x, None, validation.groups(groups, x.shape[0], self.device))


@eager
def add_with_ids(self: IndexBase, x: Tensor, ids: Tensor, *, groups: Tensor | None = None) -> None:
    """Add vectors x (n, d) under ids (n,) int64: any value but -1, duplicates allowed. `groups` and errors as `add`."""
    x = validation.vectors(x, "x", self.d, self.device)
    ids = validation.ids(ids, "ids", x.shape[0], self.device).clone()
    _add(self.store, x, ids, validation.groups(groups, x.shape[0], self.device))


@eager
def remove_ids(self: IndexBase, ids: Tensor) -> int:
    """Remove vectors by id and return how many rows were removed.

    `ids` is int64 (n,), or a bool mask whose entry i says whether to remove id i. Unknown ids are ignored. If several
    rows have an id, all of them are removed. The other rows keep their ids.

    Many small calls are fast: removed rows are only marked. Their memory is freed when they are an eighth of the index,
    or when other code next reads the buffers.
    """
    wanted = selected_ids(ids, self.device)
    with transaction(self.store):
        return self.store.delete(self.store.matches(wanted))


@eager
def update(self: IndexBase, ids: Tensor, x: Tensor, *, groups: Tensor | None = None) -> None:
    """Replace the vectors of ids (n,) by x (n, d), and their groups by `groups` (n,) if given.

    Raises KeyError for an unknown id, ValueError for an id given twice. The index is then unchanged.
    """
    store = self.store
    x = validation.vectors(x, "x", self.d, self.device)
    ids = validation.ids(ids, "ids", x.shape[0], self.device).clone()
    labels = validation.groups(groups, x.shape[0], self.device)
    store.require_trained("update")
    wanted, back = ids.unique(return_inverse=True)
    if wanted.shape[0] != ids.shape[0]:
        raise ValueError("ids must be distinct in update, got one twice")
    with transaction(store):
        old = store.matches(wanted)
        known = torch.zeros_like(wanted, dtype=torch.bool)
        known[old.of_packed] = known[old.of_pending] = True
        if not bool(known.all()):
            raise KeyError(f"ids holds {int(wanted[~known][0])}, which is not in the index")
        (rows, assigned), next_id = assign(store, x), store.next_id
        if groups is None and store.grouped:
            labels = store.last_added(wanted, groups=True)[back]
        store.delete(store.matches(wanted))
        store.add(rows, ids, assigned, next_id, labels, custom_ids=False)


@eager
def merge_from(self: IndexBase, other: IndexBase, add_id: int = 0) -> None:
    """Move all vectors of `other`, another index of the same d, metric and centroids, into this one; `other` is empty
    afterwards, as after `reset`.

    As in faiss, lists are joined without assigning vectors again, and `add_id` is added to each id of `other`:
    ``a.merge_from(b, add_id=int(a.next_id))`` avoids equal ids. Unlike in faiss, this also holds for flat indexes. To
    keep `other`, merge from a ``deepcopy``. Raises TypeError or ValueError if the indexes differ, or if an id would
    exceed int64 or become -1. Both indexes are then unchanged.

    >>> from torch_ivf_module import IndexFlatL2
    >>> a, b = IndexFlatL2(2), IndexFlatL2(2)
    >>> a.add(torch.zeros(3, 2)), b.add(torch.ones(2, 2))
    (None, None)
    >>> a.merge_from(b, add_id=3)
    >>> a.ntotal, b.ntotal, a.search(torch.ones(1, 2), 1)[1].item() >= 3
    (5, 0, True)
    """
    store = self.store
    if not isinstance(getattr(other, "store", None), ListStore):
        raise TypeError(f"other must be a flat or inverted-file index, got {type(other).__name__}")
    first, second = sorted((store, other.store), key=id)
    with first.lock, second.lock, transaction(store), torch.no_grad():
        _check_mergeable(self, other)
        x, ids, assigned, groups, _ = stored_rows(other.store)
        ids = _shifted(ids, validation.int64(add_id, "add_id"))
        rows = store.format.copied(x, "other", store.packed.dtype)
        groups = None if groups is None else groups.clone()
        after = min(other.store.next_id + add_id, schema.LAST_ID)
        number = max(store.next_id, schema.next_id_after(ids), after)
        store.add(rows, ids, assigned, number, groups, custom_ids=True)
        other.reset()


@eager
def copy_subset(self: Self, ids: Tensor) -> Self:
    """A new index with copies of the vectors of some ids, which are given as in `remove_ids`.

    It has the same centroids, settings, ids and `next_id`. faiss's ``copy_subset_to(other, 0,
    a1, a2)`` is ``copy_subset(torch.arange(a1, a2))`` followed by ``other.merge_from``.

    >>> from torch_ivf_module import IndexFlatL2
    >>> index = IndexFlatL2(2)
    >>> index.add(torch.eye(2))
    >>> index.copy_subset(torch.tensor([1])).reconstruct(1)
    tensor([0., 1.])
    """
    wanted, store = selected_ids(ids, self.device), self.store
    with store.lock, torch.no_grad():
        packed, offsets, packed_ids = store.packed_lists()
        kept = torch.zeros_like(packed_ids, dtype=torch.bool).index_fill_(0, store.matches(wanted).packed, True)
        part, groups = kept_rows(store.buffers, packed, kept), store.buffers.get(schema.GROUPS)
        # deepcopy takes the entries of its memo for copies that exist already, so it does not copy the lists.
        copied = {id(old): new for old, new in zip((packed, offsets, packed_ids, groups), part, strict=True)}
        subset = copy.deepcopy(self, copied)
        number = subset.store.buffers[schema.NEXT_ID]
        subset.store.put(list_offsets=part[1], list_ids=part[2], list_groups=part[3], next_id=number)
        return subset


@eager
def reset(self: IndexBase) -> None:
    """Remove all vectors; ids start from 0 again. Centroids are kept, as in faiss."""
    if self.store.buffers["centroids"].shape[0]:
        self.store.check()  # if other buffers were overwritten, the centroids may have been too
    self.store.exchange(empty_buffers(self.store, keep_centroids=True))


def reset_parameters(self: IndexBase) -> None:
    """Make the index empty and untrained, as after construction. Settings, dtype and device are kept.

    The values of the buffers are not read, so they may be uninitialised.

    >>> from torch_ivf_module import IndexFlatL2
    >>> with torch.device("meta"):
    ...     index = IndexFlatL2(2)
    >>> index.to_empty(device="cpu").reset_parameters()
    >>> index.add(torch.eye(2))
    >>> index.search(torch.eye(2), 1)[1].flatten()
    tensor([0, 1])
    """
    with self.store.lock:
        self.store.exchange(empty_buffers(self.store, keep_centroids=False))
        self.store.ordering = "none"


# -- functions ---------------------------------------------------------------------------------------------


def assign(store: ListStore, x: Tensor, coarse: Coarse | None = None) -> tuple[Tensor, Tensor]:
    """Copies of vectors x (n, d) as they are stored, and the list (n,) that each is assigned to, by `coarse` or the
    present coarse quantizer.

    That is the list nearest to the vector as it is stored, but before it is encoded.
    """
    with torch.no_grad(), torch.autocast(store.device.type, enabled=False):
        prepared = metrics.prepare(x, store.metric)
        rows = store.format.stored(prepared, "x", store.packed.dtype)
        if store.flat:
            return rows, torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
        coarse = coarse or store.coarse()
        return rows, nearest_lists(rows if rows.is_floating_point() else prepared, coarse, store.metric)


def selected_ids(ids: Tensor, device: torch.device) -> Tensor:
    """Distinct ascending ids, of `ids` that are numbers or a bool mask whose entry i is for id i."""
    chosen = validation.selector(ids, "ids", device)
    return torch.nonzero(chosen)[:, 0] if chosen.dtype == torch.bool else chosen.unique()


def stored_rows(store: ListStore) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """All rows (N, ...), their ids, lists and, if there are any, groups (N,), ordered by list, and a count.

    Of each id that several rows have, the row added last is at the end; the count is the number of these rows.
    """
    packed, offsets, ids = store.packed_lists()
    groups = store.buffers.get(schema.GROUPS)
    numbers = torch.arange(store.nlist, device=ids.device)
    assigned = torch.repeat_interleave(numbers, lengths(offsets)) if store.nlist else ids[:0]
    repeated = torch.tensor(list(store.ids.last_places), dtype=torch.int64, device="cpu").to(ids.device)
    last = store.ids.last(store.buffers, repeated, *store.ids.rows(store.buffers, repeated))
    last = last[last >= 0]
    if last.shape[0]:
        earlier = torch.ones_like(ids, dtype=torch.bool).index_fill_(0, last, False)
        order = torch.cat([torch.nonzero(earlier)[:, 0], last])
        packed, ids, assigned = packed[order], ids[order], assigned[order]
        groups = None if groups is None else groups[order]
    return packed, ids, assigned, groups, last.shape[0]


def _add(store: ListStore, x: Tensor, ids: Tensor | None, groups: Tensor | None) -> None:
    """Add vectors x (n, d) of groups (n,) under ids (n,), or from next_id on; numbered under the lock, so no two calls
    share an id."""
    store.require_trained("add")
    coarse = None if store.flat else store.coarse()
    rows, assigned = assign(store, x, coarse)
    with transaction(store):
        if coarse is not None and store.buffers["centroids"] is not coarse.centroids:  # another thread has trained it
            rows, assigned = assign(store, x)
        next_id, custom = store.next_id, ids is not None
        if ids is None:
            first, next_id = next_id, validation.numbering(next_id, rows.shape[0])
            ids = torch.arange(first, next_id, device=rows.device)
        else:
            next_id = max(next_id, schema.next_id_after(ids))
        store.add(rows, ids, assigned, next_id, groups, custom_ids=custom)


def empty_buffers(store: ListStore, *, keep_centroids: bool) -> dict[str, Tensor]:
    """The buffers of an index without vectors: with the centroids of this one, or untrained."""
    buffers = schema.empty(store.format, flat=store.flat, device=store.device, dtype=store.packed.dtype)
    centroids = store.buffers["centroids"]
    if keep_centroids and centroids.shape[0]:
        buffers["centroids"] = centroids
        buffers["list_offsets"] = buffers["list_offsets"].new_zeros(centroids.shape[0] + 1)
    return buffers


def _check_mergeable(index: IndexBase, other: IndexBase) -> None:
    if other is index:
        raise ValueError("other must be another index, got this one")
    for name in ("d", "metric", "device"):
        mine, theirs = getattr(index, name), getattr(other, name)
        if mine != theirs:
            raise ValueError(f"other must have {name} = {mine!r} to be merged, got {theirs!r}")
    if index.store.format.kind != other.store.format.kind:
        mine, theirs = index.store.format.kind, other.store.format.kind
        raise ValueError(f"other must store rows as {mine} to be merged, got {theirs}: add its reconstructed vectors")
    centroids, others = index.store.buffers["centroids"], other.store.buffers["centroids"]
    if index.store.flat != other.store.flat or centroids.shape != others.shape:
        raise ValueError(f"other must have {_lists_of(index)} to be merged, got {_lists_of(other)}")
    if not torch.equal(centroids, others):
        raise ValueError("other must have the same centroids to be merged, got others: train one, deepcopy it")
    index.store.require_trained("merge_from")


def _shifted(ids: Tensor, add_id: int) -> Tensor:
    """ids (n,) + `add_id`. ValueError if a sum exceeds int64 or is -1."""
    sums = ids + add_id
    wrong = (sums == -1) | ((sums < ids) if add_id > 0 else (sums > ids))
    if bool(wrong.any()):
        raise ValueError(f"add_id = {add_id} would make id {int(ids[wrong][0])} leave int64 or become -1")
    return sums


def _lists_of(index: IndexBase) -> str:
    if index.store.flat:
        return "one list without a centroid"
    return f"{index.store.buffers['centroids'].shape[0]} centroids"
