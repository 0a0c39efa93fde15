"""What searches read: versions of an index, none of which ever changes, and the lock under which one follows another.

N packed rows, L lists.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from ..functional.cells import Cells, cells_of, filled_groups
from ..functional.lists import InvertedLists
from ..functional.probe import Coarse
from . import schema
from .coding import CodesCache
from .derived import Derived, derive, with_centroids
from .integrity import Sources
from .lazy import Latest
from .pending import DeletedRows, PendingRows, few


class Packed:
    """The packed lists of one or several versions, and what searches derive from them: biases, codes.

    `sources` are centroids, rows, offsets, ids and, if rows have groups, these.
    """

    def __init__(self, sources: Sources, metric: str, d: int) -> None:
        self.sources, self.metric = sources, metric
        self.groups = sources[schema.GROUPS][0] if schema.GROUPS in sources else None  # (N,) int64
        self.rows, self.trained = sources["list_ids"][0].shape[0], sources["list_offsets"][0].shape[0] > 1
        self.read = False  # whether a search has read a version before the last one that has these lists
        self.codes = CodesCache(d)
        self._derived: Latest[Sources, Derived] = Latest()
        self._cells: Latest[Sources, Cells] = Latest()

    def derived(self) -> Derived:
        """The coarse quantizer and the lists; RuntimeError before training."""
        if not self.trained:
            raise RuntimeError("a search needs a trained index: call train(x) first")

        def made(sources: Sources) -> Derived:
            buffers = {name: tensor for name, (tensor, _) in sources.items()}
            return derive(buffers, tuple(name for name in buffers if name != schema.GROUPS), self.metric)

        return self._derived.get(self.sources, made)

    def cells(self) -> Cells:
        """The cells of the lists, which the first search by group computes."""
        lists = self.derived().lists
        return self._cells.get(self.sources, lambda _: cells_of(lists.offsets, filled_groups(self.groups, lists.ids)))

    def with_centroids(self, sources: Sources) -> Packed:
        """The same lists with the centroids of `sources`; biases, codes and cells are not computed again."""
        other, derived, cells = Packed(sources, self.metric, 0), self._derived.value, self._cells.value
        other.read, other.codes = self.read, self.codes
        if derived is not None:
            centroids = sources["centroids"][0]
            other._derived.get(sources, lambda _: with_centroids(derived, centroids, self.metric))
        if cells is not None:
            other._cells.get(sources, lambda _: cells)
        return other

    @property
    def has_cells(self) -> bool:
        """Whether a search by group has read the lists."""
        return self._cells.value is not None

    @property
    def bytes(self) -> int:
        """Memory of biases, codes and cells."""
        derived, cells = self._derived.value, self._cells.value
        return (derived.bytes if derived else 0) + self.codes.bytes + sum(tensor.nbytes for tensor in cells or ())


class Version:
    """All rows of an index at one time: packed ones, of which some may be deleted, and pending ones."""

    def __init__(self, packed: Packed, pending: PendingRows | None, deleted: DeletedRows | None) -> None:
        self.packed, self.pending, self.deleted = packed, pending, deleted
        self.read = False  # whether a search has read it
        self.ntotal = packed.rows + (pending.rows if pending else 0) - (deleted.rows if deleted else 0)
        # Whether packing would make it faster.
        self.crowded = pending is not None and not few(pending.rows, pending.changes, packed.rows)
        self._lists: tuple[Coarse, list[InvertedLists]] | None = None

    def lists(self, *, counted: bool = False) -> tuple[Coarse, list[InvertedLists]]:
        """The coarse quantizer, the packed lists and, if there are any, lists of the pending rows.

        The packed lists have masked rows instead of deleted ones; with `counted` they are copies without deleted rows,
        for a search that limits the number of rows. The first call computes what is not kept.
        """
        if self._lists is None:
            coarse, lists = self.packed.derived()
            segments = [lists if self.deleted is None else self.deleted.masked(lists)]
            if self.pending is not None:
                nlist = lists.offsets.shape[0] - 1
                segments.append(self.pending.lists(nlist, coarse.origin, self.packed.metric))
            self._lists = coarse, segments
        if counted and self.deleted is not None:
            coarse, segments = self._lists
            return coarse, [self.deleted.left_out(self.packed.derived().lists), *segments[1:]]
        return self._lists

    def cells(self, *, counted: bool = False) -> list[Cells]:
        """The cells of each of the lists that `lists` returns."""
        (coarse, segments), lists = self.lists(counted=counted), self.packed.derived().lists
        if counted and self.deleted is not None:
            kept = filled_groups(self.packed.groups, lists.ids)[~self.deleted.mask]
            cells = [cells_of(segments[0].offsets, kept)]
        else:
            cells = [self.packed.cells()]
        if self.pending is not None:
            cells.append(self.pending.cells(lists.offsets.shape[0] - 1, coarse.origin, self.packed.metric))
        return cells


class WriteLock:
    """A re-entrant lock for changes. It calls `publish`, a method of an object that owns it, before it is released."""

    def __init__(self, publish: Callable[[], None]) -> None:
        self._lock, self._depth = threading.RLock(), 0
        self._publish = weakref.WeakMethod(publish)  # so that no cycle of references keeps an index alive

    def acquire(self, timeout: float = -1) -> bool:
        """Acquire it, and return True; or return False if another thread has it for `timeout` seconds."""
        if not self._lock.acquire(timeout=timeout):
            return False
        self._depth += 1
        return True

    def release(self) -> None:
        """Release it, which `publish` precedes if this is the outermost of the holder's calls."""
        try:
            if self._depth == 1 and (publish := self._publish()) is not None:
                publish()
        finally:
            self._depth -= 1
            self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()
