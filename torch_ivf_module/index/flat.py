"""Exhaustive search: a flat index is one inverted list that every query visits."""

from __future__ import annotations

from typing import Any

from ..functional import metric as metrics
from ..functional.probe import Coarse, coarse_of
from .base import IndexBase
from .torch_ivf_compat import TorchIvfFlatModes


class IndexFlat(TorchIvfFlatModes, IndexBase):
    """Exact search over all vectors, by metric "l2", "ip" or "cosine".

    Parameters
    ----------
    d : dimension of the vectors.
    metric : "l2" (squared), "ip" or "cosine".
    k : results that `forward` returns.
    search_mode, max_bytes : see the properties.
    device, dtype : where and in which dtype (float32, float16, bfloat16) vectors are stored.

    >>> import torch
    >>> index = IndexFlat(4)
    >>> index.add(torch.eye(4))
    >>> index.search(torch.eye(4)[:1], 1)[1]
    tensor([[0]])
    """

    _flat = True

    def __init__(self, d: int, metric: str = "l2", **settings: Any) -> None:
        super().__init__(d, metric=metric, **settings)

    def _coarse(self) -> Coarse:
        """One list whose centroid is the origin of the vectors."""
        packed = self._raw("packed_embeddings")
        origin = metrics.origin_of(packed, self.metric)
        return coarse_of(origin[None], self.metric, origin)


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
