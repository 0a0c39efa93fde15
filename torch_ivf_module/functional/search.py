"""Search: probe, scan, score the candidates exactly, settle what is in doubt, merge.

Q queries, L lists, P probes, d dim, k results, W candidates a query. Everything here speaks of rows; a row of
segment s counts on from the rows of the segments before it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import budget as budgets
from . import metric as metrics
from .budget import Budget
from .chunking import in_chunks
from .cost import cheapest
from .kernels import Kernel, Scan, kernel_for
from .lists import InvertedLists
from .probe import Coarse, probe
from .rescore import rescore
from .scan_above import as_rectangle, every_candidate, scan_above
from .scan_lists import scan_lists
from .scan_queries import scan_queries
from .select import merge, select_topk

Stats = dict[str, Any]

STRATEGIES: dict[str, Scan] = {"csr": scan_lists, "matrix": scan_queries}
MODES = ("auto", *STRATEGIES)

_HIT_BYTES = 128  # of a row above a threshold, until its exact score is known
_ASIDE_BYTES = 64 << 20  # for what a scan holds beside its maxima or candidates, half of max_bytes if that is less


class SearchOptions(NamedTuple):
    """What a search is told besides tensors."""

    k: int
    nprobe: int
    metric: str
    mode: str = "auto"  # one of MODES
    max_codes: int | None = None
    budget: Budget | None = None
    max_bytes: int = 256 << 20  # workspace
    exact: bool = False  # score every row of the probed lists exactly, instead of the best by ranking score


class Probes(NamedTuple):
    """What a scan of one segment reads."""

    x: Tensor  # (Q, d) finite queries as `metric.prepare` gives them
    lists: Tensor  # (Q, P) nearest first, L for none
    limits: Tensor | None  # (Q, P) the rows to read of each list, None for all

    def at(self, queries: Tensor) -> Probes:
        """Those of some queries (q,)."""
        return Probes(self.x[queries], self.lists[queries], None if self.limits is None else self.limits[queries])

    def sizes(self, lists: InvertedLists) -> Tensor:
        """Rows that each query reads of each of its lists, (Q, P)."""
        return lists.sizes[self.lists] if self.limits is None else self.limits


def search(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    options: SearchOptions,
    *,
    probed: Tensor | None = None,
    stats: Stats | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best rows of the `nprobe` nearest lists: exact scores (Q, k) and rows (Q, k). See `search_ids`."""
    return search_ids(x, coarse, segments, options, probed=probed, stats=stats)[:2]


