"""PyG's `KNNIndex` family as modules (extra `torch-geometric`).

Q queries, n vectors, d dim, k results.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..factory import index_factory as make_index
from ..functional.scan_above import group_by_query, hits_by_query
from ..index.base import IndexBase
from ..params import SearchParams

__all__ = ["KNNIndex", "KNNOutput", "L2KNNIndex", "MIPSKNNIndex"]


class KNNOutput(NamedTuple):
    """Scores and numbers (Q, k) of the points that were found."""

    score: Tensor
    index: Tensor  # type: ignore[assignment]  # the name in PyG hides a method of tuples


class KNNIndex(nn.Module):
    """Search for the k nearest points, with the methods of `torch_geometric.nn.KNNIndex`.

    Its `index` is a submodule, on the device of the first points. Scores are differentiable with respect to the
    queries. With L2 they are squared distances.

    Parameters
    ----------
    index_factory : a string for `torch_ivf_module.index_factory`, such as "Flat", "IVF64,Flat" or "IVF64,SQ8", without
        L2norm; None means "Flat".
    emb : points to add, (n, d). The index is trained on the first points that are added.
    reserve : has no effect.

    >>> index = KNNIndex("Flat", emb=torch.tensor([[0.0], [1.0], [3.0]]))
    >>> index.search(torch.tensor([[0.9]]), k=2).index
    tensor([[1, 0]])
    """

    index: IndexBase | None
    metric = "l2"

    def __init__(
        self, index_factory: str | None = None, emb: Tensor | None = None, reserve: int | None = None
    ) -> None:
        super().__init__()
        self.index_factory = index_factory or "Flat"
        self.index = None
        if emb is not None:
            self.add(emb)

    @property
    def numel(self) -> int:
        """The number of points."""
        return 0 if self.index is None else self.index.ntotal

    def add(self, emb: Tensor) -> None:
        """Add points (n, d)."""
        _require_matrix(emb)
        if self.index is None:
            index = make_index(emb.shape[1], self.index_factory, self.metric)
            if not isinstance(index, IndexBase):
                raise ValueError(f"index_factory must have no L2norm, got {self.index_factory!r}: normalise the points")
            index.to(emb.device).train(emb.detach())
            self.index = index
        self.index.add(emb.detach())

    def search(self, emb: Tensor, k: int, exclude_links: Tensor | None = None) -> KNNOutput:
        """The k nearest of emb (Q, d), or all if there are fewer points.

        exclude_links (2, n) int64 are pairs of a row of `emb` and the number of a point that it must not find. If fewer
        than k points are left, the remaining scores are -inf and the remaining numbers -1.
        """
        index = self._filled()
        _require_matrix(emb)
        exclude = None if exclude_links is None else _by_row(exclude_links.to(emb.device), len(emb))
        D, I = index.search(emb, min(k, self.numel), params=SearchParams(exclude=exclude))
        return KNNOutput(D.masked_fill(I < 0, -torch.inf), I)

    forward = search

    def get_emb(self) -> Tensor:
        """The points (n, d)."""
        return self._filled().reconstruct_n(0, self.numel)

    def _filled(self) -> IndexBase:
        if self.index is None:
            raise RuntimeError(f"{type(self).__name__} has no points: call add(emb) first")
        return self.index


class L2KNNIndex(KNNIndex):
    """Exact search by squared L2 distance.

    >>> L2KNNIndex(torch.tensor([[0.0], [2.0]])).search(torch.tensor([[3.0]]), k=1)
    KNNOutput(score=tensor([[1.]]), index=tensor([[1]]))
    """

    def __init__(self, emb: Tensor | None = None) -> None:
        super().__init__(emb=emb)


class MIPSKNNIndex(KNNIndex):
    """Exact search by inner product.

    >>> MIPSKNNIndex(torch.tensor([[1.0], [2.0]])).search(torch.tensor([[3.0]]), k=1)
    KNNOutput(score=tensor([[6.]]), index=tensor([[1]]))
    """

    metric = "ip"

    def __init__(self, emb: Tensor | None = None) -> None:
        super().__init__(emb=emb)


def _by_row(links: Tensor, rows: int) -> Tensor:
    """The points that links (2, n) have for each of so many rows, (rows, m); -1 is padding."""
    lims, order = group_by_query(links[0], rows)
    return hits_by_query(lims, links[1][order])


def _require_matrix(emb: Tensor) -> None:
    if emb.dim() != 2:
        raise ValueError(f"emb must have two dimensions, got shape {tuple(emb.shape)}")
