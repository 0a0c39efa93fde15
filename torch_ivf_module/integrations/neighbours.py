"""A search that leaves out some results of each query, which the adaptors of several libraries need.

Q queries, d dim, k results, n links.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..index.base import IndexBase

__all__ = ["search_without"]


def search_without(index: IndexBase, x: Tensor, k: int, links: Tensor | None) -> tuple[Tensor, Tensor]:
    """D and I (Q, k) of the k nearest of x (Q, d), as `search` gives them, without the pairs in `links`.

    links (2, n) int64: the rows of x, and the ids that these must not find; None for none. It searches for
    k results, and as many more as any query has links.

    >>> from torch_ivf_module import IndexFlatL2
    >>> index = IndexFlatL2(1)
    >>> index.add(torch.tensor([[0.0], [1.0], [3.0]]))
    >>> search_without(index, torch.tensor([[0.0]]), 2, torch.tensor([[0], [1]]))
    (tensor([[0., 9.]]), tensor([[0, 2]]))
    """
    if links is None or links.shape[1] == 0:
        return index.search(x, k)
    rows, ids = links.to(x.device)
    D, I = index.search(x, k + int(torch.bincount(rows).max()))
    known, numbers = torch.unique(torch.cat([I.flatten(), ids]), return_inverse=True)  # so that one number is a pair
    found = torch.arange(len(x), device=x.device)[:, None] * len(known) + numbers[: I.numel()].view_as(I)
    dropped = torch.isin(found, rows * len(known) + numbers[I.numel() :])
    missing = torch.inf if index.metric == "l2" else -torch.inf
    D, I = D.masked_fill(dropped, missing), I.masked_fill(dropped, -1)
    order = dropped.byte().argsort(stable=True, dim=1)[:, :k]  # what is kept comes first, in its order
    return D.gather(1, order), I.gather(1, order)
