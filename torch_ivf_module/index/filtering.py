"""The filter of each query, made of `SearchParams.selector` and `SearchParams.exclude`.

Q queries, n ids of a mask, m excluded ids, T ids of all lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..functional.filtered_search import few_allowed
from ..functional.filters import Filter, IdLists, id_lists, rows_as_lists
from ..functional.id_lookup import IdOrder, order_of
from ..functional.lists import InvertedLists
from ..functional.options import SearchOptions
from ..params import SearchParams, shared
from . import validation

if TYPE_CHECKING:
    from .store import ListStore


def query_filter(params: SearchParams, queries: int, device: torch.device) -> Filter | None:
    """The filter of so many queries; None if `params` has the same for all, or none.

    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype or device.
    """
    if params.groups is not None:
        validation.groups_of_queries(params.groups, queries, device)
    if not params.per_query:
        return None
    mask = allowed = excluded = None
    if params.exclude is not None:
        excluded = rows_as_lists(validation.id_rows(params.exclude, "exclude", queries, device))
    if params.selector is not None and not shared(params.selector):
        if isinstance(params.selector, Tensor):
            mask = validation.query_masks(params.selector, "selector", queries, device)
        else:
            allowed = _allowed(params.selector, queries, device)
    return Filter(torch.arange(queries, device=device), mask, allowed, excluded)


def check_filters(params: SearchParams, queries: int, device: torch.device) -> None:
    """Raise as a search of so many queries for a selector or exclusions that are wrong."""
    query_filter(params, queries, device)
    if params.selector is not None and shared(params.selector):
        validation.selector(params.selector, "selector", device)


def id_orders(
    filter: Filter, store: ListStore, segments: Sequence[InvertedLists], options: SearchOptions
) -> list[IdOrder] | None:
    """What sorts the ids of each segment, if few ids are allowed: see `filtered_search.search`."""
    if not few_allowed(filter, segments[0], options):
        return None
    return [store.ids.order_for_search(segments[0].ids), *(order_of(part.ids) for part in segments[1:])]


def _allowed(lists: Sequence[Tensor], queries: int, device: torch.device) -> IdLists:
    if len(lists) != queries:
        raise ValueError(f"selector must have a list of ids for each of the {queries} queries, got {len(lists)} lists")
    ids = [validation.id_list(part, f"selector[{i}]", device) for i, part in enumerate(lists)]
    offsets = torch.tensor([0, *(part.shape[0] for part in ids)], device=device).cumsum(0)
    return id_lists(torch.cat([offsets.new_empty(0), *ids]), offsets)
