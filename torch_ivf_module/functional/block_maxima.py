"""Scores of lists against the queries that visit them, reduced at once to maxima over small groups of rows.

L lists, N vectors, d dim, B blocks, n rows of a list, m tasks of a list (a task is a query on a list).

Scores are never kept. They are reduced, while in cache, to the maximum of each group of GROUP rows; BLOCK groups are
a block. A list that many queries visit is one matrix product; lists that few visit are blocks of one sampled product,
which reads a list's rows once for all its tasks too, and costs no call a list.

A list is cut into sections of SECTION rows, and the groups of a section lie as strands: with G groups, group g holds
rows g, g + G, g + 2 G, ... A maximum over strands reads scores as they lie: 0.08 ns a score, neighbours take 0.6.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .lists import InvertedLists, narrow
from .sampled_addmm import has_sampled_product, sampled_product
from .select import NEVER
from .workspace import Workspace

GROUP = 8  # rows a maximum stands for: 4 stores twice the maxima, 16 scores twice the rows again
BLOCK = 16  # groups a coarse maximum stands for
SPAN = GROUP * BLOCK
SECTION = 32 * SPAN  # rows of a list in one product
TILE_SCORES = 1 << 20  # scores of a product: 4 MiB, so that the pass over them finds them in cache
_BLOCKS = 1 << 10  # blocks of a sampled product at a time: 2 MiB of pattern
# A matrix product costs about 100 us a list, a sampled score about 10 ns more than one of a product. Measured on the
# headline and the photographs, nq 32 to 2,048: between 6,000 and 20,000 little changes, 3,000 and 40,000 lose 10%.
PRODUCT_PAYS = 10_000  # scores of a list


class Tasks(NamedTuple):
    """Who visits which list, ordered by list, and where the maxima of each task lie."""

    queries: Tensor  # (T,) the query of each task
    visits: Tensor  # (L + 1,) tasks of each list; the last entry is of no list
    blocks: Tensor  # (L + 1,) blocks of each list
    rank: Tensor  # (Q, P) a task's place among those of its list
    before: Tensor  # (L + 1,) where a list's maxima start, in blocks: list by list, task by task
    sampled: Tensor  # (L + 1,) whether the list is part of the sampled product
    limits: Tensor | None  # (T,) the rows of its list that a task may see, where that is not all of them


class Tile(NamedTuple):
    """A product of some tasks with a section of one list."""

    scores: Tensor  # (m, n) ranking scores, n made a multiple of GROUP by columns of -inf
    queries: Tensor  # (m,)
    row: int  # the first row, counted in this list
    task: int  # the first task, counted in this list
    list: int


class Strands(NamedTuple):
    """The rows of a group: ``first + j * apart`` for j < GROUP, as long as ``along + j * apart < held``."""

    first: Tensor
    along: Tensor  # the group's number in its section
    apart: Tensor  # groups of the section
    held: Tensor  # rows of the section, or as many as count


def blocks_of(sizes: Tensor) -> Tensor:
    """Blocks of lists of so many rows."""
    return _quotient(sizes + (SPAN - 1), SPAN)


def tasks_of(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None = None, *, sample: bool = True
) -> Tasks:
    """Order the tasks of probed (Q, P) by list; list number L is none. limits (Q, P): see `Tasks`."""
    nlist = lists.offsets.shape[0] - 1
    target = probed.flatten()
    order = torch.sort(narrow(target, nlist + 1), stable=True).indices
    visits = torch.bincount(target, minlength=nlist + 1)
    first = visits.cumsum(0) - visits
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device) - first[target[order]]
    blocks = blocks_of(lists.sizes)
    held = visits * blocks
    sampled = torch.zeros_like(held, dtype=torch.bool)
    if sample and has_sampled_product(x, lists.packed, SPAN):
        # A sampled block reads SPAN rows whatever its list; it must not reach behind the last row.
        reach = lists.offsets + lists.sizes + (GROUP + BLOCK)
        sampled = (visits * lists.sizes < PRODUCT_PAYS) & (reach <= lists.packed.shape[0])
    queries, before = _quotient(order, probed.shape[1]), held.cumsum(0) - held
    seen = None if limits is None else limits.flatten()[order]
    return Tasks(queries, visits, blocks, rank.view(probed.shape), before, sampled, seen)


def tiles(x: Tensor, lists: InvertedLists, tasks: Tasks) -> Iterator[Tile]:
    """The matrix products there are to compute, in one reused piece of memory: a tile is gone when the next comes.

    Waits for the device once.
    """
    starts, ends = lists.offsets.tolist(), (lists.offsets + lists.sizes).tolist()
    counts, skipped = tasks.visits.tolist(), tasks.sampled.tolist()
    firsts = [0, *itertools.accumulate(counts)]
    scratch = Workspace(x.device)
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        count = counts[number]
        if not count or skipped[number]:
            continue
        for row in range(start, end, SECTION):
            size = min(SECTION, end - row)
            padded = -(-size // GROUP) * GROUP
            vectors = lists.packed[row : row + size].float().t()
            bias = lists.bias[row : row + size] if lists.bias.shape[0] else None
            step = max(1, TILE_SCORES // padded)
            for task in range(0, count, step):
                first = firsts[number] + task
                queries = tasks.queries[first : first + min(step, count - task)]
                scores = scratch.take(queries.shape[0], padded)
                _product(x.index_select(0, queries), vectors, bias, scores)
                if tasks.limits is not None:
                    _hide(scores[:, :size], tasks.limits[first : first + queries.shape[0]] - (row - start))
                yield Tile(scores, queries, row - start, task, number)


def _product(x: Tensor, vectors: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Ranking scores of `vectors` (d, n) for x (m, d), written to the first columns of `out`."""
    real = out[:, : vectors.shape[1]]
    if bias is None:
        torch.mm(x, vectors, out=real)
    else:
        torch.addmm(bias, x, vectors, out=real)
    if real.shape[1] < out.shape[1]:
        out[:, real.shape[1] :] = NEVER


