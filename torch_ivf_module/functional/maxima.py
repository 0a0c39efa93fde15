"""Scores of lists against the queries that visit them, reduced at once to maxima over small groups of rows.

L lists, N vectors, d dim, B blocks, n rows of a list, m tasks of a list (a task is a query on a list).

Scores are never kept. They are reduced, while in cache, to the maximum of GROUP consecutive rows and that of BLOCK
groups. A list that many queries visit is one matrix product; lists that few visit are blocks of one sampled product,
which reads a list's rows once for all its tasks too, and costs no call a list.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .lists import InvertedLists, narrow
from .sampled import has_sampled_product, sampled_product
from .select import NEVER

GROUP = 8  # rows a maximum stands for: 4 stores twice the maxima, 16 scores twice the rows again
BLOCK = 16  # groups a coarse maximum stands for
SPAN = GROUP * BLOCK
_TILE = 1 << 20  # scores of a product: 4 MiB, so that the passes over it find it in cache
_ROWS = 1 << 22  # numbers of a list read at a time: bounds the float32 copy of half-precision rows
_BLOCKS = 1 << 10  # blocks of a sampled product at a time: 2 MiB of pattern
# A matrix product costs about 120 us a list and saves about 8 ns a score against the sampled one: measured at nq = 128
# (headline), where 6,000 and 20,000 take 61 and 57 ms, and at nq = 32, where they take 23 and 15 ms.
PRODUCT_PAYS = 20_000  # scores of a list


class Tasks(NamedTuple):
    """Who visits which list, ordered by list, and where the maxima of each task lie."""

    queries: Tensor  # (T,) the query of each task
    visits: Tensor  # (L + 1,) tasks of each list; the last entry is of no list
    blocks: Tensor  # (L + 1,) blocks of each list
    rank: Tensor  # (Q, P) a task's place among those of its list
    before: Tensor  # (L + 1,) where a list's maxima start, in blocks
    sampled: Tensor  # (L + 1,) whether the list is part of the sampled product


class Maxima(NamedTuple):
    """What is known of each block: its maximum, and those of its groups."""

    coarse: Tensor  # (B,) list by list, task by task
    fine: Tensor  # (B * BLOCK,) the same, but of a list by matrix product group by group and then task by task


class Tile(NamedTuple):
    """A product of some tasks with some rows of one list."""

    scores: Tensor  # (n, m) ranking scores, n made a multiple of GROUP by rows of -inf
    queries: Tensor  # (m,)
    row: int  # the first row, counted in this list
    task: int  # the first task, counted in this list
    list: int


def tasks_of(x: Tensor, lists: InvertedLists, probed: Tensor, *, sample: bool = True) -> Tasks:
    """Order the tasks of probed (Q, P) by list; list number L is none."""
    nlist = lists.offsets.shape[0] - 1
    target = probed.flatten()
    order = torch.sort(narrow(target, nlist + 1), stable=True).indices
    visits = torch.bincount(target, minlength=nlist + 1)
    first = visits.cumsum(0) - visits
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device) - first[target[order]]
    sizes = lists.sizes
    blocks = torch.div(sizes + (SPAN - 1), SPAN, rounding_mode="floor")
    held = visits * blocks
    sampled = torch.zeros_like(held, dtype=torch.bool)
    if sample and has_sampled_product(x, lists.packed, SPAN):
        # A sampled block reads SPAN rows whatever its list; it must not reach behind the last row.
        sampled = (visits * sizes < PRODUCT_PAYS) & (lists.offsets + blocks * SPAN <= lists.packed.shape[0])
    mine, others = held * sampled, held * ~sampled
    before = torch.where(sampled, mine.cumsum(0) - mine, mine.sum() + others.cumsum(0) - others)
    queries = torch.div(order, probed.shape[1], rounding_mode="floor")
    return Tasks(queries, visits, blocks, rank.view(probed.shape), before, sampled)


def tiles(x: Tensor, lists: InvertedLists, tasks: Tasks) -> Iterator[Tile]:
    """The matrix products there are to compute, in one reused piece of memory: a tile is gone when the next comes.

    Waits for the device once.
    """
    starts, ends = lists.offsets[:-1].tolist(), lists.offsets[1:].tolist()
    counts, skipped = tasks.visits.tolist(), tasks.sampled.tolist()
    firsts = [0, *itertools.accumulate(counts)]
    scratch = torch.empty(0, dtype=torch.float32, device=x.device)
    most = max(SPAN, _ROWS // max(1, x.shape[1]) // SPAN * SPAN)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        count = counts[number]
        if not count or end == start or skipped[number]:
            continue
        step = min(count, _TILE // SPAN)
        rows = min(most, max(SPAN, _TILE // step // SPAN * SPAN))
        for task in range(0, count, step):
            first = firsts[number] + task
            queries = tasks.queries[first : first + min(step, count - task)]
            held = x.index_select(0, queries).t()
            for row in range(start, end, rows):
                size = min(rows, end - row)
                padded = -(-size // GROUP) * GROUP
                if scratch.shape[0] < padded * queries.shape[0]:
                    scratch = torch.empty(padded * queries.shape[0], dtype=torch.float32, device=x.device)
                scores = scratch[: padded * queries.shape[0]].view(padded, -1)
                _product(lists, row, size, held, scores)
                yield Tile(scores, queries, row - start, task, number)


def _product(lists: InvertedLists, row: int, size: int, queries: Tensor, out: Tensor) -> None:
    """Ranking scores of `size` rows against `queries` (d, m), written to the first rows of `out`."""
    vectors = lists.packed[row : row + size].float()
    real = out[:size]
    if lists.bias.shape[0]:
        torch.addmm(lists.bias[row : row + size, None], vectors, queries, out=real)
    else:
        torch.mm(vectors, queries, out=real)
    if size < out.shape[0]:
        out[size:] = NEVER


def block_maxima(x: Tensor, lists: InvertedLists, tasks: Tasks) -> Maxima:
    """The maxima of every task's blocks and groups, for queries x (Q, d) relative to the origin."""
    total, sampled = torch.stack([(tasks.visits * tasks.blocks).sum(), _sampled_blocks(tasks).sum()]).tolist()
    coarse = torch.empty(total, dtype=torch.float32, device=x.device)
    fine = torch.empty(total * BLOCK, dtype=torch.float32, device=x.device)
    found = Maxima(coarse, fine)
    if sampled:
        _sample_blocks(x, lists, tasks, found)
    if sampled < total:
        _multiply_lists(x, lists, tasks, found, blank=False)
        if not bool(coarse[sampled:].amax() < -NEVER):
            # A product overflowed: its maximum hides the other rows of its group, so overflow is blanked out first.
            _multiply_lists(x, lists, tasks, found, blank=True)
    return found


