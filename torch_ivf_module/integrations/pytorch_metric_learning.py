"""pytorch-metric-learning's `knn_func` as a module: `IndexKNN` in place of its `FaissKNN` (extra
`pytorch-metric-learning`).

Q queries, n vectors, d dim, k results.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..index import IndexFlatL2
from ..index.base import IndexBase
from ..params import SearchParams

__all__ = ["IndexKNN"]

Self = TypeVar("Self", bound="IndexKNN")


class IndexKNN(nn.Module):
    """Nearest neighbours for `AccuracyCalculator`, `InferenceModel` and the testers of pytorch-metric-learning.

    It has the methods of `FaissKNN`. Its `index` is a submodule, on the device of the first vectors. Distances are
    differentiable with respect to the query.

    Parameters
    ----------
    reset_before : whether each call creates a new index for its reference.
    reset_after : whether each call deletes the index afterwards.
    index_init_fn : a function of the dimension d that returns an index, by default `IndexFlatL2`. An index with lists
        is trained on the first vectors.

    >>> knn = IndexKNN()
    >>> x = torch.tensor([[0.0], [1.0], [3.0]])
    >>> knn(x, 1, x, ref_includes_query=True)
    (tensor([[1.], [1.], [4.]]), tensor([[1], [0], [1]]))
    """

    index: IndexBase | None

    def __init__(
        self,
        reset_before: bool = True,
        reset_after: bool = True,
        index_init_fn: Callable[[int], IndexBase] | None = None,
    ) -> None:
        super().__init__()
        self.reset_before = reset_before
        self.reset_after = reset_after
        self.index_init_fn = index_init_fn or IndexFlatL2
        self.index = None

    def forward(
        self, query: Tensor, k: int, reference: Tensor | None = None, ref_includes_query: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Distances and positions (Q, k) in the reference of the k nearest of query (Q, d).

        reference (n, d) is added to the index first; None searches the current index. With `ref_includes_query`, row i
        of the query is row i of the reference, and is not returned as its own neighbour. Raises ValueError if there is
        no index.
        """
        if self.reset_before:
            self._make(query)
        if reference is not None:
            self.add(reference)
        if self.index is None:
            raise ValueError("there is no index: call train(embeddings) first, or set reset_before=True")
        own = torch.arange(len(query), device=query.device)[:, None] if ref_includes_query else None
        found = self.index.search(query, k, params=SearchParams(exclude=own))
        if self.reset_after:
            self.reset()
        return found

    def train(self: Self, mode: bool | Tensor = True) -> Self:
        """`train(embeddings)` indexes embeddings (n, d); `train(True)` and `train(False)` switch the mode."""
        if isinstance(mode, bool):
            return super().train(mode)
        self._make(mode)
        self.add(mode)
        return self

    def add(self, embeddings: Tensor) -> None:
        """Add embeddings (n, d); ValueError if there is no index."""
        if self.index is None:
            raise ValueError("there is no index: call train(embeddings) first, or set reset_before=True")
        embeddings = embeddings.detach().to(self.index.device)
        if not self.index.is_trained:
            self.index.train(embeddings)
        self.index.add(embeddings)

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Write the index to a file, which `load` and `torch_ivf_module.load` open."""
        if self.index is None:
            raise ValueError("there is no index to save: call train(embeddings) first")
        checkpoint.save(self.index, filename)

    def load(self, filename: str | os.PathLike[str]) -> None:
        """Replace the index by the one in a file."""
        found: Any = checkpoint.load(filename)
        self.index = found

    def reset(self) -> None:
        """Delete the index."""
        self.index = None

    def _make(self, x: Tensor) -> None:
        self.index = self.index_init_fn(x.shape[1]).to(x.device)