def _hide(scores: Tensor, limits: Tensor) -> None:
    """Blank out of scores (m, n) what lies behind the first `limits` (m,) of each row. Waits for the device."""
    everyone = max(0, int(limits.min()))  # sees so many
    if everyone < scores.shape[1]:
        along = torch.arange(everyone, scores.shape[1], device=scores.device)
        scores[:, everyone:].masked_fill_(along >= limits[:, None], NEVER)


def group_maxima(x: Tensor, lists: InvertedLists, tasks: Tasks, memory: Workspace) -> tuple[Tensor, Tensor]:
    """The maxima of every task's blocks (B,) and groups (B, BLOCK), for queries x (Q, d) relative to the origin.

    The latter lie in `memory`.
    """
    total, sampled = torch.stack([(tasks.visits * tasks.blocks).sum(), _sampled_blocks(tasks).sum()]).tolist()
    fine = memory.take(total, BLOCK)
    if sampled:
        _sample_blocks(x, lists, tasks, fine)
    if sampled < total:
        _multiply_lists(x, lists, tasks, fine, blank=False)
    coarse = fine.amax(1)
    if sampled < total and not bool(coarse.amax() < -NEVER):
        # A product overflowed: its maximum hides the other rows of its group, so overflow is blanked out first.
        _multiply_lists(x, lists, tasks, fine, blank=True)
        torch.amax(fine, 1, out=coarse)
    return coarse, fine


