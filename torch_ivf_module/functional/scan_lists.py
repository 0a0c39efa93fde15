"""The list-major scan, "csr": every visited list is read once for all queries that visit it.

Q queries, L lists, P probes, d dim, k results, B blocks, W blocks a query.

The k best rows of a query lie in its k best groups of rows, and those in its k best blocks. So two small selections
among the maxima leave k * GROUP rows a query, which the query-major functions score again: both scans end in the
same candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .block_maxima import BLOCK, GROUP, Tasks, blocks_of, group_maxima, strands, tasks_of
from .chunking import joined
from .lists import InvertedLists, prefixes, ranges_to_positions
from .scan_queries import best_rows
from .select import NEVER, best_positions
from .workspace import Workspace

_SELECTED = 1 << 17  # maxima selected among at a time: 5 MiB of temporaries, more cost page faults
BLOCK_BYTES = 4 * (BLOCK + 1)  # of its maxima
_VISITORS = 256  # queries that share the beginning of a list: fewer read less, in more and smaller products
_COARSE_PAYS = 2  # times as many blocks as are chosen: with fewer, looking into all of them is as good


def scan_lists(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, k: int, width: int, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """The k best rows of the probed lists, as scan_queries gives them, in about `max_bytes` of workspace.

    `width` plays no part.
    """
    memory = Workspace(x.device)
    found = []
    for piece in _pieces(lists, probed, k, max_bytes):
        part, some, most = x[piece], probed[piece], None if limits is None else limits[piece]
        held = lists
        if most is not None:
            held, some = prefixes(lists, some, most, _VISITORS)
        tasks = tasks_of(part, held, some, most)
        found += _select(part, held, some, most, tasks, group_maxima(part, held, tasks, memory), k)
    columns = max(rows.shape[1] for _, rows in found)
    return joined([_pad(scores, rows, columns) for scores, rows in found])


def _pieces(lists: InvertedLists, probed: Tensor, k: int, max_bytes: int) -> Iterator[slice]:
    """Queries cut where their workspace reaches `max_bytes`; evenly, for a product of few tasks is a slow one."""
    blocks = blocks_of(lists.sizes)[probed].sum(1)  # with limits fewer, but no one knows how few before they are sorted
    # Of each query its maxima, its tasks and its candidates.
    needed = (blocks * BLOCK_BYTES + 64 * probed.shape[1] + 32 * k).cumsum(0)
    pieces = -(-int(needed[-1]) // max(1, max_bytes))
    if pieces == 1:
        yield slice(None)
        return
    piece = torch.div(needed * pieces - 1, needed[-1], rounding_mode="floor")
    end = 0
    for size in torch.bincount(piece).tolist():
        start, end = end, end + size
        if size:
            yield slice(start, end)


def _pad(scores: Tensor, rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    more = (0, columns - rows.shape[1])
    if not more[1]:
        return scores, rows
    return torch.nn.functional.pad(scores, more, value=NEVER), torch.nn.functional.pad(rows, more, value=-1)


def _select(
    x: Tensor,
    lists: InvertedLists,
    probed: Tensor,
    limits: Tensor | None,
    tasks: Tasks,
    maxima: tuple[Tensor, Tensor],
    k: int,
) -> list[tuple[Tensor, Tensor]]:
    """The k best rows of each query, some queries at a time."""
    width = int(tasks.blocks[probed].sum(1).max())
    step = selected_at_a_time(width, k)
    found = []
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        most = None if limits is None else limits[part]
        rows, least = survivors(lists, probed[part], tasks.before, tasks.rank[part], maxima, k, width, most)
        scores, best = best_rows(x[part], lists, rows, k)
        if scores.shape[1] == k:  # rows of groups that were not chosen are scored by another product than those kept
            scores[:, -1] = torch.maximum(scores[:, -1], least)
        found.append((scores, best))
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
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows (Q, k * GROUP) of each query's k best groups, negative for padding, and the least maximum of these (Q,),
    -inf for fewer groups. `width` bounds the blocks of a query.

    before (L + 1,) and rank (Q, P) are those of `Tasks`; limits (Q, P) are the rows that count of each list.
    """
    blocks = blocks_of(lists.sizes)[probed]
    address = before[probed] + rank * blocks
    coarse, fine = maxima
    if width == 0:
        return probed.new_empty(probed.shape[0], 0), coarse.new_full((probed.shape[0],), NEVER)
    position, probe = ranges_to_positions(address, blocks, width)
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
    most = None if limits is None else limits.gather(1, probe)
    at = strands(lists, probed.gather(1, probe), first + chosen - block * BLOCK, most)
    step = torch.arange(GROUP, device=position.device) * at.apart[:, :, None]
    held = at.held.masked_fill_(best == NEVER, 0)
    rows = at.first[:, :, None] + step
    least = best[:, k - 1] if best.shape[1] >= k else best.new_full((best.shape[0],), NEVER)
    return rows.masked_fill_(at.along[:, :, None] + step >= held[:, :, None], -1).flatten(1), least
