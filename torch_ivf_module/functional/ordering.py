"""The order of rows within a list that puts the likeliest results first.

L lists, N vectors, d dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import metric as metrics
from .chunking import in_chunks
from .lists import lengths, narrow
from .row_codes import as_float

_ROWS = 1 << 14  # vectors at a time: with their centroids 16 MiB of temporaries at d = 128


def order_within_lists(packed: Tensor, offsets: Tensor, ids: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """The rows (N,) sorted by list, and within a list by falling `metric.centrality`.

    Rows of one list that share an id stay in their order, so that the last of them is still the one added last.
    """
    nlist = centroids.shape[0]
    assigned = torch.repeat_interleave(torch.arange(nlist, device=packed.device), lengths(offsets))
    centrality = in_chunks(
        lambda rows, lists: metrics.centrality(as_float(rows, centroids.shape[1]), centroids[lists], metric),
        _ROWS,
        packed,
        assigned,
    )
    order = torch.sort(centrality, descending=True, stable=True).indices
    order = order[torch.sort(narrow(assigned[order], nlist), stable=True).indices]
    # Put the rows of one id, wherever they now are, into their former order.
    by_id = torch.sort(ids, stable=True).indices
    order[torch.sort(ids[order], stable=True).indices] = by_id
    return order