def _multiply_lists(x: Tensor, lists: InvertedLists, tasks: Tasks, found: Maxima, *, blank: bool) -> None:
    before, counts, blocks = tasks.before.tolist(), tasks.visits.tolist(), tasks.blocks.tolist()
    for tile in tiles(x, lists, tasks):
        rows, count = tile.scores.shape
        if blank:
            tile.scores.nan_to_num_(nan=NEVER, posinf=NEVER, neginf=NEVER)
        start, all_tasks, size = before[tile.list], counts[tile.list], blocks[tile.list]
        end, block = start + all_tasks * size, tile.row // SPAN
        span = -(-rows // SPAN)
        task = slice(tile.task, tile.task + count)
        # Group by group, as the reduction leaves it: to turn so many numbers round costs as much as finding them.
        every = found.fine[start * BLOCK : end * BLOCK].view(-1, all_tasks)
        groups = every[block * BLOCK : (block + span) * BLOCK, task]
        torch.amax(tile.scores.view(-1, GROUP, count), 1, out=groups[: rows // GROUP])
        groups[rows // GROUP :] = NEVER
        maxima = groups.unflatten(0, (-1, BLOCK)).amax(1)
        found.coarse[start:end].view(-1, size)[task, block : block + span] = maxima.t()


def _sampled_blocks(tasks: Tasks) -> Tensor:
    """Blocks of the sampled product in each list (L + 1,)."""
    return tasks.visits * tasks.blocks * tasks.sampled


def _sample_blocks(x: Tensor, lists: InvertedLists, tasks: Tasks, found: Maxima) -> None:
    """The lists that few queries visit, as rows of a sampled product: one row of SPAN entries a block."""
    held = _sampled_blocks(tasks)
    numbers = torch.repeat_interleave(torch.arange(held.shape[0], device=x.device), held)
    first = tasks.visits.cumsum(0) - tasks.visits
    step = torch.arange(SPAN, device=x.device)
    for chunk in range(0, numbers.shape[0], _BLOCKS):
        number = numbers[chunk : chunk + _BLOCKS]
        part = slice(chunk, chunk + number.shape[0])
        along = torch.arange(part.start, part.stop, device=x.device) - tasks.before[number]
        task = torch.div(along, tasks.blocks[number], rounding_mode="floor")
        query = tasks.queries[first[number] + task]
        within = (along - task * tasks.blocks[number]) * SPAN
        start, left = lists.offsets[number] + within, lists.sizes[number] - within
        bias = lists.bias.unfold(0, SPAN, 1)[start] if lists.bias.shape[0] else x.new_zeros(len(start), SPAN)
        scores = sampled_product(x.index_select(0, query), lists.packed, start[:, None] + step, bias)
        short = torch.nonzero(left < SPAN)[:, 0]
        scores[short] = scores[short].masked_fill_(step >= left[short, None], NEVER)
        groups = scores.nan_to_num_(nan=NEVER, posinf=NEVER, neginf=NEVER).view(-1, BLOCK, GROUP).amax(2)
        found.fine[part.start * BLOCK : part.stop * BLOCK] = groups.flatten()
        torch.amax(groups, 1, out=found.coarse[part])
