"""The list-major scan, "csr": every probed list is read once for all queries that probe it.

Q queries, L lists, P probes, d dim, k results, B blocks, W blocks per query.

The k best rows of a query lie in its k groups of rows with the best maxima, and these groups in its k blocks with the
best maxima. Two small selections among the maxima therefore leave k * GROUP rows per query, which the query-major
functions score again: both scans give the same candidates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .block_maxima import BLOCK, GROUP, SPAN, blocks_of, group_maxima, group_rows, tasks_of
from .chunking import joined
from .lists import InvertedLists, prefixes, ranges_to_positions
from .scan_queries import best_rows
from .select import PADDING, best_positions
from .workspace import Workspace

_SELECTED = 1 << 17  # maxima that one selection reads: 5 MiB of temporaries; more cause page faults
BLOCK_BYTES = 4 * (BLOCK + 1)  # the maxima of a block and of its groups
_VISITORS = 256  # queries that share a prefix of a list: with fewer, less is read, in more and smaller products
_COARSE_PAYS = 2  # select blocks first if there are this many times k of them, else read the groups of all blocks


def scan_lists(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, k: int, width: int, max_bytes: int
) -> tuple[Tensor, Tensor]:
    """The k best rows of the probed lists, as scan_queries gives them, in about `max_bytes` of workspace.

    On a CPU `width` is not used; elsewhere it bounds the blocks of a query, which the host does not read back.
    """
    memory = Workspace(x.device)
    results = []
    most_blocks = None if x.is_cpu else blocks_bound(width, probed.shape[1])
    for chunk in _query_chunks(lists, probed, k, most_blocks, max_bytes):
        y, targets, most = x[chunk], probed[chunk], None if limits is None else limits[chunk]
        scanned = lists
        if most is not None:
            scanned, targets = prefixes(lists, targets, most, _VISITORS)
        tasks = tasks_of(y, scanned, targets, most)
        blocks = tasks.blocks[targets]
        first = tasks.before[targets] + tasks.rank * blocks
        widest = int(blocks.sum(1).max()) if most_blocks is None else most_blocks
        results += best_of_groups(y, scanned, targets, most, first, group_maxima(y, scanned, tasks, memory), k, widest)
    return joined_results(results)


def blocks_bound(width: int, probes: int) -> int:
    """No fewer than the blocks of so many lists with `width` rows together."""
    return width // SPAN + probes


def _query_chunks(
    lists: InvertedLists, probed: Tensor, k: int, most_blocks: int | None, max_bytes: int
) -> Iterator[slice]:
    """Ranges of queries with at most about `max_bytes` of workspace each, of similar size: small products are slow.

    Each query has at most `most_blocks`, or, if that is None, as many as are counted.
    """
    others = 64 * probed.shape[1] + 32 * k  # bytes of the tasks and the candidates of a query, beside its maxima
    if most_blocks is not None:
        queries = probed.shape[0]
        count = -(-queries * (most_blocks * BLOCK_BYTES + others) // max(1, max_bytes))
        step = -(-queries // max(1, count))
        yield from (slice(start, start + step) for start in range(0, queries, step))
        return
    blocks = blocks_of(lists.sizes)[probed].sum(1)  # an upper bound if there are limits
    needed = (blocks * BLOCK_BYTES + others).cumsum(0)
    count = -(-int(needed[-1]) // max(1, max_bytes))
    if count == 1:
        yield slice(None)
        return
    chunk = torch.div(needed * count - 1, needed[-1], rounding_mode="floor")
    end = 0
    for size in torch.bincount(chunk).tolist():
        start, end = end, end + size
        if size:
            yield slice(start, end)


def joined_results(results: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Scores and rows of chunks of queries, (Q, any width) each, as one of each (Q, the largest width)."""
    columns = max(rows.shape[1] for _, rows in results)
    return joined([_pad(scores, rows, columns) for scores, rows in results])


def _pad(scores: Tensor, rows: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Append padding up to so many columns."""
    missing = (0, columns - rows.shape[1])
    if not missing[1]:
        return scores, rows
    return torch.nn.functional.pad(scores, missing, value=PADDING), torch.nn.functional.pad(rows, missing, value=-1)


def best_of_groups(
    x: Tensor,
    lists: InvertedLists,
    probed: Tensor,
    limits: Tensor | None,
    first: Tensor,
    maxima: tuple[Tensor, Tensor],
    k: int,
    width: int,
) -> list[tuple[Tensor, Tensor]]:
    """The k best rows of each query: scores and rows of one chunk of queries after another. See `survivors`."""
    step = selected_at_a_time(width, k)
    results = []
    for start in range(0, x.shape[0], step):
        chunk = slice(start, start + step)
        most = None if limits is None else limits[chunk]
        rows, lowest = survivors(lists, probed[chunk], first[chunk], maxima, k, width, most)
        scores, best = best_rows(x[chunk], lists, rows, k)
        if scores.shape[1] == k:
            # The last score must bound those of all rows left out. The maxima of their groups were computed by another
            # product, with other rounding, than `scores`.
            scores[:, -1] = torch.maximum(scores[:, -1], lowest)
        results.append((scores, best))
    return results


def selected_at_a_time(width: int, k: int) -> int:
    """Queries per selection, if each has `width` blocks."""
    return max(1, _SELECTED // max(1, width, k * BLOCK))


def survivors(
    lists: InvertedLists,
    probed: Tensor,
    address: Tensor,
    maxima: tuple[Tensor, Tensor],
    k: int,
    width: int,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows (Q, k * GROUP) of each query's k best groups, negative for padding, and the lowest maximum among these
    groups (Q,), -inf if there are fewer than k.

    `maxima` are those of the blocks and of their groups, as of `group_maxima`, and address (Q, P) is where those of a
    query on a list begin, in blocks; `width` is at least the number of blocks of any query; limits (Q, P) are the rows
    to read of each list.
    """
    blocks = blocks_of(lists.sizes)[probed]
    coarse, fine = maxima
    if width == 0:
        return probed.new_empty(probed.shape[0], 0), coarse.new_full((probed.shape[0],), PADDING)
    position, probe = ranges_to_positions(address, blocks, width)
    if width > _COARSE_PAYS * k:
        best = coarse.take(position.clamp(min=0)).masked_fill_(position < 0, PADDING)
        chosen = best_positions(best, k)[1]
        position, probe = position.gather(1, chosen), probe.gather(1, chosen)
    padding = position < 0
    fine = fine.index_select(0, position.clamp(min=0).flatten()).view(*position.shape, BLOCK)
    best, chosen = best_positions(fine.masked_fill_(padding[:, :, None], PADDING).flatten(1), k)
    # From the chosen groups to their rows.
    block = torch.div(chosen, BLOCK, rounding_mode="floor")
    probe = probe.gather(1, block).clamp_(max=probed.shape[1] - 1)
    first = (position.gather(1, block) - address.gather(1, probe)) * BLOCK
    most = None if limits is None else limits.gather(1, probe)
    at = group_rows(lists, probed.gather(1, probe), first + chosen - block * BLOCK, most)
    step = torch.arange(GROUP, device=position.device) * at.stride[:, :, None]
    size = at.size.masked_fill_(best == PADDING, 0)
    rows = at.first[:, :, None] + step
    lowest = best[:, k - 1] if best.shape[1] >= k else best.new_full((best.shape[0],), PADDING)
    return rows.masked_fill_(at.group[:, :, None] + step >= size[:, :, None], -1).flatten(1), lowest
