"""Queries to the processes that hold their lists, and the answers back.

W processes, Q queries of one process, M questions it sends (a query and a process), P probes, k results, H hits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..functional.scan_above import by_query
from ..functional.select import NEVER, select_topk
from .collectives import Exchange
from .placement import before


class Asked(NamedTuple):
    """Who was asked what, in the order in which the answers come back."""

    total: int  # Q
    queries: Tensor  # (M,) which query
    ranks: Tensor  # (M,) which process
    sent: Tensor  # (W,) questions to each process
    came: Tensor  # (W,) questions from each


def ask(
    exchange: Exchange, step: str, queries: Tensor, probed: Tensor, owners: Tensor | None, *beside: Tensor
) -> tuple[Any, ...]:
    """Send queries (Q, d) and the lists they read (Q, P) to the owners (L,) of those lists, or to all if None.

    Returns who was asked, the queries and lists that this process is asked for, and what came `beside` (Q,) each query.
    """
    size = exchange.size
    if owners is None:
        wanted = queries.new_ones((size, queries.shape[0]), dtype=torch.bool)
    else:
        # A probe of no list (number L) and of a list that nobody has go to a process that is not there.
        holder = torch.cat([owners, owners.new_full((1,), -1)]).to(probed.device)[probed]
        wanted = queries.new_zeros((queries.shape[0], size + 1), dtype=torch.bool)
        wanted = wanted.scatter_(1, torch.where(holder < 0, size, holder), True)[:, :size].T
    ranks, numbers = torch.nonzero(wanted, as_tuple=True)
    sent = wanted.sum(1)
    # A list number needs no more than 32 bits on the way.
    (theirs, lists, *there), came = exchange.swap(
        step, sent, queries[numbers], probed[numbers].int(), *(tensor[numbers] for tensor in beside)
    )
    return Asked(queries.shape[0], numbers, ranks, sent, came), theirs, lists.long(), *there


def best(exchange: Exchange, step: str, asked: Asked, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Exchange answers to the questions that came, scores and ids (., k), and keep the k best for each query (Q, k)."""
    (scores, ids), _ = exchange.swap(step, asked.came, scores, ids, arriving=asked.sent)
    k = scores.shape[1]
    all_scores = scores.new_full((asked.total, exchange.size, k), NEVER)
    all_ids = ids.new_full((asked.total, exchange.size, k), -1)
    all_scores[asked.queries, asked.ranks] = scores
    all_ids[asked.queries, asked.ranks] = ids
    # Ids may be any number, negative ones too, so what is selected are places.
    places = torch.arange(exchange.size * k, device=scores.device).expand(asked.total, -1)
    top, at = select_topk(all_scores.flatten(1), places, k)
    return top, all_ids.flatten(1).gather(1, at.clamp(min=0)).masked_fill(at < 0, -1)


def within(
    exchange: Exchange, step: str, asked: Asked, lims: Tensor, distances: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange the answers of a range search: lims (Q + 1,), distances (H,) and ids (H,) for each query."""
    (hits,), _ = exchange.swap(step, asked.came, lims.diff(), arriving=asked.sent)
    leaving, arriving = _sums(lims.diff(), asked.came), _sums(hits, asked.sent)
    (distances, ids), _ = exchange.swap(step, leaving, distances, ids, arriving=arriving)
    lims, order = by_query(torch.repeat_interleave(asked.queries, hits), asked.total)
    return lims, distances[order], ids[order]


def _sums(values: Tensor, runs: Tensor) -> Tensor:
    """The sum over each run of so many values (W,)."""
    ends = torch.cat([values.new_zeros(1), values.cumsum(0)])
    first = before(runs)
    return ends[first + runs] - ends[first]
