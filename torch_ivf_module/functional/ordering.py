"""The order of rows within a list, such that the first rows of it are the likeliest results.

L lists, N vectors, d dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import metric as metrics
from .chunking import in_chunks
from .lists import lengths, narrow

_ROWS = 1 << 14  # vectors at a time: with their centroids 16 MiB of temporaries at d = 128


def order_within_lists(packed: Tensor, offsets: Tensor, ids: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """The rows (N,) in the order they should lie in: by list, the best first by `metric.centrality`.

    Rows of one list that share an id keep their order among themselves, so that the last stays the last added.
    """
    nlist = centroids.shape[0]
    number = torch.repeat_interleave(torch.arange(nlist, device=packed.device), lengths(offsets))
    worth = in_chunks(
        lambda rows, home: metrics.centrality(rows.float(), centroids[home], metric), _ROWS, packed, number
    )
    order = torch.sort(worth, descending=True, stable=True).indices
    order = order[torch.sort(narrow(number[order], nlist), stable=True).indices]
    by_id = torch.sort(ids, stable=True).indices
    order[torch.sort(ids[order], stable=True).indices] = by_id
    return order
