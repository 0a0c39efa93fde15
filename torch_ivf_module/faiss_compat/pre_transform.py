"""Transforms in front of an index.

Q queries, d dim, k results, n rows of a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..index import IndexPreTransform as PreTransformModule
from ..index.base import IndexBase
from .base import Index
from .selectors import IDSelector
from .transforms import VectorTransform


class Chain(list[VectorTransform]):
    """Transforms in order; `size` and `at` as a vector of faiss has them."""

    def size(self) -> int:
        """The number of transforms."""
        return len(self)

    def at(self, number: int) -> VectorTransform:
        """A transform by its number."""
        return self[number]


class IndexPreTransform(Index):
    """Transforms vectors and queries, and adds them to or searches them in `index`.

    ``IndexPreTransform(index)``, or ``IndexPreTransform(transform, index)``.

    >>> import numpy
    >>> from torch_ivf_module.faiss_compat import IndexFlat, PCAMatrix
    >>> x = numpy.random.RandomState(0).rand(100, 8)
    >>> index = IndexPreTransform(PCAMatrix(8, 4), IndexFlat(4))
    >>> index.train(x)
    >>> index.add(x)
    >>> index.search(x[:2], 1)[1].tolist()
    [[0], [1]]
    """

    def __init__(self, *parts: Any) -> None:
        *transforms, self._index = parts
        self._chain = Chain()
        for transform in transforms:
            self.prepend_transform(transform)

    @property
    def index(self) -> Index:
        """The index behind the transforms."""
        return self._index

    @property
    def chain(self) -> Chain:
        """The transforms."""
        return self._chain

    def prepend_transform(self, ltrans: VectorTransform) -> None:
        """Put a transform in front of the others."""
        if ltrans.d_out != self.d:
            raise RuntimeError(f"the transform must give vectors of dimension {self.d}, got {ltrans.d_out}")
        self._chain.insert(0, ltrans)

    @property
    def d(self) -> int:
        """Dimension of the vectors before the transforms."""
        return self.chain[0].d_in if self.chain else self.index.d

    @property
    def is_trained(self) -> bool:
        """Whether the transforms and the index are trained."""
        return self.index.is_trained and all(transform.is_trained for transform in self.chain)

    @is_trained.setter
    def is_trained(self, value: bool) -> None:
        pass

    @property
    def takes_ids(self) -> bool:  # type: ignore[override]
        """Whether `add_with_ids` works."""
        return self.index.takes_ids

    @property
    def module(self) -> Any:
        """Transforms and index as one index of this library. RuntimeError before training."""
        if not all(transform.is_trained for transform in self.chain):
            raise RuntimeError("the transforms in front of the index are not trained: call train(x) first")
        steps = nn.Sequential(*(transform.module for transform in self.chain)).requires_grad_(False)
        return PreTransformModule(self.d, steps.to(self.device), self.plain)

    @property
    def plain(self) -> IndexBase:
        """The index of this library that holds the vectors, without transforms."""
        return self.index.plain

    def apply_chain(self, x: Tensor) -> Tensor:
        """x (n, d) transformed, (n, index.d)."""
        for transform in self.chain:
            x = transform.apply(x)
        return x

    def reverse_chain(self, x: Tensor) -> Tensor:
        """x (n, index.d) back to (n, d), as far as transforms can be undone."""
        for transform in reversed(self.chain):
            x = transform.reverse_transform(x)
        return x

    def fit(self, x: Tensor) -> None:
        """Train each transform that is not trained on x (n, d), transformed by those before it, and then the index."""
        for transform in self.chain:
            if not transform.is_trained:
                transform.train(x)
            x = transform.apply(x)
        self.index.fit(x)

    def put(self, x: Tensor, ids: Tensor | None) -> None:
        """Add x (n, d) under ids (n,), or numbered from `ntotal` on."""
        self.index.put(self.apply_chain(x), ids)

    def take(self, sel: IDSelector) -> int:
        """Remove the selected ids; how many rows that were."""
        return self.index.take(sel)

    def remove_ids(self, x: Any) -> int:
        """Remove ids as the index behind the transforms does; how many rows that were."""
        return self.index.remove_ids(x)

    def nearest(self, x: Tensor, k: int, params: Any) -> tuple[Tensor, Tensor]:
        """D and I (Q, k) for x (Q, d)."""
        return self.index.nearest(self.apply_chain(x), k, _inner(params))

    def nearest_vectors(self, x: Tensor, k: int, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`nearest`, and the vectors found (Q, k, d)."""
        D, I, R = self.index.nearest_vectors(self.apply_chain(x), k, _inner(params))
        return D, I, self.reverse_chain(R.flatten(0, 1)).view(*I.shape, self.d)

    def within(self, x: Tensor, radius: float, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """lims (Q + 1,), D and I (n,) for x (Q, d)."""
        return self.index.within(self.apply_chain(x), radius, _inner(params))

    def vectors(self, ids: Tensor) -> Tensor:
        """The vectors (n, d) of ids (n,)."""
        return self.reverse_chain(self.index.vectors(ids).float())

    def merge_from(self, otherIndex: Index, add_id: int = 0) -> None:
        """Move all vectors of an index with the same transforms into this one."""
        self.check_compatible_for_merge(otherIndex)
        self.index.merge_from(otherIndex.index, add_id)  # type: ignore[attr-defined]

    def check_compatible_for_merge(self, otherIndex: Index) -> None:
        """RuntimeError unless the other index has transforms with the same parameters, and one that fits behind."""
        if not isinstance(otherIndex, IndexPreTransform) or self.chain.size() != otherIndex.chain.size():
            raise RuntimeError(f"{otherIndex!r} cannot be merged into {self!r}")
        for mine, theirs in zip(self.chain, otherIndex.chain, strict=True):
            parts = [list(transform.module.parameters()) for transform in (mine, theirs)]
            if len(parts[0]) != len(parts[1]) or not all(map(torch.equal, *parts)):
                raise RuntimeError("the transforms of the two indexes differ")
        self.index.check_compatible_for_merge(otherIndex.index)


def _inner(params: Any) -> Any:
    """The settings of a search for the index behind the transforms."""
    return getattr(params, "index_params", params)
