"""Range search: every row of the probed lists whose score exceeds a bound.

Q queries, N vectors, P probes, H hits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import metric as metrics
from .chunking import in_chunks
from .filtered_search import allowed_rows, runs
from .filters import Filter
from .id_lookup import IdOrder
from .kernels import Kernel, kernel_for
from .lists import InvertedLists
from .options import Probes
from .probe import Coarse, probe
from .row_codes import as_float
from .scan_above import group_by_query, scan_above
from .search import capped_lists, finite_queries

_PROBE_BYTES = 112  # workspace of a query for each list that it probes
_RESCORE_ROWS = 1 << 13  # vectors gathered at a time for exact scores


def range_search(
    x: Tensor,
    coarse: Coarse,
    segments: Sequence[InvertedLists],
    *,
    score: Tensor,
    nprobe: int,
    metric: str,
    max_bytes: int,
    probed: Tensor | None = None,
    filter: Filter | None = None,
    orders: Sequence[IdOrder] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with an exact score above `score` (Q,): lims (Q + 1,), scores (H,) and rows (H,), query by query.

    x (Q, d) as `metric.prepare` gives it; rows are numbered over all segments. `probed` as for `search`; of a `filter`
    only rows that pass are found, with `orders` as for `filtered_search.search`.
    """
    x, finite = finite_queries(x)
    kernel = kernel_for(x)
    if probed is None:
        probed = capped_lists(probe(x, coarse, nprobe, metric, kernel), finite, coarse, segments)[0]
    step = max(1, max_bytes // (_PROBE_BYTES * (probed.shape[1] + 1)))
    queries, scores, rows = [probed.new_empty(0)], [x.new_empty(0)], [probed.new_empty(0)]
    before = 0
    parts: Iterator[slice | Tensor]
    for number, lists in enumerate(segments):
        if filter is not None and orders is not None:
            parts = runs(filter, coarse.centroids.shape[0], nprobe, max_bytes, lookup=True)
            order = orders[number]
        else:
            parts = (slice(start, start + step) for start in range(0, x.shape[0], step))
            order = None
        for chunk in parts:
            origin, own = coarse.origin, None if filter is None else filter.at(chunk)
            hits = _segment(x[chunk], origin, lists, probed[chunk], score[chunk], metric, kernel, own, order)
            queries.append(torch.arange(x.shape[0], device=x.device)[chunk][hits[0]])
            scores.append(hits[1])
            rows.append(hits[2] + before)
        before += lists.packed.shape[0]
    lims, grouped = group_by_query(torch.cat(queries), x.shape[0])
    return lims, torch.cat(scores)[grouped], torch.cat(rows)[grouped]


def _segment(
    x: Tensor,
    origin: Tensor,
    lists: InvertedLists,
    probed: Tensor,
    score: Tensor,
    metric: str,
    kernel: Kernel | None,
    filter: Filter | None,
    order: IdOrder | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The hits (H,) in one segment: queries, exact scores, rows."""
    if filter is not None and order is not None:
        queries, rows = _pairs(allowed_rows(Probes(x, probed, None), lists, filter, order))
    else:
        threshold = metrics.range_threshold(x, origin, score, lists.packed, metric)
        shifted = metrics.shift(x, origin, metric)
        kernel = kernel if kernel is not None and kernel.serves(lists.packed) else None
        lims, rows = scan_above(shifted, lists, probed, None, threshold, kernel)
        queries = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), lims.diff())
        if filter is not None:
            passing = torch.nonzero(filter.at(queries).passes(lists.ids[rows]))[:, 0]
            queries, rows = queries[passing], rows[passing]

    def exact(query: Tensor, row: Tensor) -> Tensor:
        return metrics.exact_scores(x[query], as_float(lists.packed[row], x.shape[1])[:, None], metric)[:, 0]

    scores = in_chunks(exact, _RESCORE_ROWS, queries, rows)
    inside = (scores > score[queries]) & torch.isfinite(scores)
    return queries[inside], scores[inside], rows[inside]


def _pairs(candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and rows (H,) of candidates (Q, K), -1 for none."""
    queries, columns = torch.nonzero(candidates >= 0, as_tuple=True)
    return queries, candidates[queries, columns]
