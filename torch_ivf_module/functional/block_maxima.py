"""Ranking scores of lists for the queries that probe them, reduced to maxima over small groups of rows.

L lists, N vectors, d dim, B blocks, T tasks (a task is one query on one list), n rows and m tasks of one list.

Scores are not stored. While in cache, they are reduced to the maximum of each group of GROUP rows; BLOCK groups are a
block. A list that many queries probe is one matrix product. Lists that few queries probe are blocks of one sampled
product, which also reads the rows of a list once for all its tasks, and needs no call per list.

A list is divided into sections of SECTION rows. In a section with G groups, group g has rows g, g + G, g + 2 G, ...:
a maximum over strided rows takes 0.08 ns per score, one over adjacent rows 0.6 ns.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .lists import InvertedLists, narrow
from .row_codes import as_float
from .sampled_addmm import has_sampled_product, sampled_product
from .select import PADDING
from .workspace import Workspace

GROUP = 8  # rows per group: with 4 there are twice as many maxima, with 16 twice as many rows are scored again
BLOCK = 16  # groups per block
SPAN = GROUP * BLOCK  # rows per block
SECTION = 32 * SPAN  # rows of a list in one product
PRODUCT_SCORES = 1 << 20  # scores of a product: 4 MiB, so that they are still in cache when they are reduced
_BLOCKS = 1 << 10  # blocks of a sampled product at a time: 2 MiB of pattern
# A matrix product costs about 100 us per list, a score of a sampled product about 10 ns more than one of a matrix
# product. Measured on the headline and the photographs, nq 32 to 2,048: between 6,000 and 20,000 little changes, 3,000
# and 40,000 are 10% slower.
PRODUCT_PAYS = 10_000  # scores of a list from which it is a matrix product


class Tasks(NamedTuple):
    """Which queries probe which list, sorted by list, and where the maxima of each task are stored."""

    queries: Tensor  # (T,) the query of each task
    visits: Tensor  # (L + 1,) tasks of each list; the last entry is for no list
    blocks: Tensor  # (L + 1,) blocks of each list
    rank: Tensor  # (Q, P) position of a task among the tasks of its list
    before: Tensor  # (L + 1,) where the maxima of a list start, in blocks: list by list, task by task
    sampled: Tensor  # (L + 1,) whether the list is part of the sampled product
    limits: Tensor | None  # (T,) rows of its list that a task reads, None for all


class SectionScores(NamedTuple):
    """The product of some tasks of one list with one section of it."""

    scores: Tensor  # (m, n) ranking scores; n is a multiple of GROUP, the additional columns are -inf
    queries: Tensor  # (m,)
    row: int  # the first row, counted in this list
    task: int  # the first task, counted in this list
    list: int


class GroupRows(NamedTuple):
    """The rows of a group: ``first + j * stride`` for j < GROUP, while ``group + j * stride < size``."""

    first: Tensor  # packed row
    group: Tensor  # number of the group in its section
    stride: Tensor  # groups of the section
    size: Tensor  # rows of the section; with limits, those that are read


def blocks_of(sizes: Tensor) -> Tensor:
    """Blocks of lists with these numbers of rows."""
    return _quotient(sizes + (SPAN - 1), SPAN)


def tasks_of(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None = None, *, sample: bool = True
) -> Tasks:
    """Sort the tasks of probed (Q, P), L for no list, by list. limits (Q, P): rows to read, None for all.

    If `sample` is false, no list is part of a sampled product.
    """
    nlist = lists.offsets.shape[0] - 1
    target = probed.flatten()
    by_list, order = torch.sort(narrow(target, nlist + 1), stable=True)
    first = first_positions(by_list, nlist)
    visits = torch.nn.functional.pad(first[1:], (0, 1), value=target.shape[0]) - first
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.shape[0], device=order.device) - first[target[order]]
    blocks = blocks_of(lists.sizes)
    stored = visits * blocks
    sampled = torch.zeros_like(stored, dtype=torch.bool)
    if sample and has_sampled_product(x, lists.packed, SPAN):
        # A sampled block always reads SPAN rows, also beyond the end of its list, but there must be such rows.
        end = lists.offsets + lists.sizes + (GROUP + BLOCK)
        sampled = (visits * lists.sizes < PRODUCT_PAYS) & (end <= lists.packed.shape[0])
    queries, before = _quotient(order, probed.shape[1]), stored.cumsum(0) - stored
    task_limits = None if limits is None else limits.flatten()[order]
    return Tasks(queries, visits, blocks, rank.view(probed.shape), before, sampled, task_limits)


def first_positions(by_list: Tensor, nlist: int) -> Tensor:
    """Where each list begins (nlist + 1,) among sorted list numbers (T,). Unlike bincount it reads nothing back."""
    numbers = torch.arange(nlist + 1, device=by_list.device)
    return torch.searchsorted(by_list, numbers.to(by_list.dtype))


class HostTasks(NamedTuple):
    """What the host has to know of each list, L + 1 numbers each, to launch its products."""

    starts: list[int]  # its first packed row
    sizes: list[int]
    visits: list[int]
    blocks: list[int]
    before: list[int]
    sampled: list[int]


def host_tasks(lists: InvertedLists, tasks: Tasks) -> HostTasks:
    """Synchronizes with the device once."""
    found = (lists.offsets, lists.sizes, tasks.visits, tasks.blocks, tasks.before, tasks.sampled.long())
    return HostTasks(*torch.stack(found).tolist())


def section_scores(x: Tensor, lists: InvertedLists, tasks: Tasks, host: HostTasks) -> Iterator[SectionScores]:
    """The matrix products of all lists that are not sampled. Each overwrites the scores of the one before it."""
    firsts = [0, *itertools.accumulate(host.visits)]
    memory = Workspace(x.device)
    for number, (start, count) in enumerate(zip(host.starts, host.visits, strict=True)):
        end = start + host.sizes[number]
        if not count or host.sampled[number]:
            continue
        for row in range(start, end, SECTION):
            size = min(SECTION, end - row)
            padded = -(-size // GROUP) * GROUP
            vectors = as_float(lists.packed[row : row + size], x.shape[1]).t()
            bias = lists.bias[row : row + size] if lists.bias.shape[0] else None
            step = max(1, PRODUCT_SCORES // padded)
            for task in range(0, count, step):
                first = firsts[number] + task
                queries = tasks.queries[first : first + min(step, count - task)]
                scores = memory.take(queries.shape[0], padded)
                _product(x.index_select(0, queries), vectors, bias, scores)
                if tasks.limits is not None:
                    _hide(scores[:, :size], tasks.limits[first : first + queries.shape[0]] - (row - start))
                yield SectionScores(scores, queries, row - start, task, number)


def _product(x: Tensor, vectors: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write the ranking scores of `vectors` (d, n) for x (m, d) to the first n columns of `out`, -inf to the others."""
    real = out[:, : vectors.shape[1]]
    if bias is None:
        torch.mm(x, vectors, out=real)
    else:
        torch.addmm(bias, x, vectors, out=real)
    if real.shape[1] < out.shape[1]:
        out[:, real.shape[1] :] = PADDING