def _multiply_lists(x: Tensor, lists: InvertedLists, tasks: Tasks, fine: Tensor, *, blank: bool) -> None:
    before, counts, blocks = tasks.before.tolist(), tasks.visits.tolist(), tasks.blocks.tolist()
    for tile in tiles(x, lists, tasks):
        count, rows = tile.scores.shape
        if blank:
            tile.scores.nan_to_num_(nan=NEVER, posinf=NEVER, neginf=NEVER)
        start, held, first = before[tile.list], counts[tile.list] * blocks[tile.list], tile.row // SPAN
        maxima = fine[start : start + held].view(counts[tile.list], -1)[tile.task : tile.task + count]
        groups = rows // GROUP
        section = maxima[:, first * BLOCK : (first + -(-rows // SPAN)) * BLOCK]
        torch.amax(tile.scores.view(count, GROUP, groups), 1, out=section[:, :groups])
        if groups < section.shape[1]:
            section[:, groups:] = NEVER


def _sampled_blocks(tasks: Tasks) -> Tensor:
    """Blocks of the sampled product in each list (L + 1,)."""
    return tasks.visits * tasks.blocks * tasks.sampled


def _sample_blocks(x: Tensor, lists: InvertedLists, tasks: Tasks, fine: Tensor) -> None:
    """The lists that few queries visit, as rows of a sampled product: one row of SPAN entries a block."""
    held = _sampled_blocks(tasks)
    numbers = torch.repeat_interleave(torch.arange(held.shape[0], device=x.device), held)
    firsts, shifts = tasks.visits.cumsum(0) - tasks.visits, held.cumsum(0) - held
    for chunk in range(0, numbers.shape[0], _BLOCKS):
        number = numbers[chunk : chunk + _BLOCKS]
        along = torch.arange(chunk, chunk + number.shape[0], device=x.device) - shifts[number]
        task = _quotient(along, tasks.blocks[number])
        block = along - task * tasks.blocks[number]
        task = firsts[number] + task
        at = strands(lists, number, block * BLOCK, None if tasks.limits is None else tasks.limits[task])
        query = x.index_select(0, tasks.queries[task])
        runs = at.first[:, None] + at.apart[:, None] * torch.arange(GROUP, device=x.device)
        rows = runs[:, :, None] + torch.arange(BLOCK, device=x.device)
        bias = lists.bias.unfold(0, BLOCK, 1)[runs] if lists.bias.shape[0] else x.new_zeros(rows.shape)
        scores = sampled_product(query, lists.packed, rows.flatten(1), bias.flatten(1)).view(rows.shape)
        short = torch.nonzero(at.along + (GROUP - 1) * at.apart + BLOCK > at.held)[:, 0]
        if short.shape[0]:
            scores[short] = scores[short].masked_fill_(_behind(Strands(*(part[short] for part in at))), NEVER)
        fine[tasks.before[number] + along] = scores.nan_to_num_(nan=NEVER, posinf=NEVER, neginf=NEVER).amax(1)


def _behind(at: Strands) -> Tensor:
    """Entries (B, GROUP, BLOCK) of sampled blocks that are of no group, or of none of its rows."""
    group = at.along[:, None, None] + torch.arange(BLOCK, device=at.along.device)
    row = group + at.apart[:, None, None] * torch.arange(GROUP, device=group.device)[:, None]
    return (group >= at.apart[:, None, None]) | (row >= at.held[:, None, None])


def strands(lists: InvertedLists, number: Tensor, group: Tensor, limits: Tensor | None = None) -> Strands:
    """Where the rows of a group lie. number, group (...): a list, and a group counted in it.

    `limits` (...) are the rows of the list that count; they change no group, but what is in it.
    """
    section = _quotient(group, SECTION // GROUP)
    along = group - section * (SECTION // GROUP)
    held = (lists.sizes[number] - section * SECTION).clamp_(max=SECTION)
    first = lists.offsets[number] + section * SECTION + along
    apart = _quotient(held + (GROUP - 1), GROUP)
    if limits is not None:
        held = torch.minimum(held, limits - section * SECTION)
    return Strands(first, along, apart, held)


def _quotient(x: Tensor, y: Tensor | int) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")
