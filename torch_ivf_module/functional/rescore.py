"""Exact scores of the rows that a scan kept, and the selection among them.

Q queries, K candidates a query, N vectors, d dim, k results.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import metric as metrics
from .chunking import in_chunks
from .select import merge, select_topk

Scores = Callable[[Tensor, Tensor, str], Tensor]
_RESCORE_BYTES = 1 << 20  # vectors gathered at a time: with two temporaries more leaves the cache


def rescore(
    x: Tensor, packed: Tensor, rows: Tensor, k: int, metric: str, scores_of: Scores = metrics.exact_scores
) -> tuple[Tensor, Tensor]:
    """The k best of the candidate rows (Q, K), -1 for none, by exact score: scores and rows (Q, k).

    Differentiable in x (Q, d). `scores_of` is `exact_scores`, or `differentiable_scores` for a recording: that serves
    calls with and without gradients, and must not depend on which of them recorded it.
    """
    if packed.shape[0] == 0:
        rows = rows[:, :0]
    most = max(1, _RESCORE_BYTES // (4 * packed.shape[1]))
    if rows.shape[1] > most:
        return merge([rescore(x, packed, part, k, metric, scores_of) for part in rows.split(most, dim=1)], k)

    def score(query: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        vectors = packed.index_select(0, part.clamp(min=0).flatten()).view(*part.shape, packed.shape[1])
        return select_topk(scores_of(query, vectors.float(), metric), part, k)

    return in_chunks(score, max(1, _RESCORE_BYTES // max(1, 4 * rows.shape[1] * packed.shape[1])), x, rows)
