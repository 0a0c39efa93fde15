"""Exact scores of all rows of the probed lists, for the profile "exact" and where rounded scores exclude none.

Q queries, P probes, k results.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunking import in_chunks
from .filters import Filter
from .lists import InvertedLists
from .options import Probes, SearchOptions
from .rescore import rescore
from .scan_above import hits_by_query, probed_rows
from .select import merge
from .stats import Stats, count_scored

ROW_BYTES = 128  # workspace for a row until its exact score is known


def score_rows(
    probes: Probes, lists: InvertedLists, options: SearchOptions, stats: Stats | None, filter: Filter | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The k best rows of one segment: exact scores and rows (Q, k), and False (Q,): no query takes a second pass.

    With a `filter` those that pass; others are not scored.
    """
    sizes = probes.sizes(lists)
    total = probes.width(lists)
    width = max(1, min(total, options.max_bytes // ROW_BYTES))

    def best(x: Tensor, probed: Tensor, sizes: Tensor, *numbers: Tensor) -> tuple[Tensor, Tensor]:
        results = []
        for start in range(0, max(1, total), width):
            rows = probed_rows(lists, probed, sizes, start, min(width, total - start))
            if filter is not None:
                rows = _left_aligned(filter._replace(numbers=numbers[0]).passing_rows(lists.ids, rows))
            count_scored(stats, rows)
            results.append(rescore(x, lists.packed, rows, options.k, options.metric))
        return results[0] if len(results) == 1 else merge(results, options.k)

    numbers = () if filter is None else (filter.numbers,)
    step = max(1, options.max_bytes // (ROW_BYTES * width))
    scores, rows = in_chunks(best, step, probes.x, probes.lists, sizes, *numbers)
    return scores, rows, torch.zeros_like(rows[:, 0], dtype=torch.bool)


def _left_aligned(rows: Tensor) -> Tensor:
    """Rows (Q, K) without gaps: padding of -1 comes last, K is the largest number of rows. Synchronizes."""
    real = rows >= 0
    return hits_by_query(torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)), rows[real])
