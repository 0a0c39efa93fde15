"""Exhaustive search. The ids of a flat index are the positions of its vectors, so they move up after a removal.

N vectors.
"""

from __future__ import annotations

from typing import Any

import torch

from ..index import IndexFlat as FlatModule
from .arrays import faiss_errors
from .base import Index
from .constants import METRIC_INNER_PRODUCT, METRIC_L2, metric_name
from .vectors import Vector


class IndexFlat(Index):
    """Exact search over all vectors.

    >>> import numpy
    >>> index = IndexFlat(2)
    >>> index.add(numpy.eye(2))
    >>> index.search(numpy.array([[0.0, 0.9]]), 1)[1]
    array([[1]])
    """

    takes_ids = False

    def __init__(self, d: int, metric: int = METRIC_L2) -> None:
        super().__init__(FlatModule(d, metric_name(metric), device="cpu"))

    @property
    def code_size(self) -> int:
        """Bytes of a stored vector."""
        return self.sa_code_size()

    @property
    def codes(self) -> Vector:
        """The bytes of all vectors (N * code_size,) uint8, to read."""
        packed = self.plain.store.packed_lists()[0]
        return Vector(packed.cpu().contiguous().view(torch.uint8).numpy().reshape(-1))

    def get_xb(self) -> Any:
        """All vectors, flattened: (N * d,) float32, a copy."""
        return self.plain.store.packed_lists()[0].float().cpu().numpy().reshape(-1).copy()

    def remove_ids(self, x: Any) -> int:
        """Remove the ids of an array or a selector and number the others anew; how many rows that were."""
        removed = super().remove_ids(x)
        if removed:
            store = self.plain.store
            with store.lock:
                _, offsets, _ = store.packed_lists()
                numbers = torch.arange(self.ntotal, device=self.device)
                number = torch.tensor(self.ntotal, device=self.device)
                store.put(list_offsets=offsets, list_ids=numbers, next_id=number)
        return removed

    def merge_from(self, otherIndex: Index, add_id: int = 0) -> None:
        """Move all vectors of another flat index behind those of this one."""
        if add_id:
            raise RuntimeError(f"a flat index numbers its vectors itself: add_id must be 0, got {add_id}")
        self.check_compatible_for_merge(otherIndex)
        with faiss_errors():
            self.join(otherIndex, self.ntotal)

    def check_compatible_for_merge(self, otherIndex: Index) -> None:
        """RuntimeError unless the other is a flat index of this one's dimension and metric."""
        fits = isinstance(otherIndex, IndexFlat) and otherIndex.sa_code_size() == self.sa_code_size()
        if not fits or (otherIndex.d, otherIndex.metric_type) != (self.d, self.metric_type):
            raise RuntimeError(f"{otherIndex!r} cannot be merged into {self!r}")


class IndexFlatL2(IndexFlat):
    """Exact search by squared L2 distance."""

    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_L2)


class IndexFlatIP(IndexFlat):
    """Exact search by inner product."""

    def __init__(self, d: int) -> None:
        super().__init__(d, METRIC_INNER_PRODUCT)
