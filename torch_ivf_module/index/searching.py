"""Searching: methods of `IndexBase`, and the functions that `ShardedIndex` calls for the rows of one process.

Q queries, L lists, P probes, N vectors, d dim, k results, n results of all queries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling, is_exporting

from .._torch_internals import compiler_active, not_compiled
from ..functional import filtered_search, range_scan
from ..functional import metric as metrics
from ..functional.codec import Codes
from ..functional.filters import Filter
from ..functional.kernels import kernel_for
from ..functional.lists import InvertedLists, ids_at, restricted, vectors_at
from ..functional.probe import Coarse, probe
from ..functional.search import capped_lists, finite_queries
from ..functional.search import search as search_lists
from ..functional.transforms import differentiable, is_dual, outside, scored, tracked, transforming, wrapped
from ..params import DEFAULTS, SearchParams, positive, shared
from . import grouping, validation
from .eager import autocasts, eager, recorded_by_fx, refuse_recording, refuse_tracing, without_autocast
from .filtering import id_orders, query_filter
from .integrity import refuse_without_values
from .operator import recorded_search

if TYPE_CHECKING:
    from .base import IndexBase
    from .store import ListStore

# -- methods -----------------------------------------------------------------------------------------------


def search(self: IndexBase, x: Tensor, k: int, *, params: SearchParams | None = None) -> tuple[Tensor, Tensor]:
    """The k nearest stored vectors of each query.

    Parameters
    ----------
    x : (nq, d) queries: float16, bfloat16, float32 or float64, any strides.
    k : results per query, >= 1.
    params : settings of this call.

    Returns
    -------
    D : (nq, k) float32: squared L2 ascending, or inner product / cosine descending; differentiable in `x`.
    I : (nq, k) int64 ids.

    If fewer than k vectors are found, the remaining I are -1 and the remaining D +inf (l2) or -inf (ip, cosine). A
    query that is not finite has no results. Raises ValueError, TypeError or RuntimeError (untrained index), which name
    the argument.
    """
    if is_dynamo_compiling() or is_exporting():
        return recorded_search(self, x, k, params)[:2]
    answer = _untraced_answer if compiler_active() else _answer
    scores, ids, _ = answer(self, x, k, params, "search")
    return metrics.to_distance(scores, self.metric), ids


def search_and_reconstruct(
    self: IndexBase, x: Tensor, k: int, *, params: SearchParams | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`search` that also returns the vectors found, R (nq, k, d) in the storage dtype; NaN where I is -1.

    >>> from torch_ivf_module import IndexFlatL2
    >>> index = IndexFlatL2(2)
    >>> index.add(torch.eye(2))
    >>> index.search_and_reconstruct(torch.tensor([[0.0, 0.9]]), 1)[2]
    tensor([[[0., 1.]]])
    """
    if is_dynamo_compiling() or is_exporting():
        return recorded_search(self, x, k, params, with_vectors=True)
    answer = _untraced_answer if compiler_active() else _answer
    scores, ids, vectors = answer(self, x, k, params, "search_and_reconstruct", with_vectors=True)
    return metrics.to_distance(scores, self.metric), ids, vectors


