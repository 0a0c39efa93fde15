"""Values that the first of several threads computes for all of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Latest(Generic[K, V]):
    """The value that was last computed, and the object that it was computed from.

    One thread computes; others that ask for the same wait for it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: tuple[K, V] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy computes again."""
        return type(self), ()

    @property
    def value(self) -> V | None:
        """The value, None if none was computed."""
        found = self._found
        return None if found is None else found[1]

    def get(self, source: K, compute: Callable[[K], V]) -> V:
        """``compute(source)``, kept for the next call with the same object."""
        found = self._found
        if found is None or found[0] is not source:
            with self._lock:
                found = self._found
                if found is None or found[0] is not source:
                    self._found = found = source, compute(source)
        return found[1]
