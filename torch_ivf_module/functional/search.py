"""Search: probe, scan with one of the strategies, score the survivors exactly, merge.

Q queries, L lists, P probes, d dim, k results, W candidates a query. Everything here speaks of rows; a row of
segment s counts on from the rows of the segments before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import budget
from . import metric as metrics
from .cost import cheapest, query_bytes, scratch_bytes
from .lists import InvertedLists, lengths
from .probe import Coarse, probe
from .scan_lists import scan_lists
from .scan_queries import scan_queries
from .select import select_topk

Scan = Callable[[Tensor, InvertedLists, Tensor, int, int], tuple[Tensor, Tensor]]

STRATEGIES: dict[str, Scan] = {"csr": scan_lists, "matrix": scan_queries}
MODES = ("auto", *STRATEGIES)

_RESCORE_BYTES = 4 << 20  # vectors gathered at a time for exact scores: more leaves the cache


def probed_lists(
    x: Tensor, coarse: Coarse, segments: Sequence[InvertedLists], nprobe: int, metric: str, max_codes: int | None
) -> Tensor:
    """The lists each query x (Q, d) reads, nearest first: (Q, P), -1 where a cap or a bad query leaves none."""
    finite = torch.isfinite(x).all(1, keepdim=True)
    shifted = metrics.shift(x.masked_fill(~finite, 0), coarse.origin, metric)
    probed = probe(shifted, coarse, nprobe)[1].masked_fill_(~finite, -1)
    if max_codes is None:
        return probed
    sizes = sum((lengths(lists.offsets) for lists in segments), torch.zeros_like(lengths(segments[0].offsets)))
    return probed.masked_fill(~budget.within_max_codes(sizes[probed.clamp(min=0)], max_codes), -1)


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
) -> tuple[Tensor, Tensor]:
    """The k best rows of the `nprobe` nearest lists: exact scores (Q, k), differentiable in x, and rows (Q, k).

    x (Q, d) float32 as `metric.prepare` gives it. `segments` are one or more sets of inverted lists over the same
    centroids. `width`, where given, must be at least the rows that any query's lists hold in a segment; it takes
    the place of reading that number back from the device.
    """
    # The scan ranks by a rounded score, so a few more rows than asked for are kept and scored exactly.
    kept = k + 4 + k // 8
    step = max(1, max_bytes // 4 // query_bytes(coarse.centroids.shape[0], nprobe, kept))
    parts = []
    for start in range(0, max(1, x.shape[0]), step):
        part = x[start : start + step]
        with torch.no_grad():
            plain = part.detach()
            probed = probed_lists(plain, coarse, segments, nprobe, metric, max_codes)
            shifted = metrics.shift(plain, coarse.origin, metric).masked_fill(probed[:, :1] < 0, 0)
            found = [
                _candidates(shifted, lists, probed, kept, mode=mode, max_bytes=max_bytes // 2, width=width)
                for lists in segments
            ]
        parts.append(_merge(part, segments, found, k, metric))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _merge(
    x: Tensor, segments: Sequence[InvertedLists], found: Sequence[Tensor], k: int, metric: str
) -> tuple[Tensor, Tensor]:
    """The k best by exact score of what was found in each segment."""
    scores, rows, before = [], [], 0
    for lists, candidates in zip(segments, found, strict=True):
        part = rescore(x, lists.packed, candidates, k, metric)
        scores.append(part[0])
        rows.append(torch.where(part[1] < 0, -1, part[1] + before))
        before += lists.packed.shape[0]
    if len(segments) == 1:
        return scores[0], rows[0]
    return select_topk(torch.cat(scores, 1), torch.cat(rows, 1), k)


def rescore(x: Tensor, packed: Tensor, rows: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k best of `rows` (Q, K) by exact score: scores and rows (Q, k). Differentiable in x (Q, d)."""
    step = max(1, _RESCORE_BYTES // max(1, 4 * rows.shape[1] * packed.shape[1]))
    parts = []
    for start in range(0, max(1, x.shape[0]), step):
        part, query = rows[start : start + step], x[start : start + step]
        vectors = packed.index_select(0, part.clamp(min=0).flatten()).view(*part.shape, packed.shape[1])
        parts.append(select_topk(metrics.exact_scores(query, vectors.float(), metric), part, k))
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _candidates(
    x: Tensor,
    lists: InvertedLists,
    probed: Tensor,
    k: int,
    *,
    mode: str,
    max_bytes: int,
    width: int | None,
) -> Tensor:
    """Candidate rows (Q, at most k) of one segment, found by a strategy within the scratch allowed."""
    nothing = probed.new_empty((probed.shape[0], 0))
    if lists.packed.shape[0] == 0 or probed.numel() == 0:
        return nothing
    if width is None:
        at = probed.clamp(min=0)
        width = int(lengths(lists.offsets)[at].masked_fill(probed < 0, 0).sum(1).max())
    width = min(width, lists.packed.shape[0])
    if width == 0:
        return nothing
    if mode == "auto":
        mode = cheapest(lists, probed, k, width)
    need = scratch_bytes(mode, width, probed.shape[1], k)
    step = max(1, max_bytes // need)
    parts = [
        STRATEGIES[mode](x[start : start + step], lists, probed[start : start + step], k, width)[1]
        for start in range(0, x.shape[0], step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def lookup(ids: Sequence[Tensor], rows: Tensor) -> Tensor:
    """The ids of rows (Q, k); -1 stays -1."""
    found = torch.full_like(rows, -1)
    before = 0
    for part in ids:
        at = rows - before
        inside = (at >= 0) & (at < part.shape[0])
        if part.shape[0]:
            found = torch.where(inside, part[at.clamp(0, part.shape[0] - 1)], found)
        before += part.shape[0]
    return found
