"""Search: probe, scan with one of the strategies, score the survivors exactly, merge.

Q queries, L lists, P probes, d dim, k results, W candidates a query. Everything here speaks of rows; a row of
segment s counts on from the rows of the segments before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import budget as budgets
from . import metric as metrics
from .budget import Budget
from .cost import cheapest
from .kernels import Kernel, Scan, kernel_for
from .lists import InvertedLists
from .parts import in_parts
from .probe import Coarse, probe
from .scan_lists import scan_lists
from .scan_queries import scan_queries
from .select import merge, select_topk

Stats = dict[str, Any]

STRATEGIES: dict[str, Scan] = {"csr": scan_lists, "matrix": scan_queries}
MODES = ("auto", *STRATEGIES, "native")

# Times as many candidates for a query that is in doubt. On image patches (k = 20) 11% of the queries are with 26
# candidates, 4% with 33, 2% with 40 and 0.1% with 60, while each candidate more costs every query.
_KEEP_MORE = 4
_ASIDE_BYTES = 64 << 20  # for what a scan holds beside its maxima or candidates, half of max_bytes if that is less
_RESCORE_BYTES = 1 << 20  # vectors gathered at a time for exact scores: with two temporaries more leaves the cache


def probed_lists(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    nprobe: int,
    metric: str,
    max_codes: int | None = None,
    budget: Budget | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a scan takes: the queries x (Q, d) relative to the origin, all numbers finite, and the lists they read.

    The latter are (Q, P), nearest first, L where a cap or a bad query leaves none; and, where a budget is given, the
    rows to read of each (Q, P), counted on from segment to segment. A graph is faster for computing the queries
    once: the product with the centroids needs them in memory, and so no later loop computes them again.
    """
    nlist = coarse.centroids.shape[0]
    shifted, finite = shifted_queries(x, coarse.origin, metric)
    scores, probed = probe(shifted, coarse, nprobe)
    probed = probed.masked_fill_(~finite, nlist)
    if max_codes is None and budget is None:
        return shifted, probed, None
    sizes = torch.stack([lists.sizes for lists in segments]).sum(0)[probed]
    limits = None if budget is None else budgets.row_limits(scores, sizes, budget)
    if max_codes is not None:
        left_out = ~budgets.within_max_codes(sizes if limits is None else limits, max_codes)
        probed = probed.masked_fill(left_out, nlist)
        limits = None if limits is None else limits.masked_fill(left_out, 0)
    return shifted, probed, limits


