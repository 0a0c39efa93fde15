"""The list-major scan, "csr": one matrix product per visited list over all queries that visit it.

Q queries, L lists, P probes, T = Q * P tasks (a query on a list), N vectors, d dim, k results, n rows of a list,
m tasks of a list.

Scores are never kept. A product is reduced at once, while it is in cache, to the maxima of GROUP consecutive
rows, and these to the maxima of BLOCK groups. The k best rows of a query lie in its k best groups, and those in
its k best blocks; so two small selections leave k * GROUP rows a query, which are scored again by the
query-major functions. Both scans therefore end in the same candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .lists import InvertedLists, lengths, ranges_to_positions
from .scan_queries import best_rows
from .select import NEVER, best_positions

GROUP = 8  # rows a maximum stands for: 4 stores twice the maxima, 16 scores twice the rows again
BLOCK = 16  # groups a coarse maximum stands for
SPAN = GROUP * BLOCK
_TILE = 1 << 20  # scores of a product: 4 MiB, so that the passes over it find it in cache
_ROWS = 1 << 22  # numbers of a list read at a time: bounds the float32 copy of half-precision rows
_SELECT_QUERIES = 512  # queries selected for at a time: larger temporaries cost page faults


class Tasks(NamedTuple):
    """Who visits which list, ordered by list."""

    queries: Tensor  # (T,) the query of each task
    visits: Tensor  # (L,) tasks of each list
    counts: list[int]  # the same on the host, since it steers the loop
    rank: Tensor  # (Q, P) a task's place among those of its list
    before: Tensor  # (L,) tasks times blocks of all earlier lists: where a list's maxima start


class Tile(NamedTuple):
    """A product of some tasks with some rows of one list."""

    scores: Tensor  # (n, m) ranking scores, n made a multiple of SPAN by rows of -inf
    queries: Tensor  # (m,)
    row: int  # the first row, counted in this list
    task: int  # the first task, counted in this list
    list: int


def scan_lists(x: Tensor, lists: InvertedLists, probed: Tensor, k: int, width: int) -> tuple[Tensor, Tensor]:
    """The k best rows of the probed lists, as scan_queries gives them (`width` bounds rows a query there too)."""
    tasks = tasks_of(lists.offsets, probed)
    coarse, fine = block_maxima(x, lists, tasks)
    if coarse.shape[0] == 0:
        return x.new_empty((x.shape[0], 0)), probed.new_empty((x.shape[0], 0))
    if not bool(coarse.amax() < -NEVER):
        # A product overflowed: its maximum hides the other rows of its group, so overflow is blanked out first.
        coarse, fine = block_maxima(x, lists, tasks, blank=True)
    parts = []
    for start in range(0, x.shape[0], _SELECT_QUERIES):
        part = slice(start, start + _SELECT_QUERIES)
        rows = _survivors(lists.offsets, probed[part], tasks, tasks.rank[part], coarse, fine, k)
        parts.append(best_rows(x[part], lists, rows, k))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def tasks_of(offsets: Tensor, probed: Tensor) -> Tasks:
    """Order the tasks of probed (Q, P) by list. Waits for the device once."""
    nlist = offsets.shape[0] - 1
    target = probed.flatten() % (nlist + 1)  # -1 goes behind the last list
    key = target.to(torch.int16 if nlist < (1 << 15) - 1 else torch.int32)
    order = torch.sort(key, stable=True).indices
    counts = torch.bincount(target, minlength=nlist + 1)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device) - first[target[order]]
    held = counts[:nlist] * blocks_of(lengths(offsets))
    return Tasks(
        torch.div(order, probed.shape[1], rounding_mode="floor"),
        counts[:nlist],
        counts[:nlist].tolist(),
        rank.view(probed.shape),
        held.cumsum(0) - held,
    )


def blocks_of(sizes: Tensor) -> Tensor:
    """Blocks that lists of these sizes take."""
    return (sizes + (SPAN - 1)) // SPAN


def tiles(x: Tensor, lists: InvertedLists, tasks: Tasks) -> Iterator[Tile]:
    """Every product there is to compute, in one reused piece of memory: a tile is gone when the next one comes."""
    ends = lists.offsets.tolist()
    scratch = torch.empty(0, device=x.device)
    most = max(SPAN, _ROWS // max(1, x.shape[1]) // SPAN * SPAN)
    first = 0
    for number, count in enumerate(tasks.counts):
        start, end = ends[number], ends[number + 1]
        if count and end > start:
            step = min(count, max(1, _TILE // SPAN))
            rows = min(most, max(SPAN, _TILE // step // SPAN * SPAN))
            for task in range(0, count, step):
                queries = tasks.queries[first + task : first + min(count, task + step)]
                held = x.index_select(0, queries).t()
                for row in range(start, end, rows):
                    size = min(rows, end - row)
                    padded = -(-size // SPAN) * SPAN
                    if scratch.shape[0] < padded * queries.shape[0]:
                        scratch = torch.empty(padded * queries.shape[0], device=x.device)
                    scores = scratch[: padded * queries.shape[0]].view(padded, -1)
                    real = scores[:size]
                    vectors = lists.packed[row : row + size].float()
                    if lists.bias.shape[0]:
                        torch.addmm(lists.bias[row : row + size, None], vectors, held, out=real)
                    else:
                        torch.mm(vectors, held, out=real)
                    if size < padded:
                        scores[size:] = NEVER
                    yield Tile(scores, queries, row - start, task, number)
        first += count


def block_maxima(x: Tensor, lists: InvertedLists, tasks: Tasks, *, blank: bool = False) -> tuple[Tensor, Tensor]:
    """Maxima of every block, task by task, and of every group in it, group by group; both list by list.

    Of a list with m tasks and b blocks the first holds (m, b), the second (BLOCK * b, m) as the reduction leaves
    it, since turning so many numbers round would cost as much as finding them.
    """
    blocks = blocks_of(lengths(lists.offsets)).tolist()
    held = [count * size for count, size in zip(tasks.counts, blocks, strict=True)]
    before = [0, *itertools.accumulate(held)]
    coarse = torch.empty(before[-1], device=x.device)
    fine = torch.empty(before[-1] * BLOCK, device=x.device)
    for tile in tiles(x, lists, tasks):
        rows, count = tile.scores.shape
        here = slice(before[tile.list], before[tile.list + 1])
        task = slice(tile.task, tile.task + count)
        block = tile.row // SPAN
        every = fine[here.start * BLOCK : here.stop * BLOCK].view(-1, tasks.counts[tile.list])
        if blank:
            tile.scores.nan_to_num_(nan=NEVER, posinf=NEVER, neginf=NEVER)
        groups = every[block * BLOCK : block * BLOCK + rows // GROUP, task]
        torch.amax(tile.scores.view(-1, GROUP, count), 1, out=groups)
        maxima = groups.unflatten(0, (-1, BLOCK)).amax(1)
        coarse[here].view(-1, blocks[tile.list])[task, block : block + rows // SPAN] = maxima.t()
    return coarse, fine


def _survivors(
    offsets: Tensor, probed: Tensor, tasks: Tasks, rank: Tensor, coarse: Tensor, fine: Tensor, k: int
) -> Tensor:
    """The rows (Q, k * GROUP) of each query's k best groups, -1 for padding."""
    at = probed.clamp(min=0)
    sizes = lengths(offsets)[at].masked_fill(probed < 0, 0)
    blocks = blocks_of(sizes)
    address = tasks.before[at] + rank * blocks
    position, probe = ranges_to_positions(address, blocks, int(blocks.sum(1).max()))
    maxima = coarse.index_select(0, position.clamp(min=0).flatten()).view(position.shape)
    best, chosen = best_positions(maxima.masked_fill_(position < 0, NEVER), k)
    # From the chosen blocks to the rows they stand for.
    probe = probe.gather(1, chosen).clamp(max=probed.shape[1] - 1)
    position = position.gather(1, chosen)
    within = (position - address.gather(1, probe)).masked_fill_(best == NEVER, 0)
    row = offsets[at].gather(1, probe) + within * SPAN
    end = (offsets[at] + sizes).gather(1, probe).masked_fill(best == NEVER, 0)
    # The same again among their groups; those of a task lie as far apart as its list has tasks.
    count = tasks.visits[at].gather(1, probe)
    task = rank.gather(1, probe)
    step = torch.arange(BLOCK, device=row.device)
    place = (tasks.before[at].gather(1, probe) + within * count) * BLOCK + task
    place = (place[:, :, None] + count[:, :, None] * step).masked_fill_(best[:, :, None] == NEVER, 0)
    maxima = fine.take(place)
    maxima = maxima.masked_fill_(best[:, :, None] == NEVER, NEVER).flatten(1)
    _, chosen = best_positions(maxima, k)
    block = torch.div(chosen, BLOCK, rounding_mode="floor")
    row = row.gather(1, block) + chosen % BLOCK * GROUP
    rows = row[:, :, None] + torch.arange(GROUP, device=row.device)
    return rows.masked_fill_(rows >= end.gather(1, block)[:, :, None], -1).flatten(1)
