"""Indexes under ids of one's own. The index inside keeps these ids itself, so nothing is translated."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..index.base import IndexBase
from .base import Index
from .selectors import IDSelector
from .vectors import Vector


class IndexIDMap(Index):
    """An empty index of any kind, to be filled with `add_with_ids`.

    >>> import numpy
    >>> from torch_ivf_module.faiss_compat import IndexFlat
    >>> index = IndexIDMap(IndexFlat(2))
    >>> index.add_with_ids(numpy.eye(2), numpy.array([10, 11]))
    >>> index.search(numpy.eye(2)[:1], 1)[1]
    array([[10]])
    """

    def __init__(self, index: Index) -> None:
        if index.ntotal:
            raise RuntimeError(f"the index must be empty, got {index!r}")
        self._index = index

    @classmethod
    def around(cls, index: Index) -> IndexIDMap:
        """The map whose ids are those of `index`, which may be filled."""
        made = cls.__new__(cls)
        made._index = index
        return made

    @property
    def index(self) -> Index:
        """The index inside, whose ids are those of the map."""
        return self._index

    @property
    def d(self) -> int:
        """Dimension of the vectors."""
        return self.index.d

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added."""
        return self.index.is_trained

    @is_trained.setter
    def is_trained(self, value: bool) -> None:
        pass

    @property
    def module(self) -> Any:
        """The index of this library that holds the vectors."""
        return self.index.module

    @property
    def plain(self) -> IndexBase:
        """The index of this library that holds the vectors, without transforms."""
        return self.index.plain

    @property
    def id_map(self) -> Vector:
        """The ids (N,) int64 of all vectors, to read: of a flat index in the order in which they were added."""
        return Vector(self.ids().cpu().numpy())

    def add(self, x: Any, numeric_type: int = 0) -> None:
        """RuntimeError, as in faiss: use `add_with_ids`."""
        raise RuntimeError("add does not make sense with IndexIDMap, use add_with_ids")

    def fit(self, x: Tensor) -> None:
        """Train on x (n, d)."""
        self.index.fit(x)

    def put(self, x: Tensor, ids: Tensor | None) -> None:
        """Add x (n, d) under ids (n,)."""
        self.index.put(x, ids)

    def take(self, sel: IDSelector) -> int:
        """Remove the selected ids; how many rows that were."""
        return self.index.take(sel)

    def nearest(self, x: Tensor, k: int, params: Any) -> tuple[Tensor, Tensor]:
        """D and I (Q, k) for x (Q, d)."""
        return self.index.nearest(x, k, params)

    def nearest_vectors(self, x: Tensor, k: int, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`nearest`, and the vectors found (Q, k, d)."""
        return self.index.nearest_vectors(x, k, params)

    def within(self, x: Tensor, radius: float, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """lims (Q + 1,), D and I (n,) for x (Q, d)."""
        return self.index.within(x, radius, params)

    def vectors(self, ids: Tensor) -> Tensor:
        """RuntimeError, as in faiss: use `IndexIDMap2`."""
        raise RuntimeError("reconstruct is not implemented for IndexIDMap, use IndexIDMap2")

    def join(self, other: Any, add_id: int) -> None:
        """`merge_from` of an index of the same class."""
        self.index.join(other.index, add_id)


class IndexIDMap2(IndexIDMap):
    """`IndexIDMap` whose vectors can be read by id.

    >>> import numpy
    >>> from torch_ivf_module.faiss_compat import IndexFlat
    >>> index = IndexIDMap2(IndexFlat(2))
    >>> index.add_with_ids(numpy.eye(2), numpy.array([10, 11]))
    >>> index.reconstruct(11)
    array([0., 1.], dtype=float32)
    """

    def vectors(self, ids: Tensor) -> Tensor:
        """The vectors (n, d) of ids (n,)."""
        return self.index.vectors(ids)
