"""All rows of the probed lists whose ranking score exceeds a threshold, for range search and for the second pass.

List-major; no dense (Q, N) matrix is made. Q queries, L lists, P probes, N vectors, d dim, H hits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .block_maxima import host_tasks, section_scores, tasks_of
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

    x (Q, d) relative to the origin; limits (Q, P) the rows to read of each list, None for all. The kernel is used only
    without limits. For a query whose threshold is -inf the result is all rows that no filter excludes, including those
    whose ranking score overflows.
    """
    unbounded = torch.isneginf(threshold)
    bounded = threshold.masked_fill(unbounded, torch.inf)
    if kernel is not None and limits is None:
        lims, rows = kernel.above(x, lists, probed, bounded)
    else:
        lims, rows = _by_products(x, lists, probed, limits, bounded)
    if not bool(unbounded.any()):
        return lims, rows
    queries = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), lims.diff())
    which = torch.nonzero(unbounded)[:, 0]
    positions, all_rows = _every_row(lists, probed[which], None if limits is None else limits[which])
    return _grouped(torch.cat([queries, which[positions]]), torch.cat([rows, all_rows]), x.shape[0])


def group_by_query(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How to group hits by query: where the hits of each query begin, lims (count + 1,), and an order of hits (H,).

    `queries` (H,) is the query of each hit, `count` the number of queries.
    """
    return offsets_of(queries, count), torch.sort(narrow(queries, count), stable=True).indices


def _grouped(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Hits as lims (count + 1,) and rows (H,), query by query."""
    lims, order = group_by_query(queries, count)
    return lims, rows[order]


def hits_by_query(lims: Tensor, rows: Tensor) -> Tensor:
    """Hits, lims (Q + 1,) and rows (H,), as one row of candidates per query (Q, K), padded with -1.

    K is the largest number of hits of a query. Synchronizes with the device.
    """
    sizes = lims.diff()
    width = int(sizes.max()) if sizes.shape[0] else 0
    if width == 0:
        return rows.new_empty(sizes.shape[0], 0)
    positions = ranges_to_positions(lims[:-1, None], sizes[:, None], width)[0]
    return torch.where(positions < 0, -1, rows[positions.clamp(min=0)])


def _by_products(
    x: Tensor, lists: InvertedLists, probed: Tensor, limits: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """`scan_above` for finite thresholds, by matrix products with one list after another."""
    queries, rows = [probed.new_empty(0)], [probed.new_empty(0)]
    tasks = tasks_of(x, lists, probed, limits, sample=False)
    for part in section_scores(x, lists, tasks, host_tasks(lists, tasks)):
        task, row = torch.nonzero(part.scores > threshold[part.queries, None], as_tuple=True)
        queries.append(part.queries[task])
        rows.append(row + part.row + lists.offsets[part.list])
    return _grouped(torch.cat(queries), torch.cat(rows), x.shape[0])


def _every_row(lists: InvertedLists, probed: Tensor, limits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Queries and rows (H,) of all rows of the probed lists that no filter excludes."""
    sizes = lists.sizes[probed] if limits is None else limits
    rows = probed_rows(lists, probed, sizes, 0, int(sizes.sum(1).max()) if sizes.numel() else 0)
    queries, columns = torch.nonzero(rows >= 0, as_tuple=True)
    return queries, rows[queries, columns]


def probed_rows(lists: InvertedLists, probed: Tensor, sizes: Tensor, start: int, width: int) -> Tensor:
    """Rows ``start : start + width`` of the concatenated lists of each query: (Q, width).

    probed, sizes (Q, P): the lists and how many rows are read of each. -1 is padding or a row that a filter excludes.
    """
    rows = candidate_rows(lists.offsets[probed], sizes, start, width)
    if lists.bias.shape[0]:
        rows = rows.masked_fill(torch.isneginf(lists.bias[rows.clamp(min=0)]), -1)
    return rows.clamp(min=-1)
