"""Filters of queries, which are sent with them to the processes that store their lists.

W processes, Q queries of one process, M queries that it receives.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._arrays import as_tensor
from ..index.filtering import query_filter
from ..params import SearchParams, shared
from . import routing
from .collectives import Exchange
from .global_state import digest_of

Queries = tuple[Tensor, SearchParams]  # prepared queries and their settings


def settings_of(params: SearchParams) -> tuple[object, ...]:
    """What must be the same on all processes: not the filters of their queries, but what kind they are of."""
    selector, kind = params.selector, None
    if selector is not None:
        per_query = isinstance(selector, tuple) or not shared(selector)
        kind = type(selector).__name__ if per_query else digest_of(as_tensor(selector, "selector"))
    return replace(params, selector=None, exclude=None, groups=None), kind, params.exclude is not None


def widths(params: SearchParams) -> list[int]:
    """Columns that the filters of this process need: of the selector and of the excluded ids."""
    selector, exclude = params.selector, params.exclude
    lists = () if selector is None or shared(selector) else selector
    return [max((len(part) for part in lists), default=0), 0 if exclude is None else exclude.shape[1]]


def send_queries(
    exchange: Exchange,
    step: str,
    queries: Tensor,
    probed: Tensor,
    owners: Tensor | None,
    params: SearchParams,
    widths: Tensor,
    *more: Tensor,
) -> tuple[Any, ...]:
    """`routing.send_queries` that also sends the filters in `params`: the filter comes after queries and lists.

    `widths` (W, 2) are those of all processes.
    """
    sent = _columns(params, widths, queries.device)
    routes, theirs, lists, *values = routing.send_queries(exchange, step, queries, probed, owners, *more, *sent)
    params = _received(params, values[len(more) :])
    return routes, theirs, lists, query_filter(params, theirs.shape[0], theirs.device), *values[: len(more)]


def _columns(params: SearchParams, widths: Tensor, device: torch.device) -> list[Tensor]:
    """The filters of the own queries as tensors (Q, columns)."""
    sent, (of_selector, of_exclude) = [], widths.max(0).values.clamp(min=1).tolist()
    selector = params.selector
    if isinstance(selector, tuple):
        rows = [torch.nn.functional.pad(ids.long(), (0, of_selector - len(ids)), value=-1) for ids in selector]
        sent.append(torch.stack(rows) if rows else torch.empty(0, of_selector, dtype=torch.int64, device=device))
    elif selector is not None and not shared(selector):
        sent.append(torch.nn.functional.pad(selector, (0, of_selector - selector.shape[1])))
    if params.exclude is not None:
        missing = of_exclude - params.exclude.shape[1]
        sent.append(torch.nn.functional.pad(params.exclude.long(), (0, missing), value=-1))
    return [tensor.to(device) for tensor in sent]


def _received(params: SearchParams, sent: list[Tensor]) -> SearchParams:
    """`params` with the filters of the M queries that came: what `_columns` of other processes gave."""
    found: dict[str, Any] = {}
    if params.exclude is not None:
        *sent, found["exclude"] = sent
    if sent:
        found["selector"] = tuple(sent[0].unbind()) if isinstance(params.selector, tuple) else sent[0]
    return replace(params, **found)
