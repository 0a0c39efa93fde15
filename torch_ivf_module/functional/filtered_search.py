"""Search with a filter for each query: by a kernel that reads the filter, or the rows that pass, scored exactly.

Q queries, L lists, P probes, N vectors, k results, K candidates a query, H pairs of a query and an id or row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .codec import Codes
from .filters import Filter
from .id_lookup import IdOrder, rows_with
from .kernels import Kernel, kernel_for
from .lists import InvertedLists, ids_at, lists_of, offsets_of
from .options import Probes, SearchOptions
from .probe import Coarse, probe
from .rescore import rescore
from .scan_above import hits_by_query
from .score_rows import score_rows
from .search import capped_lists, finite_queries, probes_by_segment
from .search import search as search_unfiltered
from .select import merge, select_topk
from .stats import Stats, count_certified, count_rows, count_scored, record_mode, start_stats

# Looking up an allowed id and scoring its rows takes as long as asking so many rows whether they pass, and the calls of
# a lookup as long as _CALLS_ROWS; by a kernel, and by PyTorch operations.
_LOOKUP_ROWS, _CALLS_ROWS = {True: 64, False: 2}, 1 << 19
_PAIR_BYTES = 160  # workspace for an allowed id until its row is scored


def search(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    options: SearchOptions,
    filter: Filter,
    *,
    orders: Sequence[IdOrder] | None,
    codes: Codes | None = None,
    probed: Tensor | None = None,
    stats: Stats | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`search.search` of those rows alone that pass the filter of each query.

    With `orders` of the ids of each segment the rows of the allowed ids are looked up: that takes time for these alone.
    Otherwise the probed lists are read.
    """
    kernel = kernel_for(x)
    if orders is None and _by_kernel(kernel, segments, options):
        return search_unfiltered(
            x, coarse, segments, options, codes=codes, probed=probed, stats=stats, filter=filter
        )
    if stats is not None:
        start_stats(stats, x.shape[0], options.nprobe)
    scores, rows = _nothing(filter.numbers, x, options.k)
    nlist, lookup = coarse.centroids.shape[0], orders is not None
    for queries in runs(filter, nlist, options.nprobe, options.max_bytes, lookup=lookup):
        lists = None if probed is None else probed[queries]
        args = x[queries], coarse, segments, options, filter.at(queries), orders, kernel, lists, stats
        scores[queries], rows[queries] = _search_run(*args)
    return scores, rows, ids_at([lists.ids for lists in segments], rows)


def few_allowed(filter: Filter, lists: InvertedLists, options: SearchOptions) -> bool:
    """Whether looking up the lists of allowed ids takes less time than reading the probed lists."""
    if filter.allowed is None:
        return False
    queries, most = filter.numbers.shape[0], min(1.0, options.nprobe / max(1, lists.sizes.shape[0] - 1))
    fast = _by_kernel(kernel_for(lists.bias.new_empty(0)), [lists], options)
    needed = _LOOKUP_ROWS[fast] * filter.allowed.ids.shape[0] + (_CALLS_ROWS if fast else 0)
    return needed <= queries * lists.ids.shape[0] * most


def _by_kernel(kernel: Kernel | None, segments: Sequence[InvertedLists], options: SearchOptions) -> bool:
    plain = options.mode == "auto" and not options.exact
    return plain and kernel is not None and kernel.filters() and kernel.serves(segments[0].packed)


def runs(filter: Filter, nlist: int, nprobe: int, max_bytes: int, *, lookup: bool) -> Iterator[Tensor]:
    """Queries to search at a time, positions (q,). With `lookup` those of similarly many allowed ids, whose rows are
    padded to the same number."""
    total = filter.numbers.shape[0]
    most = max(1, max_bytes // 4 // (8 * (nlist + 1) + 112 * (nprobe + 1)))
    if not lookup or filter.allowed is None:
        yield from torch.arange(total, device=filter.numbers.device).split(most)
        return
    counts, order = (filter.allowed.last - filter.allowed.first)[filter.numbers].sort(descending=True)
    start = 0
    while start < total:
        fits = max_bytes // 2 // (_PAIR_BYTES * max(1, int(counts[start])))
        yield order[start : start + max(1, min(most, fits))]
        start += max(1, min(most, fits))


def _search_run(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    options: SearchOptions,
    filter: Filter,
    orders: Sequence[IdOrder] | None,
    kernel: Kernel | None,
    probed: Tensor | None,
    stats: Stats | None,
) -> tuple[Tensor, Tensor]:
    """Exact scores and rows (Q, k) of the k best rows that pass, for as many queries as fit into memory."""
    x, finite = finite_queries(x)
    limits = None
    if probed is None:
        nearest = probe(x, coarse, options.nprobe, options.metric, kernel)
        probed, limits = capped_lists(nearest, finite, coarse, segments, options.max_codes, options.budget)
    results, before = [_nothing(probed, x, options.k)], 0
    for number, (lists, probes) in enumerate(probes_by_segment(x, segments, probed, limits)):
        if stats is not None:
            count_rows(stats, lists, probes)
        if lists.packed.shape[0] and probed.numel():
            if orders is None:
                record_mode(stats, "rows", "a filter for each query")
                scores, rows, _ = score_rows(probes, lists, options, stats, filter)
            else:
                record_mode(stats, "ids", "few ids are allowed")
                candidates = allowed_rows(probes, lists, filter, orders[number])
                count_scored(stats, candidates)
                scores, rows = rescore(x, lists.packed, candidates, options.k, options.metric)
            results.append((scores, torch.where(rows < 0, -1, rows + before)))
        before += lists.packed.shape[0]
    if stats is not None and not options.exact:
        count_certified(stats, [torch.zeros_like(finite[:, 0])])
    return merge(results, options.k)


def allowed_rows(probes: Probes, lists: InvertedLists, filter: Filter, order: IdOrder) -> Tensor:
    """The rows (Q, K) of the allowed ids of each query that lie where it reads, and are not masked; -1 for padding.

    `order` is that of the ids of the lists. Synchronizes with the device.
    """
    assert filter.allowed is not None
    first, last = filter.allowed.first[filter.numbers], filter.allowed.last[filter.numbers]
    queries = torch.arange(first.shape[0], device=first.device).repeat_interleave(last - first)
    before = (last - first).cumsum(0) - (last - first)
    ids = filter.allowed.ids[torch.arange(queries.shape[0], device=first.device) + (first - before)[queries]]
    if filter.excluded is not None:
        kept = torch.nonzero(~filter.excluded.contain(filter.numbers[queries], ids))[:, 0]
        queries, ids = queries[kept], ids[kept]
    rows, which = rows_with(lists.ids, order, ids)
    queries = queries[which]
    number = lists_of(lists.offsets, rows, lists.ids.shape[0])
    read = probes.lists.new_zeros(first.shape[0], lists.sizes.shape[0])  # rows to read of each list
    read.scatter_(1, probes.lists, probes.sizes(lists))
    inside = rows - lists.offsets[number] < read[queries, number]
    if lists.bias.shape[0]:
        inside &= ~torch.isneginf(lists.bias[rows])
    kept = torch.nonzero(inside)[:, 0]
    return hits_by_query(offsets_of(queries[kept], first.shape[0]), rows[kept])


def _nothing(like: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and rows (Q, k) of padding."""
    return select_topk(x.new_empty(x.shape[0], 0), like.new_empty(x.shape[0], 0), k)
