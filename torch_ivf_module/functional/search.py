"""Search: probe, scan, exact scores of the candidates, second pass for uncertified queries, merge of the segments.

Q queries, L lists, P probes, d dim, k results, K candidates a query. Functions here return rows. The rows of a segment
are numbered after all rows of the segments before it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import budget as budgets
from . import metric as metrics
from .budget import Budget
from .chunking import in_chunks
from .codec import Codes
from .filters import Filter
from .kernels import Kernel, kernel_for
from .lists import InvertedLists, ids_at
from .options import Probes, SearchOptions
from .probe import Coarse, probe
from .rescore import rescore
from .scan_above import hits_by_query, scan_above
from .score_rows import ROW_BYTES, score_rows
from .select import merge, select_topk
from .stats import Stats, count_certified, count_rows, count_scored, record_mode, start_stats
from .strategies import strategy

# Workspace for what a scan allocates besides its maxima or candidates; half of max_bytes if that is less.
_RESERVED_BYTES = 64 << 20
_NATIVE = "native", "there is a kernel for this device"  # mode and reason in the stats
_CODES = "codes", "there are 8-bit codes of the rows for the kernel of this device"


def search(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    options: SearchOptions,
    *,
    codes: Codes | None = None,
    probed: Tensor | None = None,
    stats: Stats | None = None,
    filter: Filter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best rows of the `nprobe` nearest lists: exact scores, rows and ids, each (Q, k).

    x (Q, d) float32 as `metric.prepare` gives it. Call under `torch.no_grad` (`transforms.scored` gives differentiable
    scores). `segments` are one or more sets of inverted lists over the same centroids, `codes` those of the first, if
    any, which a kernel reads before its rows. `probed` (Q, P), if given, are the lists that each query reads, nearest
    first, L for none; `nprobe`, `max_codes` and `budget` are then ignored. `stats`, if given, is filled. A `filter` is
    for searches by a kernel alone: see filtered_search.
    """
    if stats is not None:
        start_stats(stats, x.shape[0], options.nprobe)
    kernel = kernel_for(x)
    if kernel is not None and options.mode == "auto" and not options.exact and kernel.serves(segments[0].packed):
        return _search_by_kernel(kernel, x, coarse, segments, codes, options, probed, stats, filter)
    step = max(1, options.max_bytes // 4 // _query_bytes(coarse.centroids.shape[0], x.shape[1], options))
    tensors = (x,) if probed is None else (x, probed)
    chunk = functools.partial(_search_chunk, coarse, segments, options, kernel, stats)
    scores, rows = chunk(*tensors) if x.shape[0] <= step else in_chunks(chunk, step, *tensors)
    return scores, rows, ids_at([lists.ids for lists in segments], rows)


def candidate_count(k: int) -> int:
    """Candidates per query that are scored exactly: more than k, since the scan ranks by a rounded score.

    More candidates take more time for every query, but fewer queries are then uncertified. With 60 instead of 33
    (k = 20), a search of Gaussian data, where all queries are certified, takes 10 to 20% longer; of image patches, 17%
    of the queries are uncertified instead of 21%.
    """
    return k + 8 + k // 4


def finite_queries(x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries x (Q, d) with non-finite queries set to zero, and which queries are finite, bool (Q, 1)."""
    finite = (x * 0).sum(1, keepdim=True) == 0  # 0 * inf and 0 * NaN are NaN
    return x.masked_fill(~finite, 0), finite


def shifted_queries(x: Tensor, origin: Tensor, metric: str) -> Tensor:
    """Finite queries x (Q, d) as a scan takes them: relative to the origin, all numbers finite."""
    return metrics.shift(x, origin, metric).nan_to_num(nan=0, posinf=0, neginf=0)


def capped_lists(
    nearest: tuple[Tensor, Tensor],
    finite: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    max_codes: int | None = None,
    budget: Budget | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The lists (Q, P) that each query reads, and with a budget the rows to read of each (Q, P), else None.

    `nearest` are the scores and lists (Q, P) that `probe` gives, nearest first; `finite` (Q, 1) says which queries are.
    A list that `max_codes` leaves out, and every list of a query that is not finite, becomes L. The limits of rows
    count over all segments together, in their order.
    """
    nlist = coarse.centroids.shape[0]
    scores, probed = nearest
    probed = probed.masked_fill_(~finite, nlist)
    if max_codes is None and budget is None:
        return probed, None
    sizes = torch.stack([lists.sizes for lists in segments]).sum(0)[probed]
    limits = None if budget is None else budgets.row_limits(scores, sizes, budget)
    if max_codes is not None:
        left_out = ~budgets.within_max_codes(sizes if limits is None else limits, max_codes)
        probed = probed.masked_fill(left_out, nlist)
        limits = None if limits is None else limits.masked_fill(left_out, 0)
    return probed, limits


def _search_by_kernel(
    kernel: Kernel,
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    codes: Codes | None,
    options: SearchOptions,
    probed: Tensor | None,
    stats: Stats | None,
    filter: Filter | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`search` by one call of a kernel. A budget or `stats` needs the probed lists, so they are probed before it."""
    limits = None
    if probed is None and (options.budget is not None or stats is not None):
        x, finite = finite_queries(x)
        nearest = probe(x, coarse, options.nprobe, options.metric, kernel)
        probed, limits = capped_lists(nearest, finite, coarse, segments, options.max_codes, options.budget)
    scores, rows, ids, second_pass, scored = kernel.search(
        x,
        coarse,
        segments,
        codes,
        probed,
        limits,
        k=options.k,
        kept=candidate_count(options.k),
        nprobe=options.nprobe,
        max_codes=options.max_codes,
        metric=options.metric,
        max_bytes=options.max_bytes,
        filter=filter,
    )
    if stats is not None and probed is not None:
        for lists, probes in probes_by_segment(x, segments, probed, limits):
            count_rows(stats, lists, probes)
            if lists.packed.shape[0] and probed.numel():
                record_mode(stats, *(_NATIVE if codes is None or lists is not segments[0] else _CODES))
        count_certified(stats, [second_pass])
        by_codes = codes is not None or not segments[0].packed.is_floating_point()
        stats["rows_scored"] = int(scored.sum()) if by_codes else None  # of floats the kernel does not count them
    return scores, rows, ids


def probes_by_segment(
    x: Tensor, segments: Sequence[InvertedLists], probed: Tensor, limits: Tensor | None
) -> Iterator[tuple[InvertedLists, Probes]]:
    """Each segment with its probes; `limits` (Q, P) count the rows of a list over all segments, in their order."""
    for lists in segments:
        of_segment = None if limits is None else torch.minimum(limits, lists.sizes[probed])
        yield lists, Probes(x, probed, of_segment)
        limits = None if limits is None or of_segment is None else limits - of_segment


def _search_chunk(
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    options: SearchOptions,
    kernel: Kernel | None,
    stats: Stats | None,
    x: Tensor,
    probed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`search` by PyTorch operations for one chunk of queries: scores and rows (Q, k)."""
    x, finite = finite_queries(x)
    limits = None
    if probed is None:
        nearest = probe(x, coarse, options.nprobe, options.metric, kernel)
        probed, limits = capped_lists(nearest, finite, coarse, segments, options.max_codes, options.budget)
    results = []
    for lists, probes in probes_by_segment(x, segments, probed, limits):
        if stats is not None:
            count_rows(stats, lists, probes)
        results.append(_search_segment(probes, coarse.origin, lists, options, stats))
    if stats is not None and not options.exact:
        count_certified(stats, [second_pass for _, _, second_pass in results])
    if len(results) == 1:
        return results[0][:2]
    return merge_segments(segments, [(scores, rows) for scores, rows, _ in results], options.k)


def _search_segment(
    probes: Probes,
    origin: Tensor,
    lists: InvertedLists,
    options: SearchOptions,
    stats: Stats | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best rows of one segment: exact scores and rows (Q, k), and which queries (Q,) took a second pass."""
    if lists.packed.shape[0] == 0 or probes.lists.numel() == 0:
        return _padding(probes, options.k)
    if options.exact:
        record_mode(stats, "exact", "profile")
        return score_rows(probes, lists, options, stats)
    return _scan(probes, origin, lists, options, stats)


def _scan(
    probes: Probes, origin: Tensor, lists: InvertedLists, options: SearchOptions, stats: Stats | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_search_segment` in PyTorch operations: scan, exact scores of the candidates, second pass."""
    width = probes.width(lists)
    if width == 0:
        return _padding(probes, options.k)
    count = candidate_count(options.k)
    shifted = shifted_queries(probes.x, origin, options.metric)
    mode, why, scan = strategy(probes, shifted, lists, options, count, width)
    record_mode(stats, mode, why)
    if mode == "matrix" and not shifted.is_cpu:
        # There the scan gathers rows, and exact scores of them take no second pass, which would wait for the device.
        return score_rows(probes, lists, options, stats)
    ranking, candidates = scan(shifted, lists, probes.lists, probes.limits, count, width, _scan_bytes(options))
    count_scored(stats, candidates)
    scores, rows = rescore(probes.x, lists.packed, candidates, options.k, options.metric)
    if not metrics.by_differences(options.metric):
        return scores, rows, torch.zeros_like(rows[:, 0], dtype=torch.bool)
    # No row that the scan left out has a ranking score above that of the last candidate.
    lowest = ranking[:, count - 1] if ranking.shape[1] >= count else ranking.new_full((ranking.shape[0],), -torch.inf)
    uncertified = metrics.uncertified(probes.x, origin, lowest, scores[:, -1])
    step = options.max_bytes // (ROW_BYTES * width)
    for queries in torch.nonzero(uncertified)[:, 0].split(max(1, step)):
        if not queries.shape[0]:  # `split` gives one part of nothing
            break
        if step:
            scores[queries], rows[queries] = _second_pass(
                probes.at(queries), shifted[queries], origin, lists, scores[queries, -1], options, stats
            )
        else:  # the rows of one query may take more than max_bytes together
            scores[queries], rows[queries], _ = score_rows(probes.at(queries), lists, options, stats)
    return scores, rows, uncertified


def _second_pass(
    probes: Probes,
    shifted: Tensor,
    origin: Tensor,
    lists: InvertedLists,
    kth: Tensor,
    options: SearchOptions,
    stats: Stats | None,
) -> tuple[Tensor, Tensor]:
    """Exact scores and rows (Q, k) of the k best among all rows whose ranking score allows an exact score above `kth`.

    `kth` (Q,) is the exact score of the k-th best candidate, `shifted` (Q, d) the queries relative to the origin.
    """
    threshold = metrics.needed_ranking(probes.x, origin, kth)
    candidates = hits_by_query(*scan_above(shifted, lists, probes.lists, probes.limits, threshold))
    count_scored(stats, candidates)
    return rescore(probes.x, lists.packed, candidates, options.k, options.metric)


def _padding(probes: Probes, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The result of `_search_segment` for queries that read no row."""
    queries = probes.x.shape[0]
    scores, rows = select_topk(probes.x.new_empty(queries, 0), probes.lists.new_empty(queries, 0), k)
    return scores, rows, torch.zeros(queries, dtype=torch.bool, device=rows.device)


def merge_segments(
    segments: Sequence[InvertedLists], results: Sequence[tuple[Tensor, Tensor]], k: int
) -> tuple[Tensor, Tensor]:
    """The k best of the results of all segments, with rows numbered over all segments."""
    renumbered, before = [], 0
    for lists, (scores, rows) in zip(segments, results, strict=True):
        renumbered.append((scores, torch.where(rows < 0, -1, rows + before)))
        before += lists.packed.shape[0]
    return merge(renumbered, k)


def _scan_bytes(options: SearchOptions) -> int:
    """Workspace for the maxima or candidates of a scan."""
    return options.max_bytes - min(options.max_bytes // 2, _RESERVED_BYTES)


def _query_bytes(nlist: int, d: int, options: SearchOptions) -> int:
    """Memory that a query takes outside the scan: copies of it, its probes, its candidates, their exact scores."""
    return 20 * d + 32 * min(nlist, options.nprobe) + 48 * candidate_count(options.k)
