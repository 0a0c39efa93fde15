"""Exact scores of the candidates of a scan, and the selection of the k best.

Q queries, K candidates per query, N vectors, d dim, k results.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import metric as metrics
from .chunking import in_chunks
from .row_codes import Rows, as_float, rows_at
from .select import merge, select_topk

Scores = Callable[[Tensor, Tensor, str], Tensor]
# Vectors gathered at a time. On a CPU more, with two temporaries of that size, do not fit the cache; on an accelerator
# fewer are more launches.
_RESCORE_BYTES, _ACCELERATOR_BYTES = 1 << 20, 64 << 20


def gathered_bytes(x: Tensor) -> int:
    """Bytes of the vectors that are gathered at a time on the device of queries x."""
    return _RESCORE_BYTES if x.is_cpu else _ACCELERATOR_BYTES


def rescore(
    x: Tensor, packed: Rows, rows: Tensor, k: int, metric: str, scores_of: Scores = metrics.exact_scores
) -> tuple[Tensor, Tensor]:
    """The k best of the candidate rows (Q, K), -1 for none, by exact score: scores and rows (Q, k).

    Differentiable in x (Q, d). `scores_of` is `exact_scores`, or `differentiable_scores` while a graph is recorded: the
    recorded operations must serve calls with and without gradients.
    """
    if packed.shape[0] == 0:
        rows = rows[:, :0]
    d, most = x.shape[1], gathered_bytes(x)
    columns = max(1, most // (4 * d))
    if rows.shape[1] > columns:
        return merge([rescore(x, packed, chunk, k, metric, scores_of) for chunk in rows.split(columns, dim=1)], k)

    def score(queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        vectors = as_float(rows_at(packed, rows.clamp(min=0).flatten()), d).view(*rows.shape, d)
        return select_topk(scores_of(queries, vectors, metric), rows, k)

    return in_chunks(score, max(1, most // max(1, 4 * rows.shape[1] * d)), x, rows)
