"""Indexes whose vectors are stored as codes of 8 or 4 bits only."""

from __future__ import annotations

from typing import Any

import torch

from .base import IndexBase
from .ivf import IndexIVF
from .row_format import CodeRows


class IndexScalarQuantizer(IndexBase):
    """Exhaustive search over vectors that are stored as codes; a quarter or an eighth of the memory of `IndexFlat`.

    Distances are to the decoded vectors, which `reconstruct` returns. Each vector has its own range: its smallest entry
    has code 0, and its largest entry the highest code. So a decoded entry differs from the original by at most 1/510
    (8 bits) or 1/30 (4 bits) of the range of its vector, plus rounding. No training is needed: `train` only checks its
    argument. faiss's class of this name has a range for each dimension, and must be trained.

    Parameters
    ----------
    d : dimension of the vectors.
    bits : 8 or 4. A vector takes ``d * bits / 8 + 8`` bytes.
    metric : "l2" (squared), "ip" or "cosine".
    k : results that `forward` returns.
    search_mode, max_bytes, codes : see the properties.
    device : device of the codes. Casts such as ``half()`` do not change codes. `dtype` is that of decoded vectors,
        float32.

    >>> import torch
    >>> index = IndexScalarQuantizer(4, bits=4)
    >>> index.add(torch.tensor([[0.0, 1.0, 2.0, 15.0], [-1.0, 0.0, 0.0, 0.0]]))
    >>> index.search(torch.zeros(1, 4), 1)
    (tensor([[1.]]), tensor([[1]]))
    >>> index.reconstruct(0)
    tensor([ 0.,  1.,  2., 15.])
    """

    _flat = True

    def __init__(
        self, d: int, bits: int = 8, metric: str = "l2", *, dtype: torch.dtype | None = None, **settings: Any
    ) -> None:
        super().__init__(_codes(d, bits, dtype), metric=metric, **settings)


class IndexIVFScalarQuantizer(IndexIVF):
    """Inverted file over vectors that are stored as codes, as in `IndexScalarQuantizer`.

    Codes do not depend on lists or centroids, so training again, merging and sharding do not change them.

    Parameters
    ----------
    d : dimension of the vectors.
    nlist, nprobe, metric, max_codes, list_ordering, auto_rebalance : see `IndexIVFFlat`.
    bits, k, search_mode, max_bytes, codes, device : see `IndexScalarQuantizer`.

    >>> import torch
    >>> x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    >>> index = IndexIVFScalarQuantizer(16, nlist=8, nprobe=2)
    >>> index.train(x).add(x)
    >>> index.search(x[:2], 1)[1].flatten()
    tensor([0, 1])
    >>> (index.reconstruct(0) - x[0]).abs().max() <= 0.51 * (x[0].max() - x[0].min()) / 255
    tensor(True)
    """

    def __init__(
        self,
        d: int,
        nlist: int = 512,
        nprobe: int | None = None,
        metric: str = "l2",
        *,
        bits: int = 8,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(_codes(d, bits, dtype), nlist, nprobe, metric, **settings)


def _codes(d: int, bits: int, dtype: torch.dtype | None) -> CodeRows:
    if dtype not in (None, torch.float32):
        raise ValueError(f"dtype must be None or torch.float32, in which codes are decoded, got {dtype}")
    return CodeRows(d, bits)
