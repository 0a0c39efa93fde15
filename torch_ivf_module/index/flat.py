"""Exhaustive search: a flat index is one inverted list that every query visits."""

from __future__ import annotations

from typing import Any

import torch

from .base import IndexBase
from .row_format import FloatRows


class IndexFlat(IndexBase):
    """Exact search over all vectors, by metric "l2", "ip" or "cosine".

    Parameters
    ----------
    d : dimension of the vectors.
    metric : "l2" (squared), "ip" or "cosine".
    k : results that `forward` returns.
    search_mode, max_bytes, codes : see the properties.
    device, dtype : of the stored vectors; the dtype is float32, float16 or bfloat16.

    >>> import torch
    >>> index = IndexFlat(4)
    >>> index.add(torch.eye(4))
    >>> index.search(torch.eye(4)[:1], 1)[1]
    tensor([[0]])
    """

    _flat = True

    def __init__(self, d: int, metric: str = "l2", *, dtype: torch.dtype | None = None, **settings: Any) -> None:
        super().__init__(FloatRows(d, dtype or torch.float32), metric=metric, **settings)

    @property
    def auto_matrix_bytes_threshold(self) -> int:
        """The name of `max_bytes` in torch-ivf."""
        return self.max_bytes

    @auto_matrix_bytes_threshold.setter
    def auto_matrix_bytes_threshold(self, value: int) -> None:
        self.max_bytes = value


class IndexFlatL2(IndexFlat):
    """Exact search by squared L2 distance; see `IndexFlat` for the settings.

    >>> import torch
    >>> index = IndexFlatL2(2)
    >>> index.add(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    >>> index.search(torch.zeros(1, 2), 2)
    (tensor([[ 0., 25.]]), tensor([[0, 1]]))
    """

    def __init__(self, d: int, **settings: Any) -> None:
        super().__init__(d, "l2", **settings)


class IndexFlatIP(IndexFlat):
    """Exact search by inner product; see `IndexFlat` for the settings.

    >>> import torch
    >>> index = IndexFlatIP(2)
    >>> index.add(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    >>> index.search(torch.ones(1, 2), 2)
    (tensor([[2., 1.]]), tensor([[1, 0]]))
    """

    def __init__(self, d: int, **settings: Any) -> None:
        super().__init__(d, "ip", **settings)