def _hide(scores: Tensor, limits: Tensor) -> None:
    """Set scores (m, n) after the first `limits[i]` of row i to -inf; limits (m,). Synchronizes with the device."""
    start = max(0, int(limits.min()))
    if start < scores.shape[1]:
        column = torch.arange(start, scores.shape[1], device=scores.device)
        scores[:, start:].masked_fill_(column >= limits[:, None], PADDING)


def group_maxima(x: Tensor, lists: InvertedLists, tasks: Tasks, memory: Workspace) -> tuple[Tensor, Tensor]:
    """The maxima of the blocks (B,) and of their groups (B, BLOCK) of all tasks, for x (Q, d) relative to the origin.

    The maxima of the groups are stored in `memory`.
    """
    host = host_tasks(lists, tasks)
    stored = [visits * blocks for visits, blocks in zip(host.visits, host.blocks, strict=True)]
    total, sampled = sum(stored), sum(itertools.compress(stored, host.sampled))
    fine = memory.take(total, BLOCK)
    if sampled:
        _sample_blocks(x, lists, tasks, fine)
    if sampled < total:
        _multiply_lists(x, lists, tasks, host, fine, blank=False)
    coarse = fine.amax(1)
    if sampled < total and not bool(coarse.amax() < -PADDING):
        # A product overflowed. As the maximum of its group it would hide the other rows, so it is set to -inf first.
        _multiply_lists(x, lists, tasks, host, fine, blank=True)
        torch.amax(fine, 1, out=coarse)
    return coarse, fine


