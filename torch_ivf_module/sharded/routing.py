"""Sending queries to the processes that store their lists, and merging the results that come back.

W processes, Q queries of one process, M pairs of a query and a process that it is sent to, P probes, k results, H hits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.scan_above import group_by_query
from ..functional.select import PADDING, select_topk
from .collectives import Exchange
from .placement import NO_OWNER, exclusive_sum


class Routes(NamedTuple):
    """Which query of this process was sent to which process, in the order in which the results come back."""

    total: int  # Q
    queries: Tensor  # (M,) the query of each pair
    ranks: Tensor  # (M,) the process of each pair
    sent: Tensor  # (W,) queries sent to each process
    received: Tensor  # (W,) queries received from each process


def send_queries(
    exchange: Exchange, step: str, queries: Tensor, probed: Tensor, owners: Tensor | None, *more: Tensor
) -> tuple[Any, ...]:
    """Send queries (Q, d) and the lists they read (Q, P) to the owners (L,) of those lists, or to all if None.

    Returns the routes, then the queries, the lists and the values `more` (Q,) of each query that this process received.
    """
    size = exchange.size
    if owners is None:
        wanted = queries.new_ones((size, queries.shape[0]), dtype=torch.bool)
    else:
        # A probe of no list (number L) or of a list without an owner goes to column `size`, which is cut off.
        owner = torch.cat([owners, owners.new_full((1,), NO_OWNER)]).to(probed.device)[probed]
        wanted = queries.new_zeros((queries.shape[0], size + 1), dtype=torch.bool)
        wanted = wanted.scatter_(1, torch.where(owner == NO_OWNER, size, owner), True)[:, :size].T
    ranks, numbers = torch.nonzero(wanted, as_tuple=True)
    sent = wanted.sum(1)
    # List numbers are sent in 32 bits.
    (theirs, lists, *values), received = exchange.all_to_all(
        step, sent, queries[numbers], probed[numbers].int(), *(tensor[numbers] for tensor in more)
    )
    return Routes(queries.shape[0], numbers, ranks, sent, received), theirs, lists.long(), *values


def merge_results(exchange: Exchange, step: str, routes: Routes, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores and ids (n, k) of the received queries to their processes, and select the k best of each own
    query: scores and ids (Q, k)."""
    (scores, ids), _ = exchange.all_to_all(step, routes.received, scores, ids, arriving=routes.sent)
    k = scores.shape[1]
    all_scores = scores.new_full((routes.total, exchange.size, k), PADDING)
    all_ids = ids.new_full((routes.total, exchange.size, k), -1)
    all_scores[routes.queries, routes.ranks] = scores
    all_ids[routes.queries, routes.ranks] = ids
    # select_topk takes negative labels for padding, and ids may be negative, so positions are selected.
    positions = torch.arange(exchange.size * k, device=scores.device).expand(routes.total, -1)
    top, at = select_topk(all_scores.flatten(1), positions, k)
    return top, all_ids.flatten(1).gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)


def merge_range_results(
    exchange: Exchange, step: str, routes: Routes, lims: Tensor, distances: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of a range search of the received queries to their processes, and group those of the own
    queries: lims (Q + 1,), distances (H,) and ids (H,)."""
    (hits,), _ = exchange.all_to_all(step, routes.received, lims.diff(), arriving=routes.sent)
    leaving, arriving = _sums(lims.diff(), routes.received), _sums(hits, routes.sent)
    (distances, ids), _ = exchange.all_to_all(step, leaving, distances, ids, arriving=arriving)
    lims, order = group_by_query(torch.repeat_interleave(routes.queries, hits), routes.total)
    return lims, distances[order], ids[order]


def _sums(values: Tensor, runs: Tensor) -> Tensor:
    """Sums (W,) of `values`, divided into W consecutive runs of these lengths (W,)."""
    ends = torch.cat([values.new_zeros(1), values.cumsum(0)])
    first = exclusive_sum(runs)
    return ends[first + runs] - ends[first]