def search_ids(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    options: SearchOptions,
    *,
    probed: Tensor | None = None,
    stats: Stats | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`search`, and the ids of the rows: exact scores, rows and ids, each (Q, k).

    x (Q, d) float32 as `metric.prepare` gives it; to be called under `torch.no_grad` (`transforms.scored` gives scores
    that are differentiable). `segments` are one or more sets of inverted lists over the same centroids. `probed`
    (Q, P), where given, are the lists that each query reads, nearest first, L for none; `nprobe`, `max_codes` and
    `budget` are then ignored. `stats`, where given, is filled.
    """
    if stats is not None:
        stats.update(queries=x.shape[0], nprobe=options.nprobe, mode=None, why="nothing to read")
        stats.update(lists_read=0, rows_read=0, rows_left_out=0, certified=0, searched_again=0)
    kernel = kernel_for(x)
    served = kernel is not None and all(kernel.serves(lists.packed) for lists in segments)
    if kernel is not None and served and options.mode == "auto" and not options.exact:
        return _by_kernel(kernel, x, coarse, segments, options, probed, stats)
    step = max(1, options.max_bytes // 4 // _query_bytes(coarse.centroids.shape[0], x.shape[1], options))
    if x.shape[0] <= step:
        scores, rows = _search_batch(coarse, segments, options, kernel, stats, x, probed)
    else:
        given = (x,) if probed is None else (x, probed)
        batch = functools.partial(_search_batch, coarse, segments, options, kernel, stats)
        scores, rows = in_chunks(batch, step, *given)
    return scores, rows, lookup([lists.ids for lists in segments], rows)


def kept_for(k: int) -> int:
    """Candidates that are scored exactly: a few more than k, since the scan ranks by a rounded score.

    Each candidate more costs every query, and leaves fewer in doubt: with 60 instead of 33 (k = 20) Gaussian data, of
    which none is in doubt, take 10 to 20% longer; of image patches 17% are in doubt instead of 21%.
    """
    return k + 8 + k // 4


def finite_queries(x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries x (Q, d) with zeros in place of those that are not finite, and which are (Q, 1)."""
    finite = (x * 0).sum(1, keepdim=True) == 0  # 0 * inf and 0 * NaN are NaN
    return x.masked_fill(~finite, 0), finite


def shifted_queries(x: Tensor, origin: Tensor, metric: str) -> Tensor:
    """Finite queries x (Q, d) as a scan takes them: relative to the origin, all numbers finite."""
    return metrics.shift(x, origin, metric).nan_to_num(nan=0, posinf=0, neginf=0)


def capped_lists(
    found: tuple[Tensor, Tensor],
    finite: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    max_codes: int | None = None,
    budget: Budget | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The lists (Q, P) that each query reads, nearest first, L where a cap or a bad query leaves none; and, where a
    budget is given, the rows to read of each (Q, P), counted on from segment to segment.

    `found` are the scores and lists (Q, P) that probing gives, `finite` (Q, 1) says which queries are.
    """
    nlist = coarse.centroids.shape[0]
    scores, probed = found
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


def _by_kernel(
    kernel: Kernel,
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    options: SearchOptions,
    probed: Tensor | None,
    stats: Stats | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`search_ids` in one call. The lists are chosen before only where a budget or `stats` asks for what is read."""
    limits = None
    if probed is None and (options.budget is not None or stats is not None):
        x, finite = finite_queries(x)
        nearest = probe(x, coarse, options.nprobe, options.metric, kernel)
        probed, limits = capped_lists(nearest, finite, coarse, segments, options.max_codes, options.budget)
    scores, rows, ids, again = kernel.search(
        x,
        coarse,
        segments,
        probed,
        limits,
        k=options.k,
        kept=kept_for(options.k),
        nprobe=options.nprobe,
        max_codes=options.max_codes,
        metric=options.metric,
        max_bytes=options.max_bytes,
    )
    if stats is not None and probed is not None:
        for lists, probes in _by_segment(x, segments, probed, limits):
            _count(stats, lists, probes)
            if lists.packed.shape[0] and probed.numel():
                _note_mode(stats, "native", "there is a kernel for this device")
        _count_doubt(stats, [again])
    return scores, rows, ids


def _by_segment(
    x: Tensor, segments: Sequence[InvertedLists], probed: Tensor, limits: Tensor | None
) -> Iterator[tuple[InvertedLists, Probes]]:
    """Each segment and what is read of it."""
    for lists in segments:
        here = None if limits is None else torch.minimum(limits, lists.sizes[probed])
        yield lists, Probes(x, probed, here)
        limits = None if limits is None or here is None else limits - here


def _search_batch(
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    options: SearchOptions,
    kernel: Kernel | None,
    stats: Stats | None,
    x: Tensor,
    probed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    x, finite = finite_queries(x)
    limits = None
    if probed is None:
        nearest = probe(x, coarse, options.nprobe, options.metric, kernel)
        probed, limits = capped_lists(nearest, finite, coarse, segments, options.max_codes, options.budget)
    found = []
    for lists, probes in _by_segment(x, segments, probed, limits):
        if stats is not None:
            _count(stats, lists, probes)
        found.append(_search_segment(probes, coarse.origin, lists, options, stats))
    if stats is not None and not options.exact:
        _count_doubt(stats, [again for _, _, again in found])
    if len(found) == 1:
        return found[0][:2]
    return _merge(segments, [(scores, rows) for scores, rows, _ in found], options.k)


def _search_segment(
    probes: Probes,
    origin: Tensor,
    lists: InvertedLists,
    options: SearchOptions,
    stats: Stats | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best rows of one segment: exact scores and rows (Q, k), and which queries (Q,) took a second pass."""
    if lists.packed.shape[0] == 0 or probes.lists.numel() == 0:
        return _nothing(probes, options.k)
    if options.exact:
        _note_mode(stats, "exact", "profile")
        return _score_every_row(probes, lists, options)
    return _scan(probes, origin, lists, options, stats)


def _scan(
    probes: Probes, origin: Tensor, lists: InvertedLists, options: SearchOptions, stats: Stats | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`_search_segment` by PyTorch operations: rank, score the candidates exactly, settle doubtful queries."""
    width = min(int(probes.sizes(lists).sum(1).max()), lists.packed.shape[0])
    if width == 0:
        return _nothing(probes, options.k)
    kept = kept_for(options.k)
    mode, why = options.mode, "search_mode"
    y = shifted_queries(probes.x, origin, options.metric)
    if mode == "auto":
        mode, why = cheapest(y, lists, probes.lists, probes.limits, kept, width)
    _note_mode(stats, mode, why)
    ranking, rows = STRATEGIES[mode](y, lists, probes.lists, probes.limits, kept, width, _scan_bytes(options))
    scores, best = rescore(probes.x, lists.packed, rows, options.k, options.metric)
    if not metrics.by_differences(options.metric):
        return scores, best, torch.zeros_like(best[:, 0], dtype=torch.bool)
    lowest = ranking[:, kept - 1] if ranking.shape[1] >= kept else ranking.new_full((ranking.shape[0],), -torch.inf)
    doubtful = metrics.doubtful(probes.x, origin, lowest, scores[:, -1])
    step = options.max_bytes // (_HIT_BYTES * width)
    for at in torch.nonzero(doubtful)[:, 0].split(max(1, step)):
        if step:
            scores[at], best[at] = _settle(probes.at(at), y[at], origin, lists, scores[at, -1], options)
        elif at.shape[0]:  # the rows of one query may take more than max_bytes together
            scores[at], best[at], _ = _score_every_row(probes.at(at), lists, options)
    return scores, best, doubtful


def _settle(
    probes: Probes, y: Tensor, origin: Tensor, lists: InvertedLists, kth: Tensor, options: SearchOptions
) -> tuple[Tensor, Tensor]:
    """The k best rows among all whose ranking score allows them to be better than the k-th known, of score kth (Q,)."""
    threshold = metrics.needed_ranking(probes.x, origin, kth)
    rows = as_rectangle(*scan_above(y, lists, probes.lists, probes.limits, threshold))
    return rescore(probes.x, lists.packed, rows, options.k, options.metric)


def _score_every_row(
    probes: Probes, lists: InvertedLists, options: SearchOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of all rows of the probed lists, by exact score alone; no query takes a second pass."""
    sizes = probes.sizes(lists)
    total = int(sizes.sum(1).max())
    width = max(1, min(total, options.max_bytes // _HIT_BYTES))

    def best(x: Tensor, probed: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for start in range(0, max(1, total), width):
            rows = every_candidate(lists, probed, read, start, min(width, total - start))
            parts.append(rescore(x, lists.packed, rows, options.k, options.metric))
        return parts[0] if len(parts) == 1 else merge(parts, options.k)

    scores, rows = in_chunks(best, max(1, options.max_bytes // (_HIT_BYTES * width)), probes.x, probes.lists, sizes)
    return scores, rows, torch.zeros_like(rows[:, 0], dtype=torch.bool)


def _nothing(probes: Probes, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Padding for every query."""
    queries = probes.x.shape[0]
    scores, rows = select_topk(probes.x.new_empty(queries, 0), probes.lists.new_empty(queries, 0), k)
    return scores, rows, torch.zeros(queries, dtype=torch.bool, device=rows.device)


def _merge(segments: Sequence[InvertedLists], found: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of what was found in each segment."""
    rows, before = [], 0
    for lists, (_, part) in zip(segments, found, strict=True):
        rows.append(torch.where(part < 0, -1, part + before))
        before += lists.packed.shape[0]
    return merge([(scores, moved) for (scores, _), moved in zip(found, rows, strict=True)], k)


def _scan_bytes(options: SearchOptions) -> int:
    return options.max_bytes - min(options.max_bytes // 2, _ASIDE_BYTES)


def _query_bytes(lists: int, d: int, options: SearchOptions) -> int:
    """Memory that a query takes outside the scan: copies of it, its probes, its candidates, their exact scores."""
    return 20 * d + 32 * min(lists, options.nprobe) + 48 * kept_for(options.k)


def _note_mode(stats: Stats | None, mode: str, why: str) -> None:
    if stats is not None and stats["mode"] is None:
        stats.update(mode=mode, why=why)


def _count_doubt(stats: Stats, again: Sequence[Tensor]) -> None:
    """Count queries that took a second pass in any segment, (Q,) each, and the others. Waits for the device."""
    count = int(torch.stack(list(again)).any(0).sum())
    stats["searched_again"] += count
    stats["certified"] += again[0].shape[0] - count


def _count(stats: Stats, lists: InvertedLists, probes: Probes) -> None:
    """Add to `stats` what the queries read of one segment. Waits for the device."""
    read = probes.sizes(lists)
    stats["lists_read"] += int((read > 0).sum())
    stats["rows_read"] += int(read.sum())
    stats["rows_left_out"] += int((lists.sizes[probes.lists] - read).sum())


def lookup(ids: Sequence[Tensor], rows: Tensor) -> Tensor:
    """The ids of rows (Q, k) that count on from segment to segment; -1 stays -1."""
    found, before = torch.full_like(rows, -1), 0
    for part in ids:
        if part.shape[0]:
            at = rows - before if before else rows
            other = (at < 0) | (at >= part.shape[0])
            found = torch.where(other, found, part.take(at.masked_fill(other, 0)))
        before += part.shape[0]
    return found
