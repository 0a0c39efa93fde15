"""Which process holds what.

W processes, L lists, N vectors in all, n of them on one process. A *position* is the place of a row in the whole index
as one process would hold it: list after list, and within a list process after process.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

NOBODY = -1  # the owner of a list that has no vectors


def positions(sizes: Tensor, rank: int) -> Tensor:
    """Where the rows (n,) of a process stand; `sizes` (W, L) are the rows that each process has in each list.

    >>> positions(torch.tensor([[1, 2], [1, 0]]), 0)
    tensor([0, 2, 3])
    """
    mine = sizes[rank]
    first = before(sizes.sum(0)) + sizes[:rank].sum(0)
    rows = torch.arange(int(mine.sum()), device=sizes.device)
    return rows + torch.repeat_interleave(first - before(mine), mine)


def before(sizes: Tensor) -> Tensor:
    """The sum of the entries in front of each."""
    return sizes.cumsum(0) - sizes


def block(total: int, size: int) -> int:
    """Rows of each process where `total` rows are cut into one run for each, as torch.chunk and DTensor cut them."""
    return max(1, -(-total // size))


def by_size(sizes: Tensor, owners: Tensor, size: int) -> Tensor:
    """Owners (L,) of lists that hold `sizes` (L,) rows: those in `owners` stay, the others go largest first to
    whoever has least.

    >>> by_size(torch.tensor([5, 0, 3, 4]), torch.full((4,), NOBODY), 2)
    tensor([ 0, -1,  1,  1])
    """
    sizes, owners = sizes.cpu(), owners.clone()
    held = torch.bincount(owners[owners >= 0], weights=sizes[owners >= 0].double(), minlength=size).long()
    loads = [(load, rank) for rank, load in enumerate(held.tolist())]
    heapq.heapify(loads)
    open_lists = torch.nonzero((owners < 0) & (sizes > 0))[:, 0]
    largest_first = open_lists[torch.sort(sizes[open_lists], descending=True, stable=True).indices]
    for number, rows in zip(largest_first.tolist(), sizes[largest_first].tolist(), strict=True):
        load, rank = heapq.heappop(loads)
        owners[number] = rank
        heapq.heappush(loads, (load + rows, rank))
    return owners