def shifted_queries(x: Tensor, origin: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """The queries x (Q, d) as a scan takes them, and which of them are finite (Q, 1)."""
    finite = (x * 0).sum(1, keepdim=True) == 0  # 0 * inf and 0 * NaN are NaN
    return metrics.shift(x.masked_fill(~finite, 0), origin, metric).nan_to_num(nan=0, posinf=0, neginf=0), finite


def search(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    *,
    k: int,
    nprobe: int,
    metric: str,
    mode: str | Scan = "auto",
    max_codes: int | None = None,
    budget: Budget | None = None,
    max_bytes: int = 256 << 20,
    width: int | None = None,
    exact: bool = False,
    probed: Tensor | None = None,
    stats: Stats | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best rows of the `nprobe` nearest lists: exact scores (Q, k), differentiable in x, and rows (Q, k).

    x (Q, d) float32 as `metric.prepare` gives it. `segments` are one or more sets of inverted lists over the same
    centroids. `mode` is one of MODES, or a scan. `width`, where given, must be at least the rows that any query's
    lists hold in a segment; it takes the place of reading that number back from the device, and with it the search
    is a graph of static shapes, in which no query is searched twice. `exact` scores every row of the probed lists
    exactly, instead of the best by a rounded score and an allowance for its error. `probed` (Q, P), where given, are
    the lists that each query reads, as `probed_lists` gives them; `nprobe`, `max_codes` and `budget` then say nothing.
    `stats`, where given, is filled.
    """
    kept = kept_for(k)
    if exact:
        kept = 1 + max(lists.packed.shape[0] for lists in segments)
    settings = Settings(
        k=k,
        kept=kept,
        nprobe=nprobe,
        metric=metric,
        mode=mode,
        max_codes=max_codes,
        budget=budget,
        width=width,
        max_bytes=max_bytes - min(max_bytes // 2, _ASIDE_BYTES),
        exact=exact,
        bounds=True,
        stats=stats,
    )
    if stats is not None:
        stats.update(queries=x.shape[0], nprobe=nprobe, mode=None, why="nothing to read")
        stats.update(lists_read=0, rows_read=0, rows_left_out=0, certified=0, searched_again=0)
    step = max(1, max_bytes // 4 // _query_bytes(coarse.centroids.shape[0], nprobe, kept))
    chosen = (x,) if probed is None else (x, probed)
    return in_parts(lambda *part: _search_batch(coarse, segments, settings, *part), step, *chosen)


def kept_for(k: int) -> int:
    """Candidates that are scored exactly.

    The scan ranks by a rounded score, so these are a few more than asked for. Where even they may not be enough, the
    query is searched again with more of them; see metric.doubtful.
    """
    return k + 8 + k // 4


class Settings(NamedTuple):
    """What a search is told, the vectors left out."""

    k: int
    kept: int
    nprobe: int
    metric: str
    mode: str | Scan
    max_codes: int | None
    budget: Budget | None
    width: int | None
    max_bytes: int
    exact: bool
    bounds: bool
    stats: Stats | None


def _search_batch(
    coarse: Coarse, segments: Sequence[InvertedLists], settings: Settings, x: Tensor, probed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    k, metric = settings.k, settings.metric
    with torch.no_grad():
        plain = x.detach()
        limits = None
        if probed is None:
            shifted, probed, limits = probed_lists(
                plain, coarse, segments, settings.nprobe, metric, settings.max_codes, settings.budget
            )
        else:
            shifted = shifted_queries(plain, coarse.origin, metric)[0]
        found, left = [], limits
        for lists in segments:
            some = None if left is None else torch.minimum(left, lists.sizes[probed])
            if settings.stats is not None:
                _count(settings.stats, lists, probed, some)
            found.append(_search_segment(plain, shifted, coarse.origin, lists, probed, some, settings))
            left = None if left is None or some is None else left - some
    if torch.is_grad_enabled() and x.requires_grad:
        pairs = zip(segments, found, strict=True)
        found = [rescore(x, lists.packed, rows, k, metric) for lists, (_, rows) in pairs]
    return _merge(segments, found, k)


def _search_segment(
    x: Tensor,
    shifted: Tensor,
    origin: Tensor,
    lists: InvertedLists,
    probed: Tensor,
    limits: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """The k best rows of one segment: exact scores and rows (Q, k)."""
    width = _width(lists, probed, limits, settings)
    if width == 0:
        return select_topk(shifted.new_empty(x.shape[0], 0), probed.new_empty(x.shape[0], 0), settings.k)
    kernel, scan = _chosen(shifted, lists, probed, limits, settings, width)
    found, all_kept = None, lists.packed.shape[0] < settings.kept
    if kernel is not None and settings.bounds and not all_kept:
        found = kernel.bounds(x, lists, probed, limits, settings.kept, settings.max_bytes, settings.metric)
    ranking, rows = found or scan(shifted, lists, probed, limits, settings.kept, width, settings.max_bytes)
    scores, best = rescore(x, lists.packed, rows, settings.k, settings.metric, kernel)
    if settings.width is not None or all_kept or rows.shape[1] < settings.kept:
        return scores, best
    doubtful: Tensor | None
    if found is not None:
        doubtful = metrics.uncertain(ranking[:, -1], scores[:, -1])
        more = settings._replace(bounds=False)
    else:
        doubtful = metrics.doubtful(x, origin, ranking[:, -1], scores[:, -1], settings.metric)
        more = settings._replace(kept=_KEEP_MORE * settings.kept)  # in the end that is every row there is
    at = torch.nonzero(doubtful)[:, 0] if doubtful is not None else probed[:0, 0]
    if settings.stats is not None:
        settings.stats["searched_again"] += at.shape[0]
        settings.stats["certified"] += x.shape[0] - at.shape[0] if found is not None else 0
    step = max(1, settings.max_bytes // _query_bytes(1, 1, more.kept))
    for part in at.split(step) if at.shape[0] else ():
        some = None if limits is None else limits[part]
        scores[part], best[part] = _search_segment(x[part], shifted[part], origin, lists, probed[part], some, more)
    return scores, best


def _merge(segments: Sequence[InvertedLists], found: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of what was found in each segment."""
    if len(segments) == 1:
        return found[0]
    rows, before = [], 0
    for lists, (_, part) in zip(segments, found, strict=True):
        rows.append(torch.where(part < 0, -1, part + before))
        before += lists.packed.shape[0]
    return merge([(scores, moved) for (scores, _), moved in zip(found, rows, strict=True)], k)


def rescore(
    x: Tensor, packed: Tensor, rows: Tensor, k: int, metric: str, kernel: Kernel | None = None
) -> tuple[Tensor, Tensor]:
    """The k best of `rows` (Q, K) by exact score: scores and rows (Q, k). Without a kernel differentiable in x."""
    if packed.shape[0] == 0:
        rows = rows[:, :0]
    if kernel is not None:
        return select_topk(kernel.exact_scores(x, packed, rows, metric), rows, k)
    most = max(1, _RESCORE_BYTES // (4 * packed.shape[1]))
    if rows.shape[1] > most:
        return merge([rescore(x, packed, part, k, metric) for part in rows.split(most, dim=1)], k)

    def score(query: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        vectors = packed.index_select(0, part.clamp(min=0).flatten()).view(*part.shape, packed.shape[1])
        return select_topk(metrics.exact_scores(query, vectors.float(), metric), part, k)

    return in_parts(score, max(1, _RESCORE_BYTES // max(1, 4 * rows.shape[1] * packed.shape[1])), x, rows)


def _width(lists: InvertedLists, probed: Tensor, limits: Tensor | None, settings: Settings) -> int:
    """The most rows that a query reads of a segment, 0 where there is nothing to read. Waits for the device."""
    if lists.packed.shape[0] == 0 or (settings.width is None and probed.numel() == 0):
        return 0
    width = int(_read(lists, probed, limits).sum(1).max()) if settings.width is None else settings.width
    return min(width, lists.packed.shape[0])


def _chosen(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, settings: Settings, width: int
) -> tuple[Kernel | None, Scan]:
    """The kernel to use, if any, and the scan."""
    if not isinstance(settings.mode, str):
        return None, settings.mode
    mode, why, kernel = settings.mode, "search_mode", None
    if mode in ("auto", "native"):
        kernel = None if settings.exact else kernel_for(x, lists.packed)
        if kernel is None:
            mode, why = cheapest(x, lists, probed, limits, settings.kept, width)
        else:
            mode, why = "native", "there is a kernel for this device"
    if settings.stats is not None and settings.stats["mode"] is None:
        settings.stats.update(mode=mode, why=why)
    return kernel, STRATEGIES[mode] if kernel is None else kernel.scan


def _read(lists: InvertedLists, probed: Tensor, limits: Tensor | None) -> Tensor:
    """Rows that each query reads of each of its lists, (Q, P)."""
    return lists.sizes[probed] if limits is None else limits


def _count(stats: Stats, lists: InvertedLists, probed: Tensor, limits: Tensor | None) -> None:
    """Add to `stats` what the queries read of one segment. Waits for the device."""
    read = _read(lists, probed, limits)
    stats["lists_read"] += int((read > 0).sum())
    stats["rows_read"] += int(read.sum())
    stats["rows_left_out"] += int((lists.sizes[probed] - read).sum())


def _query_bytes(lists: int, probes: int, k: int) -> int:
    """Memory that a query takes outside the scan: its probes, its candidates, their exact scores."""
    return 32 * min(lists, probes) + 48 * k


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
