"""Which version of an index searches read, and how a change becomes the next one.

A thread that changes an index holds the lock, writes into the buffers, and publishes a version when it is done.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING

from ..functional.transforms import run_outside
from . import schema
from .coding import CodesCache
from .integrity import Integrity, Sources, sources_of, unchanged, untouched
from .pending import few
from .version import Packed, Version, WriteLock

if TYPE_CHECKING:
    from .store import ListStore

_RETRY = 0.001  # seconds after which a search that waits for a change looks again whether it has to


class Versions:
    """The versions of a store. Searches read the last one without a lock; `lock` is for changes."""

    def __init__(self, store: ListStore, integrity: Integrity) -> None:
        self._weak_store = weakref.ref(store)  # it owns this object: a cycle of references would keep the buffers alive
        self._buffers, self._names, self._integrity = store.buffers, (*store.names, schema.GROUPS), integrity
        self.lock = WriteLock(self.publish)
        self.last: Version | None = None  # None if the buffers have to be checked
        self._written: Sources = {}  # the buffers that the index has written, or has checked
        self.changing = False  # whether there is a change that is not published yet

    @property
    def _store(self) -> ListStore:
        store = self._weak_store()
        assert store is not None
        return store

    # -- reading -------------------------------------------------------------------------------------------

    def read(self, *, counted: bool = False) -> Version:
        """The version that a search reads. It does not wait for changes, and sees nothing of one in progress.

        `counted` says that the caller limits the number of rows, and so needs lists without deleted ones. If it were
        better to pack the rows before they are searched, and no other thread has the lock, this call does so.
        """
        version = self.last
        if version is None or self._integrity.handed_out or not unchanged(version.packed.sources, self._buffers):
            version = self.current()
        if (version.crowded or (counted and version.deleted is not None)) and self.lock.acquire(timeout=0):
            try:
                self._store.pack()
            finally:
                self.lock.release()
            version = self.last or version
        version.read = True
        return version

    def whole(self) -> Version:
        """The version without pending and deleted rows. Not for a caller that is changing the index."""
        with self.lock:
            self._store.pack()
            self.publish()
            return self.read()

    def current(self) -> Version:
        """The last version, after a check whether other code has written into the buffers.

        It waits for a change in progress only if other code has.
        """
        while True:
            version = self.last
            if version is not None and not self._integrity.handed_out and self._is_current(version):
                return version
            if self.lock.acquire(timeout=_RETRY):
                try:
                    self._store.check(values=False)
                    if self.last is None or not self._is_current(self.last):
                        self._written, self.changing = sources_of(self._buffers, self._present()), True
                    self.publish()
                    if self.last is not None:
                        return self.last
                finally:
                    self.lock.release()

    def _is_current(self, version: Version) -> bool:
        """Whether only the index itself has written buffers since: those of `version` are as they were, though a change
        in progress may have replaced them."""
        return untouched(version.packed.sources) and self._known()

    def _known(self) -> bool:
        """Whether the buffers are those that the index has written."""
        return list(self._written) == self._present() and unchanged(self._written, self._buffers)

    def _present(self) -> list[str]:
        """The names of the buffers that there are."""
        return [name for name in self._names if name in self._buffers]

    # -- changing, under the lock --------------------------------------------------------------------------

    def wrote(self, names: Collection[str]) -> None:
        """After the index has written buffers of these names."""
        if any(name in names for name in self._names):
            present = self._present()
            known = {**self._written, **sources_of(self._buffers, [name for name in present if name in names])}
            self._written = {name: known[name] for name in present if name in known}

    def forget(self) -> None:
        """Discard the last version, for the next search to check the buffers."""
        self._written = {}
        self._replace(None)

    def publish(self) -> None:
        """Let searches read what was changed. `lock` calls this before it is released."""
        if self.changing:
            run_outside(self._publish)

    def _publish(self) -> None:
        """`publish`. If searches read the last version, all that takes long is done before they read the next one.

        If this fails, for lack of memory, the change is published without it: a search does it, and has the error.
        """
        last, version = self.last, None
        if last is not None:
            last.packed.read |= last.read
        try:
            updates = self._store._updates
            if last is not None and last.packed.read and not few(updates.rows, updates.changes, last.packed.rows):
                self._store.pack()
            version = self._next()
            if last is not None and version is not None and _expected(last, version):
                version.lists()
                if last.packed.has_cells:
                    version.cells()
        except (MemoryError, RuntimeError):
            pass
        finally:
            self.changing = False
            self._replace(version or self._next())

    def _next(self) -> Version | None:
        """The version of the buffers and the pending updates; None if other code has written the buffers."""
        if not self._known():
            return None
        store = self._store
        return Version(self._packed(), store._updates.pending(), store._updates.deleted)

    def _packed(self) -> Packed:
        """The packed lists of the buffers: those of the last version if they are the same, but for the centroids."""
        last, now = self.last, self._written
        if last is not None and last.packed.sources is now:
            return last.packed
        before = {} if last is None else last.packed.sources
        lists = {*before, *now} - {"centroids"}
        if last is not None and all(name in before and before[name] is now.get(name) for name in lists):
            return last.packed.with_centroids(now)
        return Packed(self._written, self._store.metric, self._store.d)

    def _replace(self, version: Version | None) -> None:
        last, self.last = self.last, version
        if last is not None and (version is None or version.packed.codes is not last.packed.codes):
            last.packed.codes.close()

    # -- codes ---------------------------------------------------------------------------------------------

    @property
    def codes(self) -> CodesCache:
        """The codes of the packed lists that searches read."""
        return CodesCache(self._store.d) if self.last is None else self.last.packed.codes

    def forget_codes(self) -> None:
        """Free the codes; visits count from 0 again."""
        if (version := self.last) is not None:
            version.packed.codes, old = CodesCache(self._store.d), version.packed.codes
            old.close()


def _expected(last: Version, version: Version) -> bool:
    """Whether searches are likely to read `version`: one has read the last or, if rows were packed since, its lists."""
    read = last.read if version.packed is last.packed else last.packed.read
    return read and version.packed.trained
