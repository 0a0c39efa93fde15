"""Searches by group: what `SearchParams(groups=..., group_by=...)` change of a search of an index.

Q queries, k results, H hits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import grouped_search
from ..functional.cells import Cells
from ..functional.filters import Filter
from ..functional.lists import InvertedLists, ids_at, is_selected, mask_rows
from ..functional.probe import Coarse
from ..params import SearchParams, shared
from . import validation

if TYPE_CHECKING:
    from .base import IndexBase


def by_group(params: SearchParams) -> bool:
    """Whether a search with these settings depends on groups."""
    return params.groups is not None or params.group_by is not None


def refuse(params: SearchParams, what: str) -> None:
    """ValueError if a search depends on groups, where `what` does not have them."""
    if by_group(params):
        name = "group_by" if params.groups is None else "groups"
        raise ValueError(f"params has {name}, which {what} does not support: search a flat or inverted-file index")


def search_by_group(
    index: IndexBase, queries: Tensor, k: int, params: SearchParams, filter: Filter | None
) -> tuple[Tensor, Tensor, Tensor, list[InvertedLists]]:
    """`searching.search_prepared` of params with groups, with group_by, or with both."""
    options = index.search_options(k, params)
    if options.budget is not None:
        raise ValueError("params has a budget of rows, the first of each list, so of few groups: leave it out")
    groups, filter = _of_queries(params, queries), filter and filter.repeated(queries.shape[0])
    coarse, segments, cells = _read(index, params, counted=options.max_codes is not None)
    stats: dict[str, Any] | None = {} if params.debug_stats else None

    def find(which: Tensor | slice, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
        x, own, passing = queries[which], options._replace(k=wanted), filter and filter.at(which)
        if groups is None:
            return grouped_search.search_filtered(x, coarse, segments, own, passing, stats=stats)
        return grouped_search.search(x, coarse, segments, cells, groups[which], own, passing, stats=stats)

    if params.group_by is None:
        scores, rows, ids = find(slice(None), k)
    else:
        scores, rows = grouped_search.spread(find, cells, queries.shape[0], options, params.group_by)
        ids = ids_at([part.ids for part in segments], rows)
    if stats is not None:
        index.last_search_stats = stats
    return scores, rows, ids, segments


def range_by_group(
    index: IndexBase, queries: Tensor, score: Tensor, params: SearchParams, filter: Filter | None
) -> tuple[Tensor, Tensor, Tensor]:
    """lims (Q + 1,), scores and ids (H,) of a range search of params with groups."""
    if params.group_by is not None:
        raise ValueError("range_search has no group_by: it returns all rows inside of the radius")
    groups = _of_queries(params, queries)
    coarse, segments, cells = _read(index, params, counted=False)
    assert groups is not None
    lims, scores, rows = grouped_search.range_search(
        queries, coarse, segments, cells, groups, index.search_options(1, params), filter, score=score
    )
    return lims, scores, ids_at([part.ids for part in segments], rows)


def _of_queries(params: SearchParams, queries: Tensor) -> Tensor | None:
    """The groups (Q,) of the queries, which `filtering.query_filter` has checked."""
    if params.groups is None:
        return None
    groups, count = params.groups.to(queries.device, torch.int64), queries.shape[0]
    # Under vmap these are the queries of all entries of the batch.
    return groups if groups.shape[0] == count else groups.repeat(count // max(1, groups.shape[0]))


def _read(index: IndexBase, params: SearchParams, *, counted: bool) -> tuple[Coarse, list[InvertedLists], list[Cells]]:
    """What a search reads, without the rows that a selector of all queries masks, and the cells of each segment."""
    version = index.store.versions.read(counted=counted)
    coarse, segments = version.lists(counted=counted)
    cells = version.cells(counted=counted)
    if params.selector is not None and shared(params.selector):
        chosen = validation.selector(params.selector, "selector", index.device)
        segments = [mask_rows(lists, is_selected(lists.ids, chosen)) for lists in segments]
    return coarse, segments, cells
