"""Changing what is in an index: adding, removing, replacing, merging, copying a part.

N vectors, d dim, n rows of a call.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..functional import lists as ragged
from ..functional import metric as metrics
from . import schema, validation
from .eager import eager
from .module import Self
from .reading import Reads

# Searches pass over removed rows until an eighth of the packed ones is gone. So a removal costs the copying of eight
# rows in the end, whatever the size of the index, and a search reads at most a seventh more than it has to.
_GONE_SHARE = 8


class Builds(Reads):
    """An index that vectors are added to and taken from."""

    @eager
    def add(self, x: Tensor) -> None:
        """Add vectors x (n, d), numbered on from ``next_id``.

        They are converted to the storage dtype and detached; for cosine they are stored at unit length. Raises
        ValueError for a wrong shape or device or a row that is not finite, TypeError for a wrong dtype, and
        RuntimeError before training or when the ids would pass 2^63 - 2; the index is then as it was.
        """
        x = validation.vectors(x, "x", self.d, self.device)
        first = self._next_id()
        end = validation.numbering(first, x.shape[0])
        self._add(x, torch.arange(first, end, device=self.device), end, custom_ids=False)

    @eager
    def add_with_ids(self, x: Tensor, ids: Tensor) -> None:
        """Add vectors x (n, d) under ids (n,) int64: any value but -1, duplicates allowed. Raises as `add`."""
        x = validation.vectors(x, "x", self.d, self.device)
        ids = validation.ids(ids, "ids", x.shape[0], self.device).clone()
        self._add(x, ids, max(self._next_id(), schema.next_id_after(ids)), custom_ids=True)

    def _next_id(self) -> int:
        """The id that `add` gives next."""
        self.check_buffers()
        return int(self._raw(schema.NEXT_ID))

    def _add(self, x: Tensor, ids: Tensor, next_id: int, *, custom_ids: bool) -> None:
        self._require_trained("add")
        rows, assigned = self._place(x)
        self._stage(rows, ids, assigned, next_id, custom_ids=custom_ids)

    def _stage(self, rows: Tensor, ids: Tensor, assigned: Tensor, next_id: int, *, custom_ids: bool) -> None:
        with self._lock:
            if not rows.shape[0] and next_id == int(self._raw(schema.NEXT_ID)):
                return
            self._put(next_id=torch.full_like(self._raw(schema.NEXT_ID), next_id))
            self._updates.push(rows, ids, assigned, custom_ids=custom_ids)
            # Packing whenever the index has doubled keeps bulk loading linear without holding rows twice.
            if self._updates.rows >= max(self._raw("packed_embeddings").shape[0], 1):
                self._pack()

    def _place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as they are stored, prepared and no longer the caller's, and the list of each."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            rows = validation.stored(metrics.prepare(x, self.metric), "x", self.dtype)
            return rows, self._assign(rows)

    def _assign(self, rows: Tensor) -> Tensor:
        """The list of each row (n,)."""
        return torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)

    @eager
    def remove_ids(self, ids: Tensor) -> int:
        """Remove vectors by id and return how many rows went.

        `ids` is int64 (n,), unknown ones being ignored, or a bool mask whose entry i says whether id i goes. Every
        row of a duplicate id goes; the others keep their ids.

        Many small removals are cheap: rows are marked at first, and the memory of marked rows is given back when they
        are an eighth of the index, or when the buffers are next read.
        """
        wanted = self._selected(ids)
        with self._lock:
            return self._drop(self._rows_with(wanted)[0], self._updates.find(wanted)[0])

    def _drop(self, rows: Tensor, waiting: Tensor) -> int:
        """Take out packed rows and waiting ones, given by their positions; how many they are."""
        count, held = rows.shape[0] + waiting.shape[0], self._raw("packed_embeddings").shape[0]
        if count:
            self._updates.remove(waiting)
            self._updates.drop(rows, held)
            self._put()
        if self._updates.gone_rows * _GONE_SHARE > held:
            self._pack()
        return count

    def _selected(self, ids: Tensor) -> Tensor:
        """Distinct ids, ascending, given as numbers or as a bool mask over ids."""
        chosen = validation.selector(ids, "ids", self.device)
        return torch.nonzero(chosen)[:, 0] if chosen.dtype == torch.bool else chosen.unique()

    @eager
    def update(self, ids: Tensor, x: Tensor) -> None:
        """Replace the vectors of ids (n,) by x (n, d). Raises KeyError for an unknown id, ValueError for one given
        twice; the index is then as it was."""
        x = validation.vectors(x, "x", self.d, self.device)
        ids = validation.ids(ids, "ids", x.shape[0], self.device).clone()
        self._require_trained("update")
        wanted = ids.unique()
        if wanted.shape[0] != ids.shape[0]:
            raise ValueError("ids must be distinct in update, got one twice")
        with self._lock:
            (held, of_held), (waiting, of_waiting) = self._rows_with(wanted), self._updates.find(wanted)
            known = torch.zeros_like(wanted, dtype=torch.bool)
            known[of_held] = known[of_waiting] = True
            if not bool(known.all()):
                raise KeyError(f"ids holds {int(wanted[~known][0])}, which is not in the index")
            (rows, assigned), next_id = self._place(x), self._next_id()
            self._drop(held, waiting)
            self._stage(rows, ids, assigned, next_id, custom_ids=False)

    @eager
    def merge_from(self, other: Builds, add_id: int = 0) -> None:
        """Move all vectors of `other`, another index of the same d, metric and centroids, here; it ends up as
        after `reset`.

        As in faiss, lists are joined without assigning anything again, and each id of `other` is raised by `add_id`;
        ``a.merge_from(b, add_id=int(a.next_id))`` keeps the ids of two separately numbered indexes apart. Here that
        holds for flat indexes too, which faiss numbers anew. Merge from a ``deepcopy`` to keep `other`. Raises
        TypeError or ValueError saying what differs, or that an id would leave int64 or become -1; both indexes are then
        as they were.

        >>> from torch_ivf_module import IndexFlatL2
        >>> a, b = IndexFlatL2(2), IndexFlatL2(2)
        >>> a.add(torch.zeros(3, 2)), b.add(torch.ones(2, 2))
        (None, None)
        >>> a.merge_from(b, add_id=3)
        >>> a.ntotal, b.ntotal, a.search(torch.ones(1, 2), 1)[1].item() >= 3
        (5, 0, True)
        """
        if not isinstance(other, Builds):
            raise TypeError(f"other must be a flat or inverted-file index, got {type(other).__name__}")
        first, second = sorted((self, other), key=id)
        with first._lock, second._lock, torch.no_grad():
            self._check_mergeable(other)
            x, ids, assigned, _ = other._oldest_first()
            ids = _raised(ids, validation.whole(add_id, "add_id"))
            rows = validation.stored(x, "other", self.dtype)
            after = min(other._next_id() + add_id, schema.LAST_ID)
            number = max(self._next_id(), schema.next_id_after(ids), after)
            self._stage(rows, ids, assigned, number, custom_ids=True)
            other.reset()

    def _check_mergeable(self, other: Builds) -> None:
        if other is self:
            raise ValueError("other must be another index, got this one")
        for name in ("d", "metric", "device"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise ValueError(f"other must have {name} = {mine!r} to be merged, got {theirs!r}")
        mine, theirs = self._raw("centroids"), other._raw("centroids")
        if self._flat != other._flat or mine.shape != theirs.shape:
            raise ValueError(f"other must have {_lists_of(self)} to be merged, got {_lists_of(other)}")
        if not torch.equal(mine, theirs):
            raise ValueError("other must have the same centroids to be merged, got others: train one, deepcopy it")
        self._require_trained("merge_from")

    @eager
    def copy_subset(self: Self, ids: Tensor) -> Self:
        """A new index of the vectors of some ids, given as in `remove_ids`: those that call would remove, copied.

        It has the centroids and settings of this one, and ids and `next_id` are kept. faiss's ``copy_subset_to(other,
        0, a1, a2)`` is ``copy_subset(torch.arange(a1, a2))`` and, after it, ``other.merge_from``.

        >>> from torch_ivf_module import IndexFlatL2
        >>> index = IndexFlatL2(2)
        >>> index.add(torch.eye(2))
        >>> index.copy_subset(torch.tensor([1])).reconstruct(1)
        tensor([0., 1.])
        """
        wanted = self._selected(ids)
        with self._lock, torch.no_grad():
            packed, offsets, held = self._packed()
            kept = torch.zeros_like(held, dtype=torch.bool).index_fill_(0, self._rows_with(wanted)[0], True)
            part = ragged.keep_rows(packed, offsets, held, kept)
            # What is known as copied already is not copied: all but the vectors.
            known = {id(old): new for old, new in zip((packed, offsets, held), part, strict=True)}
            twin = copy.deepcopy(self, known)
            twin._put(list_offsets=part[1], list_ids=part[2], next_id=twin._raw(schema.NEXT_ID))
            return twin

    @eager
    def reset(self) -> None:
        """Forget the vectors, and number from 0 again, as faiss does; centroids stay."""
        if self._raw("centroids").shape[0]:
            self.check_buffers()  # for otherwise the centroids are not to be trusted either
        self._start_empty(keep_centroids=True)

    def reset_parameters(self) -> None:
        """Be empty and untrained, as after construction; settings, dtype and device stay. What was in the buffers is
        not read, so they may be uninitialised.

        >>> from torch_ivf_module import IndexFlatL2
        >>> with torch.device("meta"):
        ...     index = IndexFlatL2(2)
        >>> index.to_empty(device="cpu").reset_parameters()
        >>> index.add(torch.eye(2))
        >>> index.search(torch.eye(2), 1)[1].flatten()
        tensor([0, 1])
        """
        self._start_empty(keep_centroids=False)

    def _start_empty(self, *, keep_centroids: bool) -> None:
        with self._lock, torch.no_grad():
            fresh = schema.empty(self.d, flat=self._flat, device=self.device, dtype=self.dtype)
            if keep_centroids:
                fresh["centroids"] = centroids = self._raw("centroids")
                offsets = fresh["list_offsets"]
                fresh["list_offsets"] = offsets.new_zeros(centroids.shape[0] + 1) if centroids.shape[0] else offsets
            self._exchange(fresh)


def _raised(ids: Tensor, add_id: int) -> Tensor:
    """ids (n,) with `add_id` added to each. ValueError if one of them leaves int64 or becomes -1."""
    raised = ids + add_id
    wrong = (raised == -1) | ((raised < ids) if add_id > 0 else (raised > ids))
    if bool(wrong.any()):
        raise ValueError(f"add_id = {add_id} would make id {int(ids[wrong][0])} leave int64 or become -1")
    return raised


def _lists_of(index: Reads) -> str:
    return "one list without a centroid" if index._flat else f"{index._raw('centroids').shape[0]} centroids"
