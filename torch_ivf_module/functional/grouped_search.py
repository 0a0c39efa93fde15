"""Search among the rows of one group for each query, and results with at most so many rows of a group.

Both are searches of other lists or for more results: see cells. Q queries, L lists, P probes, d dim, k results, H hits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import filtered_search, range_scan
from .cells import NO_GROUP, Cells, cells_probed, groups_at
from .filters import Filter
from .kernels import Kernel, kernel_for
from .lists import InvertedLists, ids_at
from .options import SearchOptions
from .probe import Coarse, probe
from .scan_above import group_by_query
from .search import capped_lists, finite_queries, merge_segments
from .search import search as search_lists
from .stats import Stats, add_stats

_MORE = 4  # how many times as many rows are searched for where those found have too many of one group
_RESULT_BYTES = 96  # workspace for each row found of a query: score, row, id, group, and what sorts them


def search(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    cells: Sequence[Cells],
    groups: Tensor,
    options: SearchOptions,
    filter: Filter | None = None,
    *,
    stats: Stats | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`search.search` of those rows alone that have the group of their query, groups (Q,), and pass its filter; `cells`
    of each segment.

    Reads these rows of the probed lists and no others. `max_codes` counts all rows of a list. There is no budget.
    """
    kernel, results = kernel_for(x), []
    lists = probed_lists(x, coarse, segments, options, kernel)
    for segment, own in zip(segments, cells, strict=True):
        part, probed = cells_probed(own, segment, lists, groups, kernel)
        results.append(search_filtered(x, coarse, [part], options, filter, probed=probed, stats=stats))
    if len(results) == 1:
        return results[0]
    scores, rows = merge_segments(segments, [found[:2] for found in results], options.k)
    return scores, rows, ids_at([part.ids for part in segments], rows)


def search_filtered(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    options: SearchOptions,
    filter: Filter | None,
    *,
    probed: Tensor | None = None,
    stats: Stats | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`search.search`, or with a filter `filtered_search.search`, that adds to `stats`."""
    own: Stats | None = None if stats is None else {}
    if filter is None:
        found = search_lists(x, coarse, segments, options, probed=probed, stats=own)
    else:
        found = filtered_search.search(x, coarse, segments, options, filter, orders=None, probed=probed, stats=own)
    if stats is not None and own is not None:
        add_stats(stats, own)
    return found


def range_search(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    cells: Sequence[Cells],
    groups: Tensor,
    options: SearchOptions,
    filter: Filter | None = None,
    *,
    score: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`range_scan.range_search` of those rows alone that have the group of their query, groups (Q,), and pass its
    filter."""
    kernel = kernel_for(x)
    lists = probed_lists(x, coarse, segments, options._replace(max_codes=None), kernel)
    queries, scores, rows, before = [lists.new_empty(0)], [x.new_empty(0)], [lists.new_empty(0)], 0
    for segment, own in zip(segments, cells, strict=True):
        part, probed = cells_probed(own, segment, lists, groups, kernel)
        if probed.numel():
            lims, found, at = range_scan.range_search(
                x,
                coarse,
                [part],
                score=score,
                nprobe=options.nprobe,
                metric=options.metric,
                max_bytes=options.max_bytes,
                probed=probed,
                filter=filter,
            )
            queries.append(torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), lims.diff()))
            scores.append(found)
            rows.append(at + before)
        before += segment.packed.shape[0]
    lims, order = group_by_query(torch.cat(queries), x.shape[0])
    return lims, torch.cat(scores)[order], torch.cat(rows)[order]


def probed_lists(
    x: Tensor, coarse: Coarse, segments: Sequence[InvertedLists], options: SearchOptions, kernel: Kernel | None
) -> Tensor:
    """The lists (Q, P) that queries read, nearest first, L for none."""
    x, finite = finite_queries(x)
    nearest = probe(x, coarse, options.nprobe, options.metric, kernel)
    return capped_lists(nearest, finite, coarse, segments, options.max_codes)[0]


def spread(
    find: Callable[[Tensor, int], tuple[Tensor, ...]],
    cells: Sequence[Cells],
    queries: int,
    options: SearchOptions,
    most: int,
) -> tuple[Tensor, Tensor]:
    """The k best rows of each query of which at most `most` have the same group: scores and rows (Q, k).

    ``find(which, n)`` returns the n best scores and rows of the queries (q,), and perhaps more that is not used;
    `cells` are those of each segment. Where the rows found are not enough, more are searched for, until there are no
    others. Rows without a group are not limited.
    """
    k, wanted, device = options.k, options.k, cells[0].offsets.device
    scores = torch.empty(queries, k, device=device)
    rows, which = torch.empty_like(scores, dtype=torch.int64), torch.arange(queries, device=device)
    total = sum(int(part.offsets[-1]) for part in cells)
    while True:
        unfinished = []
        for part in which.split(max(1, options.max_bytes // (_RESULT_BYTES * wanted))):
            found, at, *_ = find(part, wanted)
            kept = (at >= 0) & within_group(groups_at(cells, at), most)
            order = torch.sort((~kept).to(torch.uint8), dim=1, stable=True).indices[:, :k]
            missing = ~kept.gather(1, order)
            scores[part] = found.gather(1, order).masked_fill(missing, -torch.inf)
            rows[part] = at.gather(1, order).masked_fill(missing, -1)
            unfinished.append(part[(kept.sum(1) < k) & (at[:, -1] >= 0)])
        which = torch.cat(unfinished)
        if not which.shape[0] or wanted >= total:
            return scores, rows
        wanted = min(_MORE * wanted, total)


def within_group(groups: Tensor, most: int) -> Tensor:
    """Which of the groups (Q, K) are among the first `most` of their value in their row; all that are NO_GROUP."""
    ordered, order = torch.sort(groups, dim=1, stable=True)
    first = torch.searchsorted(ordered, ordered)
    rank = torch.arange(groups.shape[1], device=groups.device) - first
    return torch.empty_like(rank, dtype=torch.bool).scatter_(1, order, (rank < most) | (ordered == NO_GROUP))
