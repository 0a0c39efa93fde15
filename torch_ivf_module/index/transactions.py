"""Changes of an index that are made as a whole or, if they fail, not at all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .integrity import Integrity, VersionToken
from .pending import PendingUpdates

if TYPE_CHECKING:
    from .store import ListStore


class Snapshot(NamedTuple):
    """The state of a store at one time: references to tensors, no copies."""

    version: VersionToken
    buffers: dict[str, Tensor]
    updates: tuple[PendingUpdates, list[int]]
    integrity: Integrity
    last_places: dict[int, tuple[int, int]]
    ordering: str
    unordered: int


def snapshot(store: ListStore) -> Snapshot:
    """The state for `restore`."""
    with store.lock:
        return Snapshot(
            store.version,
            store.own_buffers(),
            store._updates.snapshot(),
            copy.copy(store._integrity),
            store.ids.last_places,
            store.ordering,
            store.unordered,
        )


def packed_snapshot(store: ListStore) -> Snapshot:
    """The state for `restore`, after pending and deleted rows were packed."""
    store.pack()
    return snapshot(store)


def restore(store: ListStore, before: Snapshot) -> None:
    """Undo everything since `snapshot`."""
    with store.lock:
        if store.version is not before.version:
            store.exchange(before.buffers)
            store._integrity.restore(before.integrity)
            store.ids.last_places = before.last_places
        store._updates = PendingUpdates.restored(before.updates)
        store.ordering, store.unordered = before.ordering, before.unordered


@contextmanager
def transaction(store: ListStore) -> Iterator[None]:
    """A context that holds the lock, and that undoes what was changed in it if it is left by an exception.

    So a change that runs out of memory while it packs the rows, or that is interrupted, can be repeated.
    """
    with store.lock:
        before = snapshot(store)
        try:
            yield
        except BaseException:
            restore(store, before)
            raise
