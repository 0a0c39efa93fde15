"""Which process stores which rows and lists.

W processes, L lists, N vectors in all, n of them on one process. A *position* is the place of a row in the
global index, the index of all rows that one process would have: ordered by list, and within a list by process.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

NO_OWNER = -1  # the owner of a list that has no vectors


def positions(sizes: Tensor, rank: int) -> Tensor:
    """Positions (n,) of the rows of process `rank`; `sizes` (W, L) are the rows that each process has in each list.

    >>> positions(torch.tensor([[1, 2], [1, 0]]), 0)
    tensor([0, 2, 3])
    """
    mine = sizes[rank]
    first = exclusive_sum(sizes.sum(0)) + sizes[:rank].sum(0)
    rows = torch.arange(int(mine.sum()), device=sizes.device)
    return rows + torch.repeat_interleave(first - exclusive_sum(mine), mine)


def exclusive_sum(sizes: Tensor) -> Tensor:
    """For each entry the sum of the entries before it."""
    return sizes.cumsum(0) - sizes


def rows_per_process(total: int, size: int) -> int:
    """Rows of each process if `total` rows are divided into consecutive chunks, as torch.chunk and DTensor do."""
    return max(1, -(-total // size))


def assign_lists(sizes: Tensor, owners: Tensor, size: int) -> Tensor:
    """Owners (L,) of lists of `sizes` (L,) rows. Lists that have an owner in `owners` (L,) keep it; the others, the
    largest first, are assigned to the process with the fewest rows.

    >>> assign_lists(torch.tensor([5, 0, 3, 4]), torch.full((4,), NO_OWNER), 2)
    tensor([ 0, -1,  1,  1])
    """
    sizes, owners = sizes.cpu(), owners.clone()
    rows_of = torch.bincount(owners[owners >= 0], weights=sizes[owners >= 0].double(), minlength=size).long()
    loads = [(load, rank) for rank, load in enumerate(rows_of.tolist())]
    heapq.heapify(loads)
    open_lists = torch.nonzero((owners < 0) & (sizes > 0))[:, 0]
    largest_first = open_lists[torch.sort(sizes[open_lists], descending=True, stable=True).indices]
    for number, rows in zip(largest_first.tolist(), sizes[largest_first].tolist(), strict=True):
        load, rank = heapq.heappop(loads)
        owners[number] = rank
        heapq.heappush(loads, (load + rows, rank))
    return owners
