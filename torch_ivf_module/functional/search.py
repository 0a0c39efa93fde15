"""Search: probe, scan with one of the strategies, score the survivors exactly, merge.

Q queries, L lists, P probes, d dim, k results, W candidates a query. Everything here speaks of rows; a row of
segment s counts on from the rows of the segments before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import budget
from . import metric as metrics
from .cost import cheapest
from .lists import InvertedLists
from .probe import Coarse, probe
from .scan_lists import scan_lists
from .scan_queries import scan_queries
from .select import select_topk

Scan = Callable[[Tensor, InvertedLists, Tensor, int, int, int], tuple[Tensor, Tensor]]

STRATEGIES: dict[str, Scan] = {"csr": scan_lists, "matrix": scan_queries}
MODES = ("auto", *STRATEGIES)

# Times as many candidates for a query that is in doubt. On image patches (k = 20) 11% of the queries are with 26
# candidates, 4% with 33, 2% with 40 and 0.1% with 60, while each candidate more costs every query.
_KEEP_MORE = 4
_ASIDE_BYTES = 64 << 20  # for what a scan holds beside its maxima or candidates, half of max_bytes if that is less
_RESCORE_BYTES = 1 << 20  # vectors gathered at a time for exact scores: with two temporaries more leaves the cache


def probed_lists(
    x: Tensor, coarse: Coarse, segments: Sequence[InvertedLists], nprobe: int, metric: str, max_codes: int | None
) -> Tensor:
    """The lists each query x (Q, d) reads, nearest first: (Q, P), L where a cap or a bad query leaves none."""
    nlist = coarse.centroids.shape[0]
    finite = (x * 0).sum(1, keepdim=True) == 0  # 0 * inf and 0 * NaN are NaN
    shifted = metrics.shift(x.masked_fill(~finite, 0), coarse.origin, metric)
    probed = probe(shifted, coarse, nprobe)[1].masked_fill_(~finite, nlist)
    if max_codes is None:
        return probed
    sizes = torch.stack([lists.sizes for lists in segments]).sum(0)
    return probed.masked_fill(~budget.within_max_codes(sizes[probed], max_codes), nlist)


def search(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    *,
    k: int,
    nprobe: int,
    metric: str,
    mode: str = "auto",
    max_codes: int | None = None,
    max_bytes: int = 256 << 20,
    width: int | None = None,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """The k best rows of the `nprobe` nearest lists: exact scores (Q, k), differentiable in x, and rows (Q, k).

    x (Q, d) float32 as `metric.prepare` gives it. `segments` are one or more sets of inverted lists over the same
    centroids. `width`, where given, must be at least the rows that any query's lists hold in a segment; it takes
    the place of reading that number back from the device. `exact` scores every row of the probed lists exactly,
    instead of the best by a rounded score and an allowance for its error.
    """
    # The scan ranks by a rounded score, so a few more rows than asked for are kept and scored exactly. Where even
    # these may not be enough, the query is searched again with more of them; see metric.doubtful.
    kept = k + 8 + k // 4
    if exact:
        kept = 1 + max(lists.packed.shape[0] for lists in segments)
    step = max(1, max_bytes // 4 // _query_bytes(coarse.centroids.shape[0], nprobe, kept))
    parts = []
    for start in range(0, max(1, x.shape[0]), step):
        part = x[start : start + step]
        with torch.no_grad():
            plain = part.detach()
            probed = probed_lists(plain, coarse, segments, nprobe, metric, max_codes)
            settings = Settings(k, kept, metric, mode, max_bytes - min(max_bytes // 2, _ASIDE_BYTES), width)
            found = [_search_segment(plain, coarse.origin, lists, probed, settings) for lists in segments]
        if torch.is_grad_enabled() and part.requires_grad:
            pairs = zip(segments, found, strict=True)
            found = [rescore(part, lists.packed, rows, k, metric) for lists, (_, rows) in pairs]
        parts.append(_merge(segments, found, k))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


class Settings(NamedTuple):
    """What the search of one segment needs to know."""

    k: int
    kept: int
    metric: str
    mode: str
    max_bytes: int
    width: int | None


def _search_segment(
    x: Tensor, origin: Tensor, lists: InvertedLists, probed: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """The k best rows of one segment: exact scores and rows (Q, k)."""
    shifted = metrics.shift(x, origin, settings.metric).nan_to_num(nan=0, posinf=0, neginf=0)
    ranking, rows = _candidates(shifted, lists, probed, settings)
    scores, best = rescore(x, lists.packed, rows, settings.k, settings.metric)
    nothing_left_out = rows.shape[1] < settings.kept or lists.packed.shape[0] < settings.kept
    if settings.width is not None or nothing_left_out:
        return scores, best
    doubtful = metrics.doubtful(x, origin, ranking[:, -1], scores[:, -1], settings.metric)
    if doubtful is not None and bool(doubtful.any()):
        at = torch.nonzero(doubtful)[:, 0]
        more = settings._replace(kept=_KEEP_MORE * settings.kept)  # in the end that is every row there is
        step = max(1, settings.max_bytes // _query_bytes(1, 1, more.kept))
        for part in at.split(step):
            scores[part], best[part] = _search_segment(x[part], origin, lists, probed[part], more)
    return scores, best


def _merge(segments: Sequence[InvertedLists], found: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The k best of what was found in each segment."""
    if len(segments) == 1:
        return found[0]
    rows, before = [], 0
    for lists, (_, part) in zip(segments, found, strict=True):
        rows.append(torch.where(part < 0, -1, part + before))
        before += lists.packed.shape[0]
    return select_topk(torch.cat([scores for scores, _ in found], 1), torch.cat(rows, 1), k)


def rescore(x: Tensor, packed: Tensor, rows: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k best of `rows` (Q, K) by exact score: scores and rows (Q, k). Differentiable in x (Q, d)."""
    if packed.shape[0] == 0:
        rows = rows[:, :0]
    most = max(1, _RESCORE_BYTES // (4 * packed.shape[1]))
    if rows.shape[1] > most:
        found = [rescore(x, packed, part, k, metric) for part in rows.split(most, dim=1)]
        return select_topk(torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1), k)
    step = max(1, _RESCORE_BYTES // max(1, 4 * rows.shape[1] * packed.shape[1]))
    parts = []
    for start in range(0, max(1, x.shape[0]), step):
        part, query = rows[start : start + step], x[start : start + step]
        vectors = packed.index_select(0, part.clamp(min=0).flatten()).view(*part.shape, packed.shape[1])
        parts.append(select_topk(metrics.exact_scores(query, vectors.float(), metric), part, k))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _candidates(x: Tensor, lists: InvertedLists, probed: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Candidates of one segment, found by a strategy: ranking scores and rows (Q, at most settings.kept)."""
    nothing = x.new_empty((probed.shape[0], 0)), probed.new_empty((probed.shape[0], 0))
    if lists.packed.shape[0] == 0 or probed.numel() == 0:
        return nothing
    width = int(lists.sizes[probed].sum(1).max()) if settings.width is None else settings.width
    width = min(width, lists.packed.shape[0])
    if width == 0:
        return nothing
    mode, k = settings.mode, settings.kept
    if mode == "auto":
        mode = cheapest(x, lists, probed, k, width)
    return STRATEGIES[mode](x, lists, probed, k, width, settings.max_bytes)


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
