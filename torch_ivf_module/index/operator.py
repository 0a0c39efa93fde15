"""The search of an index as the operator torch.ops.torch_ivf_module.search, which torch.compile records.

The operator takes an integer, the handle of the index, not its buffers. So a compiled model has no tensor of the index
as an input: it finds rows that are added later, and a change of the index does not compile it again. Q queries, d dim,
k results.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._torch_internals import below_autograd, not_compiled
from ..functional import metric as metrics
from ..functional.transforms import is_dual, scored
from ..params import DEFAULTS, SearchParams, repeated
from .eager import refuse_recording
from .exporting import exported_search

if TYPE_CHECKING:
    from .base import IndexBase

NAME = "torch_ivf_module::search"
# Types of the fields of SearchParams in the language of operator schemas, where "int | None" is "int?". A selector that
# is a list for each query has an argument of its own.
_LISTS = "selector_lists"
_FIELDS = {field.name: str(field.type).replace(" | None", "?") for field in fields(SearchParams)}
_FIELDS |= {"selector": "Tensor?", _LISTS: "Tensor[]?"}
_INDEXES: weakref.WeakValueDictionary[int, IndexBase] = weakref.WeakValueDictionary()  # by handle
_handles = itertools.count()
_refuse_export = not_compiled(
    refuse_recording, "torch.export takes a search with strict=False, or as the module that index.graph(...) returns"
)


def new_handle(index: IndexBase) -> int:
    """An integer by which the operator finds the index as long as it exists."""
    handle = next(_handles)
    _INDEXES[handle] = index
    return handle


def recorded_search(
    index: IndexBase, x: Tensor, k: int, params: SearchParams | None = None, *, with_vectors: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """What torch.compile records of a search of x (Q, d): D and I (Q, k), and the vectors (Q, k, d) `with_vectors`.

    It reads settings of the index only: a buffer would become an input of the compiled graph, which would then depend
    on its size.
    """
    if torch.compiler.is_exporting():
        if is_dynamo_compiling():
            _refuse_export("search")
        return exported_search(index, x, k, params, with_vectors=with_vectors)
    settings = _settings_of(params or DEFAULTS)
    call = torch.ops.torch_ivf_module.search.default
    if not (x.requires_grad and torch.is_grad_enabled()):
        results: tuple[Tensor, Tensor, Tensor] = call(x, index._handle, k, with_vectors, *settings)
        return results
    # The operator selects the vectors; D is computed again from x by operations that have derivatives of every order.
    _, ids, vectors = call(x.detach(), index._handle, k, True, *settings)
    with torch.autocast(x.device.type, enabled=False):
        scores, ids, vectors = scored(metrics.prepare(x.float(), index.metric), ids, vectors, index.metric)
        return metrics.to_distance(scores, index.metric), ids, vectors


def _settings_of(params: SearchParams) -> list[Any]:
    """The arguments of the operator for the fields of `params`."""
    values = {name: getattr(params, name, None) for name in _FIELDS}
    if isinstance(params.selector, tuple):
        values |= {"selector": None, _LISTS: list(params.selector)}
    return list(values.values())


def _params_of(settings: Sequence[Any]) -> SearchParams:
    values = dict(zip(_FIELDS, settings, strict=True))
    lists = values.pop(_LISTS)
    return SearchParams(**values) if lists is None else SearchParams(**{**values, "selector": tuple(lists)})


def _index(handle: int) -> IndexBase:
    index = _INDEXES.get(handle)
    if index is None:
        raise RuntimeError("the index of this compiled model has been deleted: keep a reference, and compile again")
    return index


def _search(x: Tensor, handle: int, k: int, with_vectors: bool, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The operator; `settings` are the fields of SearchParams. Without vectors the third result has no elements."""
    index, params = _index(handle), _params_of(settings)
    if with_vectors:
        return index.search_and_reconstruct(x, k, params=params)
    distances, ids = index.search(x, k, params=params)
    return distances, ids, x.new_empty(0, 0, 0, dtype=index.dtype)


def _shapes(x: Tensor, handle: int, k: int, with_vectors: bool, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Results of the right shapes and dtypes without values."""
    index = _index(handle)
    if x.dim() != 2 or x.shape[1] != index.d:
        raise ValueError(f"x must have shape (n, {index.d}), got {tuple(x.shape)}")
    shape = (x.shape[0], k)
    return (
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty((*shape, index.d) if with_vectors else (0, 0, 0), dtype=index.dtype),
    )


class _Differentiable(torch.autograd.Function):
    """The operator with its gradient with respect to x: that of the distances to the vectors that were found."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _without_autograd(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, handle, _, with_vectors, *_ = inputs
        ctx.metric, ctx.with_vectors = _index(handle).metric, with_vectors
        ctx.save_for_backward(x, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradient with respect to x, for the gradient (Q, k) with respect to D; other arguments have none."""
        if not ctx.with_vectors:
            raise RuntimeError(f"{NAME} has a derivative with with_vectors=True alone")
        x, ids, vectors = ctx.saved_tensors
        padding = ids == -1
        queries = x.float().masked_fill(padding.all(1, keepdim=True), 0)  # without results: perhaps NaN
        known, weights = vectors.float().masked_fill(padding[..., None], 0), grad.masked_fill(padding, 0)
        gradient = metrics.distance_gradient(queries, known, weights, ctx.metric)
        return (gradient.to(x.dtype), *[None] * (3 + len(_FIELDS)))


def _without_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with below_autograd():
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_ivf_module.search.default(*arguments)
        return result


def _with_autograd(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    if is_dual(x):
        raise RuntimeError(f"{NAME} has no derivative of forward mode: call the search of the index itself")
    if x.requires_grad and torch.is_grad_enabled():
        differentiated: tuple[Tensor, ...] = _Differentiable.apply(x, *rest)
        return differentiated
    return _without_autograd(x, *rest)


def _batched(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, *rest: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """vmap: one search of the queries of all entries of the batch, which have the same filters."""
    handle, k, with_vectors, *settings = rest
    dims = [dim for part in in_dims[1:] for dim in (part if isinstance(part, (list, tuple)) else [part])]
    if any(dim is not None for dim in dims) or in_dims[0] is None:
        raise RuntimeError(f"{NAME} has batches of x alone under vmap, not of selector or exclude")
    batch, params = x.movedim(in_dims[0], 0), repeated(_params_of(settings), info.batch_size)
    distances, ids, vectors = torch.ops.torch_ivf_module.search.default(
        batch.flatten(0, 1), handle, k, with_vectors, *_settings_of(params)
    )
    size = batch.shape[:2]
    vectors = vectors.unflatten(0, size) if with_vectors else vectors
    return (distances.unflatten(0, size), ids.unflatten(0, size), vectors), (0, 0, 0 if with_vectors else None)


def _register() -> torch.library.Library:
    settings = ", ".join(f"{kind} {name}" for name, kind in _FIELDS.items())
    library = torch.library.Library("torch_ivf_module", "FRAGMENT")
    library.define(f"search(Tensor x, int handle, SymInt k, bool with_vectors, {settings}) -> (Tensor, Tensor, Tensor)")
    library.impl("search", _search, "CompositeExplicitAutograd")
    torch.library.register_fake(NAME, _shapes, lib=library)
    library.impl("search", _with_autograd, "Autograd")
    torch.library.register_vmap(NAME, _batched, lib=library)
    return library


_library = _register()  # the operator exists as long as this object