@eager
def range_search(
    self: IndexBase, x: Tensor, radius: float | Tensor, *, params: SearchParams | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All vectors of the probed lists strictly inside the radius: D < radius (l2), D > radius (ip, cosine).

    `radius` is a number, or a tensor (nq,) with one for each query. Returns lims (nq + 1,) int64, D (n,) float32 and
    I (n,) int64. The results of query i are ``lims[i]:lims[i + 1]``, in any order. Of `params`, only `nprobe`,
    `selector`, `exclude` and `groups` are used: all rows of the probed lists are read, and `max_codes` and budgets are
    ignored, as in faiss. D has no derivative and never requires grad. Raises the errors of `search`, and RuntimeError
    for a dual tensor x.
    """
    x = validation.vectors(x, "x", self.d, self.device)
    if is_dual(x):
        raise RuntimeError("range_search has no derivative, but x is a dual tensor of forward mode: detach it")
    radii = validation.radii(radius, "radius", x.shape[0], self.device)
    params = self.checked_params(params)
    self.store.require_trained("range_search")
    filter = query_filter(params, x.shape[0], self.device)
    return range_of_prepared(self, prepared(self, x), radii, params, filter=filter)


def forward(self: IndexBase, x: Tensor) -> tuple[Tensor, Tensor]:
    """``search(x, self.k)`` for x (..., d): D and I of shape (..., k).

    Under torch.compile it calls the graph that ``graph()`` made, if neither index nor settings have changed since.
    """
    if is_dynamo_compiling() and self.store.graph is not None:
        compiled: tuple[Tensor, Tensor] = self.store.graph(x)
        return compiled
    if (node := recorded_by_fx(self, x)) is not None:
        return node
    if not (is_dynamo_compiling() or is_exporting()):
        refuse_recording("forward")
        x = validation.layer_input(x, "x", self.d, self.device)
    elif x.shape[-1] != self.d:
        raise ValueError(f"x must have shape (..., {self.d}), got {tuple(x.shape)}")
    found, ids = self.search(x.reshape(-1, self.d), self.k)
    return found.view(*x.shape[:-1], self.k), ids.view(*x.shape[:-1], self.k)


# -- functions ---------------------------------------------------------------------------------------------


def prepared(index: IndexBase, x: Tensor) -> Tensor:
    """Queries x (Q, d) in float32, as the metric compares them."""
    with without_autocast(x.device):
        return metrics.prepare(x.float(), index.metric)


def probed_lists(index: IndexBase, queries: Tensor, params: SearchParams, sizes: Tensor | None = None) -> Tensor:
    """The lists (Q, P) that prepared queries read. `max_codes` counts `sizes` (L + 1,); it is not applied without."""
    with without_autocast(queries.device), torch.no_grad():
        coarse, segments = index.store.segments(counted=False)  # nothing counts their rows: no reason to pack
        options = index.search_options(1, params)
        if sizes is not None:
            segments = [segments[0]._replace(sizes=sizes)]
        x, finite = finite_queries(queries)
        nearest = probe(x, coarse, options.nprobe, index.metric, kernel_for(x))
        cap = None if sizes is None else options.max_codes
        return capped_lists(nearest, finite, coarse, segments, cap)[0]


def search_prepared(
    index: IndexBase,
    queries: Tensor,
    k: int,
    params: SearchParams,
    probed: Tensor | None = None,
    filter: Filter | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[InvertedLists]]:
    """Scores, rows and ids (Q, k) of prepared queries, and the segments over which the rows are numbered.

    `probed` (Q, P), if given, are the lists to read; `filter` is that of the queries, see `filtering.query_filter`.
    Call it without autocast and under `torch.no_grad`.
    """
    if grouping.by_group(params):
        return grouping.search_by_group(index, queries, k, params, filter)
    options = index.search_options(k, params)
    counted = options.max_codes is not None or options.budget is not None
    coded = options.mode == "auto" and not options.exact
    visits = queries.shape[0] * options.nprobe
    coarse, segments, codes = _read_lists(index, params, visits, counted=counted, coded=coded)
    stats: dict[str, Any] | None = {} if params.debug_stats else None
    if filter is None:
        scores, rows, ids = search_lists(queries, coarse, segments, options, codes=codes, probed=probed, stats=stats)
    else:
        filter = filter.repeated(queries.shape[0])
        orders = id_orders(filter, index.store, segments, options)
        scores, rows, ids = filtered_search.search(
            queries, coarse, segments, options, filter, orders=orders, codes=codes, probed=probed, stats=stats
        )
    if stats is not None:
        index.last_search_stats = stats
    return scores, rows, ids, segments


def range_of_prepared(
    index: IndexBase,
    queries: Tensor,
    radii: Tensor,
    params: SearchParams,
    probed: Tensor | None = None,
    filter: Filter | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`range_search` of prepared queries and radii (Q,); `probed` and `filter` as for `search_prepared`."""
    with without_autocast(queries.device), torch.no_grad():
        score = metrics.to_score(radii, index.metric)
        if grouping.by_group(params):
            lims, scores, ids = grouping.range_by_group(index, queries, score, params, filter)
            return lims, metrics.to_distance(scores, index.metric), ids
        options = index.search_options(1, params)
        coarse, segments, _ = _read_lists(index, params, queries.shape[0] * options.nprobe, counted=False)
        orders = None if filter is None else id_orders(filter, index.store, segments, options)
        lims, scores, rows = range_scan.range_search(
            queries,
            coarse,
            segments,
            score=score,
            nprobe=options.nprobe,
            metric=index.metric,
            max_bytes=index.max_bytes,
            probed=probed,
            filter=filter,
            orders=orders,
        )
        return lims, metrics.to_distance(scores, index.metric), ids_at([part.ids for part in segments], rows)


def _answer(
    index: IndexBase, x: Tensor, k: int, params: SearchParams | None, action: str, *, with_vectors: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (Q, k), differentiable in x, best first, ids (Q, k), and vectors (Q, k, d) if `with_vectors`.

    Without vectors the third result is arbitrary.
    """
    refuse_tracing(action)
    store = index.store
    x = validation.vectors(x, "x", store.d, store.device)
    k = positive(k, "k")
    if not store.is_trained:
        store.require_trained(action)
    _refuse_transformed_buffers(store)
    params = DEFAULTS if params is None else index.checked_params(params)
    filter = None if params is DEFAULTS else query_filter(params, x.shape[0], x.device)
    if autocasts(x.device):
        with torch.autocast(x.device.type, enabled=False):
            return _answer_in_float32(index, x, k, params, filter, with_vectors)
    return _answer_in_float32(index, x, k, params, filter, with_vectors)


# Where torch.compile could not record a search, it would trace this function instead.
_untraced_answer = not_compiled(_answer, "the operator of a search could not be recorded")


def _answer_in_float32(
    index: IndexBase, x: Tensor, k: int, params: SearchParams, filter: Filter | None, with_vectors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`_answer` for checked arguments, without autocast."""
    queries = metrics.prepare(x.float(), index.metric)
    if not differentiable(queries):  # autograd records nothing, so `torch.no_grad` is not needed
        scores, rows, ids, segments = search_prepared(index, queries, k, params, filter=filter)
        return scores, ids, vectors_at([part.packed for part in segments], rows, index.d) if with_vectors else scores

    def find(plain: Tensor) -> tuple[Tensor, ...]:
        _, rows, ids, segments = search_prepared(index, plain, k, params, filter=filter)
        return ids, vectors_at([part.packed for part in segments], rows, index.d)

    ids, vectors = outside(find, queries)
    return scored(queries, ids, vectors, index.metric)


def _read_lists(
    index: IndexBase, params: SearchParams, visits: int, *, counted: bool, coded: bool = False
) -> tuple[Coarse, list[InvertedLists], Codes | None]:
    """What a search reads: the segments of the store, restricted to the ids of the selector, and codes of the first.

    `visits` is the number of lists that all queries read; `counted` says that the number of rows is limited, which
    counts rows that the selector excludes too; `coded` that the search can read codes. A copy of the chosen rows has
    none.
    """
    version = index.store.versions.read(counted=counted)
    coarse, segments = version.lists(counted=counted)
    each = visits / max(1, coarse.centroids.shape[0])
    setting = index._codes if coded and not (counted and version.deleted) else None  # copies have no codes
    codes = version.packed.codes.get(setting, segments[0], each)
    if params.selector is None or not shared(params.selector):
        return coarse, segments, codes
    chosen = validation.selector(params.selector, "selector", index.device)
    chosen_rows = [restricted(lists, chosen, None if counted else each) for lists in segments]
    return coarse, chosen_rows, codes if chosen_rows[0].packed is segments[0].packed else None


def _refuse_transformed_buffers(store: ListStore) -> None:
    """RuntimeError if a buffer has no values, requires a derivative, or belongs to a torch.func transform."""
    buffers = store.buffers
    if transforming():
        for name in store.names:
            if wrapped(buffers[name]):
                raise RuntimeError(
                    f"{name} belongs to a torch.func transform, and a search has derivatives and batches of x "
                    "alone: leave the buffers of an index out of the arguments that grad, jvp or vmap transform; "
                    "state_dict() inside of the function makes such tensors too, so take it outside, or use "
                    "dict(model.named_buffers())"
                )
    if type(ids := buffers["list_ids"]) is not Tensor or ids.is_meta:
        refuse_without_values(buffers)
    for name in store.names[:2]:  # the others are integers
        if tracked(buffers[name]):
            raise RuntimeError(
                f"{name} requires grad or is a dual tensor, but a search has derivatives with respect to x alone: "
                "detach it"
            )
