"""The search of an index as one operator, torch.ops.torch_ivf_module.search, which torch.compile records.

The operator takes a number that stands for the index, not its buffers. So a compiled model contains nothing of the
index: it finds rows that are added later, and no change of the index makes it compile again. Q queries, d dim, k
results.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .._torch_internals import below_autograd, not_compiled
from ..functional import metric as metrics
from ..functional.transforms import is_dual, scored
from ..params import DEFAULTS, SearchParams
from .eager import refuse_recording
from .exporting import exported_search

if TYPE_CHECKING:
    from .base import IndexBase

NAME = "torch_ivf_module::search"
_FIELDS = tuple(field.name for field in fields(SearchParams))
_TYPES = {"selector": "Tensor?", "profile": "str", "budget_strategy": "str", "list_ordering": "str?"}
_TYPES |= {"rebuild_policy": "str", "nprobe": "int?", "max_codes": "int?", "candidate_budget": "int?"}
_TYPES |= {"use_per_list_sizes": "bool?", "safe_pruning": "bool?"}
_INDEXES: weakref.WeakValueDictionary[int, IndexBase] = weakref.WeakValueDictionary()
_numbers = itertools.count()
_refuse_export = not_compiled(
    refuse_recording, "torch.export takes a search with strict=False, or as the module that index.graph(...) returns"
)


def number_of(index: IndexBase) -> int:
    """A new number for an index, under which the operator finds it as long as it lives."""
    number = next(_numbers)
    _INDEXES[number] = index
    return number


def recorded_search(
    index: IndexBase, x: Tensor, k: int, params: SearchParams | None = None, *, with_vectors: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """D and I (Q, k) of queries x (Q, d), and the vectors (Q, k, d) if asked for: what torch.compile records.

    Only settings of the index are read here: a buffer would become an input of the compiled graph, which would then
    depend on its size.
    """
    if torch.compiler.is_exporting():
        if is_dynamo_compiling():
            _refuse_export("search")
        return exported_search(index, x, k, params)
    settings = [getattr(params or DEFAULTS, name) for name in _FIELDS]
    call = torch.ops.torch_ivf_module.search.default
    if not (x.requires_grad and torch.is_grad_enabled()):
        found: tuple[Tensor, Tensor, Tensor] = call(x, index.number, k, with_vectors, *settings)
        return found
    # What is nearest has no derivative; D is computed once more from x, by operations that have all derivatives.
    _, ids, vectors = call(x.detach(), index.number, k, True, *settings)
    with torch.autocast(x.device.type, enabled=False):
        scores, ids, vectors = scored(metrics.prepare(x.float(), index.metric), ids, vectors, index.metric)
        return metrics.to_distance(scores, index.metric), ids, vectors


def _index(number: int) -> IndexBase:
    index = _INDEXES.get(number)
    if index is None:
        raise RuntimeError("the index that this model was compiled with is no longer there: compile it again")
    return index


def _search(
    x: Tensor, number: int, k: int, with_vectors: bool, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    index, params = _index(number), SearchParams(**dict(zip(_FIELDS, settings, strict=True)))
    if with_vectors:
        return index.search_and_reconstruct(x, k, params=params)
    distances, ids = index.search(x, k, params=params)
    return distances, ids, x.new_empty(0, 0, 0, dtype=index.dtype)


def _shapes(
    x: Tensor, number: int, k: int, with_vectors: bool, *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    index = _index(number)
    if x.dim() != 2 or x.shape[1] != index.d:
        raise ValueError(f"x must have shape (n, {index.d}), got {tuple(x.shape)}")
    shape = (x.shape[0], k)
    vectors = (*shape, index.d) if with_vectors else (0, 0, 0)
    return (
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int64),
        x.new_empty(vectors, dtype=index.dtype),
    )


class _Differentiable(torch.autograd.Function):
    """The operator with its derivative with respect to x: that of the distances to the vectors that were found."""

    @staticmethod
    def forward(x: Tensor, number: int, k: int, with_vectors: bool, *settings: Any) -> tuple[Tensor, ...]:
        if not with_vectors:
            raise RuntimeError(f"{NAME} has a derivative with with_vectors=True alone")
        return _without_autograd(x, number, k, with_vectors, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.metric = _index(inputs[1]).metric
        ctx.save_for_backward(inputs[0], *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, distances: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, ids, vectors = ctx.saved_tensors
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            scores = scored(metrics.prepare(leaf.float(), ctx.metric), ids, vectors, ctx.metric)[0]
            (found,) = torch.autograd.grad(metrics.to_distance(scores, ctx.metric), leaf, distances)
        return (found, *[None] * (3 + len(_FIELDS)))


def _without_autograd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with below_autograd():
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_ivf_module.search.default(*arguments)
        return found


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
    """vmap: one search of the queries of all entries of the batch."""
    with_vectors = rest[2]
    if any(dim is not None for dim in in_dims[1:]) or in_dims[0] is None:
        raise RuntimeError(f"{NAME} has batches of x alone under vmap")
    batch = x.movedim(in_dims[0], 0)
    distances, ids, vectors = torch.ops.torch_ivf_module.search.default(batch.flatten(0, 1), *rest)
    size = batch.shape[:2]
    vectors = vectors.unflatten(0, size) if with_vectors else vectors
    return (distances.unflatten(0, size), ids.unflatten(0, size), vectors), (0, 0, 0 if with_vectors else None)


def _register() -> torch.library.Library:
    rest = ", ".join(f"{_TYPES.get(name, _kind(name))} {name}" for name in _FIELDS)
    library = torch.library.Library("torch_ivf_module", "FRAGMENT")
    library.define(
        f"search(Tensor x, int index, SymInt k, bool with_vectors, {rest}) -> (Tensor, Tensor, Tensor)"
    )
    library.impl("search", _search, "CompositeExplicitAutograd")
    torch.library.register_fake(NAME, _shapes, lib=library)
    library.impl("search", _with_autograd, "Autograd")
    torch.library.register_vmap(NAME, _batched, lib=library)
    return library


def _kind(name: str) -> str:
    return type(getattr(DEFAULTS, name)).__name__


_library = _register()  # which must live as long as the operator
