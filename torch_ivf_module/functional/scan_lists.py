"""The list-major scan, "csr": every visited list is read once for all queries that visit it.

Q queries, L lists, P probes, d dim, k results, B blocks, W blocks a query.

The k best rows of a query lie in its k best groups of rows, and those in its k best blocks. So two small selections
among the maxima leave k * GROUP rows a query, which the query-major functions score again: both scans end in the
same candidates.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .lists import InvertedLists, ranges_to_positions
from .maxima import BLOCK, GROUP, Tasks, blocks_of, group_maxima, strands, tasks_of
from .parts import joined
from .scan_queries import best_rows
from .scratch import Scratch
from .select import NEVER, best_positions

_SELECTED = 1 << 17  # maxima selected among at a time: 5 MiB of temporaries, more cost page faults
BLOCK_BYTES = 4 * (BLOCK + 1)  # of its maxima
_COARSE_PAYS = 2  # times as many blocks as are chosen: with fewer, looking into all of them is as good


def scan_lists(
    x: Tensor, lists: InvertedLists, probed: Tensor, k: int, width: int, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """The k best rows of the probed lists, as scan_queries gives them, in about `max_bytes` of scratch.

    `width` plays no part.
    """
    memory = Scratch(x.device)
    found = []
    for part, some in _pieces(x, lists, probed, k, max_bytes):
        tasks = tasks_of(part, lists, some)
        found += _select(part, lists, some, tasks, group_maxima(part, lists, tasks, memory), k)
    columns = max(rows.shape[1] for _, rows in found)
    return joined([_pad(scores, rows, columns) for scores, rows in found])


def _pieces(x: Tensor, lists: InvertedLists, probed: Tensor, k: int, max_bytes: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Queries cut where their scratch reaches `max_bytes`; evenly, for a product of few tasks is a slow one."""
    blocks = blocks_of(lists.sizes)[probed].sum(1)
    # Of each query its maxima, its tasks and its candidates.
    needed = (blocks * BLOCK_BYTES + 64 * probed.shape[1] + 32 * k).cumsum(0)
    pieces = -(-int(needed[-1]) // max(1, max_bytes))
    if pieces == 1:
        return [(x, probed)]
    piece = torch.div(needed * pieces - 1, needed[-1], rounding_mode="floor")
    sizes = [size for size in torch.bincount(piece).tolist() if size]
    return zip(x.split(sizes), probed.split(sizes), strict=True)


def _pad(scores: Tensor, rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    more = (0, columns - rows.shape[1])
    if not more[1]:
        return scores, rows
    return torch.nn.functional.pad(scores, more, value=NEVER), torch.nn.functional.pad(rows, more, value=-1)


def _select(
    x: Tensor, lists: InvertedLists, probed: Tensor, tasks: Tasks, maxima: tuple[Tensor, Tensor], k: int
) -> list[tuple[Tensor, Tensor]]:
    """The k best rows of each query, some queries at a time."""
    width = int(tasks.blocks[probed].sum(1).max())
    step = selected_at_a_time(width, k)
    found = []
    for query, some, rank in zip(x.split(step), probed.split(step), tasks.rank.split(step), strict=True):
        rows = survivors(lists, some, tasks.before, rank, maxima, k, width)
        found.append(best_rows(query, lists, rows, k))
    return found


def selected_at_a_time(width: int, k: int) -> int:
    """Queries of `width` blocks each whose maxima are selected among at a time."""
    return max(1, _SELECTED // max(1, width, k * BLOCK))


def survivors(
    lists: InvertedLists,
    probed: Tensor,
    before: Tensor,
    rank: Tensor,
    maxima: tuple[Tensor, Tensor],
    k: int,
    width: int,
) -> Tensor:
    """The rows (Q, k * GROUP) of each query's k best groups, negative for padding; `width` bounds its blocks.

    before (L + 1,) and rank (Q, P) are those of `Tasks`.
    """
    blocks = blocks_of(lists.sizes)[probed]
    address = before[probed] + rank * blocks
    if width == 0:
        return probed.new_empty(probed.shape[0], 0)
    position, probe = ranges_to_positions(address, blocks, width)
    coarse, fine = maxima
    if width > _COARSE_PAYS * k:
        best = coarse.take(position.clamp(min=0)).masked_fill_(position < 0, NEVER)
        chosen = best_positions(best, k)[1]
        position, probe = position.gather(1, chosen), probe.gather(1, chosen)
    lost = position < 0
    fine = fine.index_select(0, position.clamp(min=0).flatten()).view(*position.shape, BLOCK)
    best, chosen = best_positions(fine.masked_fill_(lost[:, :, None], NEVER).flatten(1), k)
    # From the chosen groups to their rows.
    block = torch.div(chosen, BLOCK, rounding_mode="floor")
    probe = probe.gather(1, block).clamp_(max=probed.shape[1] - 1)
    first = (position.gather(1, block) - address.gather(1, probe)) * BLOCK
    at = strands(lists, probed.gather(1, probe), first + chosen - block * BLOCK)
    step = torch.arange(GROUP, device=position.device) * at.apart[:, :, None]
    held = at.held.masked_fill_(best == NEVER, 0)
    rows = at.first[:, :, None] + step
    return rows.masked_fill_(at.along[:, :, None] + step >= held[:, :, None], -1).flatten(1)