def _multiply_lists(
    x: Tensor, lists: InvertedLists, tasks: Tasks, host: HostTasks, fine: Tensor, *, blank: bool
) -> None:
    """Write the maxima of the lists that are not sampled to `fine` (B, BLOCK); `blank` sets overflow to -inf first."""
    for part in section_scores(x, lists, tasks, host):
        count, rows = part.scores.shape
        if blank:
            part.scores.nan_to_num_(nan=PADDING, posinf=PADDING, neginf=PADDING)
        start, visits, first = host.before[part.list], host.visits[part.list], part.row // SPAN
        maxima = fine[start : start + visits * host.blocks[part.list]].view(visits, -1)[part.task : part.task + count]
        groups = rows // GROUP
        section = maxima[:, first * BLOCK : (first + -(-rows // SPAN)) * BLOCK]
        torch.amax(part.scores.view(count, GROUP, groups), 1, out=section[:, :groups])
        if groups < section.shape[1]:
            section[:, groups:] = PADDING


def _sampled_blocks(tasks: Tasks) -> Tensor:
    """Blocks of the sampled product in each list (L + 1,)."""
    return tasks.visits * tasks.blocks * tasks.sampled


def _sample_blocks(x: Tensor, lists: InvertedLists, tasks: Tasks, fine: Tensor) -> None:
    """Write the maxima of the sampled lists to `fine` (B, BLOCK). A block is one row of the product, SPAN entries."""
    stored = _sampled_blocks(tasks)
    list_of = torch.repeat_interleave(torch.arange(stored.shape[0], device=x.device), stored)
    first_task, first_block = tasks.visits.cumsum(0) - tasks.visits, stored.cumsum(0) - stored
    for start in range(0, list_of.shape[0], _BLOCKS):
        number = list_of[start : start + _BLOCKS]
        position = torch.arange(start, start + number.shape[0], device=x.device) - first_block[number]
        task = _quotient(position, tasks.blocks[number])
        block = position - task * tasks.blocks[number]
        task = first_task[number] + task
        at = group_rows(lists, number, block * BLOCK, None if tasks.limits is None else tasks.limits[task])
        query = x.index_select(0, tasks.queries[task])
        runs = at.first[:, None] + at.stride[:, None] * torch.arange(GROUP, device=x.device)
        rows = runs[:, :, None] + torch.arange(BLOCK, device=x.device)  # (b, GROUP, BLOCK)
        bias = lists.bias.unfold(0, BLOCK, 1)[runs] if lists.bias.shape[0] else x.new_zeros(rows.shape)
        scores = sampled_product(query, lists.packed, rows.flatten(1), bias.flatten(1)).view(rows.shape)
        partial = torch.nonzero(at.group + (GROUP - 1) * at.stride + BLOCK > at.size)[:, 0]
        if partial.shape[0]:
            unused = _unused_entries(GroupRows(*(field[partial] for field in at)))
            scores[partial] = scores[partial].masked_fill_(unused, PADDING)
        fine[tasks.before[number] + position] = scores.nan_to_num_(nan=PADDING, posinf=PADDING, neginf=PADDING).amax(1)


def _unused_entries(at: GroupRows) -> Tensor:
    """Entries (b, GROUP, BLOCK) of sampled blocks that are no row of the section; `at` is the first group of each."""
    group = at.group[:, None, None] + torch.arange(BLOCK, device=at.group.device)
    row = group + at.stride[:, None, None] * torch.arange(GROUP, device=group.device)[:, None]
    return (group >= at.stride[:, None, None]) | (row >= at.size[:, None, None])


def group_rows(lists: InvertedLists, number: Tensor, group: Tensor, limits: Tensor | None = None) -> GroupRows:
    """The rows of groups. number, group (...): the list of each, and its group counted in that list.

    `limits` (...) are the rows to read of the list. The division into groups does not depend on them.
    """
    section = _quotient(group, SECTION // GROUP)
    within = group - section * (SECTION // GROUP)
    size = (lists.sizes[number] - section * SECTION).clamp_(max=SECTION)
    first = lists.offsets[number] + section * SECTION + within
    stride = _quotient(size + (GROUP - 1), GROUP)
    if limits is not None:
        size = torch.minimum(size, limits - section * SECTION)
    return GroupRows(first, within, stride, size)


def _quotient(x: Tensor, y: Tensor | int) -> Tensor:
    return torch.div(x, y, rounding_mode="floor")
