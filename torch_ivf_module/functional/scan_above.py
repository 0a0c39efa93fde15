"""All rows of the probed lists whose ranking score reaches a threshold: for range search, and for doubtful queries.

List-major, never a dense (Q, N) matrix. Q queries, L lists, P probes, N vectors, d dim, H hits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_maxima import tasks_of, tiles
from .kernels import Kernel
from .lists import InvertedLists, narrow, offsets_of, ranges_to_positions
from .scan_queries import candidate_rows


def scan_above(
    x: Tensor,
    lists: InvertedLists,
    probed: Tensor,
    limits: Tensor | None,
    threshold: Tensor,
    kernel: Kernel | None = None,
) -> tuple[Tensor, Tensor]:
    """The rows with a ranking score above threshold (Q,): lims (Q + 1,) and rows (H,), query by query.

    x (Q, d) relative to the origin; limits (Q, P) the rows to read of each list, None for all (a kernel reads all). For
    a query whose threshold is -inf these are all rows that no filter excludes, those of overflowing score included.
    """
    every = torch.isneginf(threshold)
    bounded = threshold.masked_fill(every, torch.inf)
    if kernel is not None and limits is None:
        lims, rows = kernel.above(x, lists, probed, bounded)
    else:
        lims, rows = _by_tiles(x, lists, probed, limits, bounded)
    if not bool(every.any()):
        return lims, rows
    queries = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), lims.diff())
    at = torch.nonzero(every)[:, 0]
    other, whole = _every_row(lists, probed[at], None if limits is None else limits[at])
    return _grouped(torch.cat([queries, at[other]]), torch.cat([rows, whole]), x.shape[0])


def by_query(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Hits (H,) grouped by query: where each of `count` queries begins, lims (count + 1,), and the order (H,)."""
    return offsets_of(queries, count), torch.sort(narrow(queries, count), stable=True).indices


def _grouped(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    lims, order = by_query(queries, count)
    return lims, rows[order]


def as_rectangle(lims: Tensor, rows: Tensor) -> Tensor:
    """Hits (H,) as candidates (Q, K) of the query with the most, -1 for padding. Waits for the device."""
    sizes = lims.diff()
    width = int(sizes.max()) if sizes.shape[0] else 0
    if width == 0:
        return rows.new_empty(sizes.shape[0], 0)
    at = ranges_to_positions(lims[:-1, None], sizes[:, None], width)[0]
    return torch.where(at < 0, -1, rows[at.clamp(min=0)])


def _by_tiles(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    queries, rows = [probed.new_empty(0)], [probed.new_empty(0)]
    for tile in tiles(x, lists, tasks_of(x, lists, probed, limits, sample=False)):
        task, row = torch.nonzero(tile.scores > threshold[tile.queries, None], as_tuple=True)
        queries.append(tile.queries[task])
        rows.append(row + tile.row + lists.offsets[tile.list])
    return _grouped(torch.cat(queries), torch.cat(rows), x.shape[0])


def _every_row(lists: InvertedLists, probed: Tensor, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and rows (H,) of the probed lists, those aside that a filter excludes."""
    sizes = lists.sizes[probed] if limits is None else limits
    rows = every_candidate(lists, probed, sizes, 0, int(sizes.sum(1).max()) if sizes.numel() else 0)
    query, place = torch.nonzero(rows >= 0, as_tuple=True)
    return query, rows[query, place]


def every_candidate(lists: InvertedLists, probed: Tensor, sizes: Tensor, start: int, width: int) -> Tensor:
    """Rows ``start : start + width`` of each query's lists, laid end to end: (Q, width).

    probed, sizes (Q, P): the lists and how many rows are read of each. -1 is padding, or a row that a filter excludes.
    """
    rows = candidate_rows(lists.offsets[probed], sizes, start, width)
    if lists.bias.shape[0]:
        rows = rows.masked_fill(torch.isneginf(lists.bias[rows.clamp(min=0)]), -1)
    return rows.clamp(min=-1)
