"""The inverted-file index with uncompressed vectors."""

from __future__ import annotations

from typing import Any

import torch

from .ivf import IndexIVF
from .row_format import FloatRows


class IndexIVFFlat(IndexIVF):
    """Inverted file: each vector is in the list of its nearest centroid, and a query reads the `nprobe` nearest lists.

    Parameters
    ----------
    d : dimension of the vectors.
    nlist : number of lists; about 4 * sqrt(N) is usual.
    nprobe : lists that a query reads, min(8, nlist) by default; with more lists recall is higher.
    metric : "l2" (squared), "ip" or "cosine".
    max_codes : the maximum of rows that a query reads, None for no limit; see `SearchParams`.
    list_ordering : the order of the rows in the buffers that will be loaded; see `rebuild_lists`.
    auto_rebalance : the imbalance factor above which changes call `rebalance`, None for never; see the property.
    k : results that `forward` returns.
    search_mode, max_bytes, codes : see the properties.
    device, dtype : of the stored vectors; the dtype is float32, float16 or bfloat16.

    >>> import torch
    >>> x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    >>> index = IndexIVFFlat(16, nlist=8, nprobe=2)
    >>> index.train(x).add(x)
    >>> index.search(x[:2], 1)[1].flatten()
    tensor([0, 1])
    """

    def __init__(
        self,
        d: int,
        nlist: int = 512,
        nprobe: int | None = None,
        metric: str = "l2",
        *,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(FloatRows(d, dtype or torch.float32), nlist, nprobe, metric, **settings)
