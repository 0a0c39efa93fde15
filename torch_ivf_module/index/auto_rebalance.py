"""The setting `auto_rebalance` of `IndexIVF`, and the calls of `rebalance` after changes of the index."""

from __future__ import annotations

import functools
import math
import numbers
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from ..functional.rebalance import imbalance_of
from .contents import Contents
from .eager import opaque

if TYPE_CHECKING:
    from .ivf import IndexIVF

P = ParamSpec("P")
R = TypeVar("R")

_CHECKS = 64  # the lists are looked at after changes of this part of the rows
# Rows that a call reads at most for each row that was changed. With 8 recall@10 of docs/drift.md's clusters is 0.964
# where queries read 1% of the rows, with 16 it is 0.980, of an index trained anew 0.979.
_READ = 16
_LEAST_READ = 1 << 12  # or so many, in small indexes


def _get(self: IndexIVF) -> float | None:
    """The `imbalance_factor` above which changes call `rebalance`: None for never, 1 for whatever it is.

    The lists are looked at after 64th parts of the rows were added, updated or removed. Such a call then reads at most
    16 vectors for each vector changed since (4,096 in a small index, or twice the longest list), so that it takes a
    bounded part of the time. If it fails, for lack of memory, a warning says so, and the change has been made.
    """
    return self._auto_rebalance


def _set(self: IndexIVF, value: float | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real) or not value >= 1):
        raise ValueError(f"auto_rebalance must be None or an imbalance factor >= 1, such as 1.5, got {value!r}")
    self._auto_rebalance = None if value is None else float(value)


auto_rebalance_property = property(_get, _set)


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
    try:
        with index.store.lock:
            index._rows_changed += rows
            if _CHECKS * index._rows_changed >= max(index.ntotal, index.nlist):
                most, index._rows_changed = max(_READ * index._rows_changed, _LEAST_READ), 0
                sizes = Contents(index.store).sizes()
                if imbalance_of(sizes) > (index._auto_rebalance or math.inf):
                    index.rebalance(max_rows=max(most, 2 * int(sizes.max())))
    except (MemoryError, RuntimeError) as error:  # the caller's change has been made
        warnings.warn(f"auto_rebalance failed, and the lists are unchanged: {error}", RuntimeWarning, stacklevel=4)
