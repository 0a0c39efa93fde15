"""faiss's ID selectors: which ids a search may find, or a removal takes.

n ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from .arrays import numbers

_CPU = torch.device("cpu")


class IDSelector:
    """The base class. A subclass of one's own needs `contains`."""

    def contains(self, ids: Tensor) -> Tensor:
        """Which of ids (n,) int64 are selected: bool (n,)."""
        raise NotImplementedError(f"{type(self).__name__} must define contains(ids)")

    def chosen(self, ids: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The selected ids of an index, on its device; `ids` gives all of its ids. Others may be among them."""
        found = ids()
        return found[self.contains(found)]

    def is_member(self, id: int) -> bool:
        """Whether one id is selected."""
        return bool(self.contains(torch.tensor([id], device=_CPU))[0])


class IDSelectorAll(IDSelector):
    """Every id.

    >>> IDSelectorAll().is_member(3)
    True
    """

    def contains(self, ids: Tensor) -> Tensor:
        """All of them."""
        return torch.ones_like(ids, dtype=torch.bool)


class IDSelectorRange(IDSelector):
    """Ids from `imin` up to, but without, `imax`.

    >>> IDSelectorRange(2, 4).is_member(4)
    False
    """

    def __init__(self, imin: int, imax: int, assume_sorted: bool = False) -> None:
        self.imin, self.imax, self.assume_sorted = imin, imax, assume_sorted

    def contains(self, ids: Tensor) -> Tensor:
        """Those in the range."""
        return (ids >= self.imin) & (ids < self.imax)


class IDSelectorBatch(IDSelector):
    """The ids of an array, which is copied: ``IDSelectorBatch(ids)``, or ``IDSelectorBatch(n, ids)``.

    >>> IDSelectorBatch([1, 5]).is_member(5)
    True
    """

    def __init__(self, *arguments: Any) -> None:
        self.ids = numbers(_last(arguments), _CPU).clone()

    def contains(self, ids: Tensor) -> Tensor:
        """Those in the array."""
        return torch.isin(ids, self.ids.to(ids.device))

    def chosen(self, ids: Callable[[], Tensor], device: torch.device) -> Tensor:
        """The array: the ids of the index need not be read."""
        return self.ids.to(device)


class IDSelectorArray(IDSelectorBatch):
    """The ids of an array; here the same as `IDSelectorBatch`."""


class IDSelectorBitmap(IDSelector):
    """The ids whose bit is set: bit ``id % 8`` of byte ``id // 8`` of an array of uint8.

    >>> IDSelectorBitmap(numpy.packbits([0, 1, 0, 1], bitorder="little")).is_member(3)
    True
    """

    def __init__(self, *arguments: Any) -> None:
        self.bitmap = torch.from_numpy(numpy.array(_last(arguments), dtype="uint8").reshape(-1))

    def contains(self, ids: Tensor) -> Tensor:
        """Those whose bit is set; the array ends before an id that is not."""
        inside = (ids >= 0) & (ids < 8 * self.bitmap.shape[0])
        at = ids[inside]
        found = torch.zeros_like(inside)
        found[inside] = (self.bitmap.to(ids.device)[at >> 3].long() >> (at & 7)).bitwise_and(1).bool()
        return found


class IDSelectorNot(IDSelector):
    """The ids that another selector does not select."""

    def __init__(self, sel: IDSelector) -> None:
        self.sel = sel

    def contains(self, ids: Tensor) -> Tensor:
        """Those that the other does not select."""
        return ~self.sel.contains(ids)


class IDSelectorAnd(IDSelector):
    """The ids that both of two selectors select."""

    def __init__(self, lhs: IDSelector, rhs: IDSelector) -> None:
        self.lhs, self.rhs = lhs, rhs

    def contains(self, ids: Tensor) -> Tensor:
        """Those of both."""
        return self.lhs.contains(ids) & self.rhs.contains(ids)


class IDSelectorOr(IDSelectorAnd):
    """The ids that either of two selectors selects."""

    def contains(self, ids: Tensor) -> Tensor:
        """Those of either."""
        return self.lhs.contains(ids) | self.rhs.contains(ids)


class IDSelectorXOr(IDSelectorAnd):
    """The ids that exactly one of two selectors selects."""

    def contains(self, ids: Tensor) -> Tensor:
        """Those of one."""
        return self.lhs.contains(ids) ^ self.rhs.contains(ids)


def selector(value: Any) -> IDSelector:
    """`value`, or the selector of an array of ids."""
    return value if isinstance(value, IDSelector) else IDSelectorBatch(value)


def _last(arguments: tuple[Any, ...]) -> Any:
    """The array of ``Selector(array)`` or ``Selector(n, array)``, of which the first n entries count."""
    if len(arguments) not in (1, 2):
        raise TypeError(f"the selector takes an array, or a number and an array, got {len(arguments)} arguments")
    return arguments[0] if len(arguments) == 1 else arguments[1][: arguments[0]]
