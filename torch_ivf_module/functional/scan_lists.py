"""The list-major scan, "csr": every visited list is read once for all queries that visit it.

Q queries, L lists, P probes, d dim, k results, W blocks a query.

The k best rows of a query lie in its k best groups of rows, and those in its k best blocks. So two small selections
among the maxima leave k * GROUP rows a query, which the query-major functions score again: both scans end in the
same candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .lists import InvertedLists, ranges_to_positions
from .maxima import BLOCK, GROUP, SPAN, Maxima, Tasks, block_maxima, tasks_of
from .scan_queries import best_rows
from .select import NEVER, best_positions

_SELECTED = 1 << 17  # maxima selected among at a time: 5 MiB of temporaries, more cost page faults


def scan_lists(x: Tensor, lists: InvertedLists, probed: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The k best rows of the probed lists, as scan_queries gives them. `width` plays no part."""
    tasks = tasks_of(x, lists, probed)
    maxima = block_maxima(x, lists, tasks)
    blocks = int(tasks.blocks[probed].sum(1).max())
    step = max(1, _SELECTED // max(1, blocks, k * BLOCK))
    parts = []
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        rows = _survivors(lists, probed[part], tasks, tasks.rank[part], maxima, k, blocks)
        parts.append(best_rows(x[part], lists, rows, k))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _survivors(
    lists: InvertedLists, probed: Tensor, tasks: Tasks, rank: Tensor, maxima: Maxima, k: int, width: int
) -> Tensor:
    """The rows (Q, k * GROUP) of each query's k best groups, negative for padding; `width` bounds its blocks."""
    blocks = tasks.blocks[probed]
    address = tasks.before[probed] + rank * blocks
    if width == 0:
        return probed.new_empty(probed.shape[0], 0)
    position, probe = ranges_to_positions(address, blocks, width)
    coarse = maxima.coarse.take(position.clamp(min=0)).masked_fill_(position < 0, NEVER)
    best, chosen = best_positions(coarse, k)
    # From the chosen blocks to their groups: those of a list by matrix product lie as far apart as it has tasks.
    lost = best == NEVER
    probe = probe.gather(1, chosen).masked_fill_(lost, 0)
    number, task = probed.gather(1, probe), rank.gather(1, probe)
    within = (position.gather(1, chosen) - address.gather(1, probe)).masked_fill_(lost, 0)
    apart = torch.where(tasks.sampled, 1, tasks.visits)[number]
    place = torch.where(tasks.sampled, tasks.blocks * BLOCK, 1)[number] * task
    place += (tasks.before[number] + within * apart) * BLOCK
    step = torch.arange(BLOCK, device=place.device)
    fine = maxima.fine.take((place[:, :, None] + apart[:, :, None] * step).masked_fill_(lost[:, :, None], 0))
    _, group = best_positions(fine.masked_fill_(lost[:, :, None], NEVER).flatten(1), k)
    # From the chosen groups to their rows.
    block = torch.div(group, BLOCK, rounding_mode="floor")
    number, within = number.gather(1, block), within.gather(1, block)
    row = lists.offsets[number] + within * SPAN + group % BLOCK * GROUP
    end = (lists.offsets[number] + lists.sizes[number]).masked_fill_(lost.gather(1, block), 0)
    rows = row[:, :, None] + torch.arange(GROUP, device=row.device)
    return rows.masked_fill_(rows >= end[:, :, None], -1).flatten(1)
