"""Range search: every row of the probed lists whose score exceeds a bound. List-major, never a dense (Q, N) matrix.

Q queries, N vectors, P probes, H hits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import metric as metrics
from .kernels import kernel_for
from .lists import InvertedLists, offsets_of
from .maxima import tasks_of, tiles
from .parts import in_parts
from .probe import Coarse
from .search import probed_lists, shifted_queries

_PROBE_BYTES = 112  # of a query, for each list it visits
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows with an exact score above `score` (Q,): lims (Q + 1,), scores (H,) and rows (H,), query by query.

    x (Q, d) as `metric.prepare` gives it; rows count on from segment to segment. `probed` as for `search`.
    """
    if probed is None:
        shifted, probed, _ = probed_lists(x, coarse, segments, nprobe, metric)
    else:
        shifted = shifted_queries(x, coarse.origin, metric)[0]
    step = max(1, max_bytes // (_PROBE_BYTES * (probed.shape[1] + 1)))
    queries, scores, rows = [probed.new_empty(0)], [x.new_empty(0)], [probed.new_empty(0)]
    before = 0
    for lists in segments:
        reach = metrics.largest_norm(lists.packed, lists.bias, coarse.origin, metric)
        for start in range(0, x.shape[0], step):
            part = slice(start, start + step)
            hits = _near(x[part], shifted[part], coarse.origin, lists, probed[part], score[part], reach, metric)
            found = _exact(x[part], lists.packed, *hits, metric)
            keep = (found > score[part][hits[0]]) & torch.isfinite(found)
            queries.append(hits[0][keep] + start)
            scores.append(found[keep])
            rows.append(hits[1][keep] + before)
        before += lists.packed.shape[0]
    lims, order = by_query(torch.cat(queries), x.shape[0])
    return lims, torch.cat(scores)[order], torch.cat(rows)[order]


def by_query(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Hits of `count` queries (H,) in order: where each query's begin, lims (count + 1,), and the order (H,)."""
    return offsets_of(queries, count), torch.sort(queries, stable=True).indices


def _near(
    x: Tensor,
    shifted: Tensor,
    origin: Tensor,
    lists: InvertedLists,
    probed: Tensor,
    score: Tensor,
    reach: Tensor,
    metric: str,
) -> tuple[Tensor, Tensor]:
    """Queries and rows (H,) whose ranking score may, rounding allowed for, mean an exact score above `score` (Q,)."""
    floor = metrics.range_floor(x, origin, score, reach, metric)
    if kernel := kernel_for(shifted, lists.packed):
        return kernel.above(shifted, lists, probed, floor)
    queries, rows = [probed.new_empty(0)], [probed.new_empty(0)]
    for tile in tiles(shifted, lists, tasks_of(shifted, lists, probed, sample=False)):
        task, row = torch.nonzero(tile.scores > floor[tile.queries, None], as_tuple=True)
        queries.append(tile.queries[task])
        rows.append(row + tile.row + lists.offsets[tile.list])
    return torch.cat(queries), torch.cat(rows)


def _exact(x: Tensor, packed: Tensor, queries: Tensor, rows: Tensor, metric: str) -> Tensor:
    """Exact scores (H,) of pairs of a query and a row."""

    def score(query: Tensor, row: Tensor) -> Tensor:
        return metrics.exact_scores(x[query], packed[row][:, None].float(), metric)[:, 0]

    return in_parts(score, _RESCORE_ROWS, queries, rows)
