"""Derivatives and torch.func transforms of a search.

Which rows are nearest has no derivative. So the search runs outside of all transforms, and the scores of its results
are then computed again by differentiable operations on the queries. Q queries, d dim, k results.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._torch_internals import is_transformed, transforms_active
from . import metric as metrics
from .select import select_topk

Find = Callable[[Tensor], tuple[Tensor, ...]]


# Whether a torch.func transform (grad, jvp, vmap, ...) is running. Tensors computed in it are wrappers that cannot be
# used after it has ended, even if they were computed from plain tensors. So a tensor that is kept longer must be
# computed in `outside` or `run_outside`.
transforming = transforms_active


def wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a running transform."""
    return not torch.compiler.is_compiling() and is_transformed(tensor)


def refuse_transform(action: str) -> None:
    """Raise RuntimeError inside a torch.func transform: `action` is not supported there."""
    if transforming():
        raise RuntimeError(
            f"{action} is not supported inside a torch.func transform (grad, jvp, vmap, ...): only search, "
            f"search_and_reconstruct and forward are; call {action} outside"
        )


def differentiable(x: Tensor) -> bool:
    """Whether derivatives with respect to `x` may be needed: in reverse or forward mode, or in a transform."""
    return tracked(x) or transforming()


def tracked(x: Tensor) -> bool:
    """Whether autograd records operations on `x`, in reverse or forward mode."""
    return (x.requires_grad and torch.is_grad_enabled()) or (forward_ad._current_level >= 0 and is_dual(x))


def is_dual(x: Tensor) -> bool:
    """Whether `x` is a dual tensor of forward mode."""
    return forward_ad.unpack_dual(x).tangent is not None


def outside(find: Find, x: Tensor) -> tuple[Tensor, ...]:
    """``find(x)`` on plain tensors, outside of all transforms, without derivatives.

    x (Q, d). `find` returns tensors (Q, ...) whose row i depends on row i of x alone: under vmap it is called once, for
    the rows of all batch entries together.
    """
    x = x.detach()
    if not transforming():
        with torch.no_grad():
            return find(x)
    results: tuple[Tensor, ...] = _Outside.apply(x, find)
    return results


def run_outside(function: Callable[[], Any]) -> None:
    """Call `function` outside of all transforms."""
    if not transforming():
        function()
        return

    def find(x: Tensor) -> tuple[Tensor, ...]:
        function()
        return (x.new_empty(0),)

    _Outside.apply(torch.empty(0, 0, device="cpu"), find)


class _Outside(torch.autograd.Function):
    """An autograd.Function for `outside`: torch.func suspends its transforms and calls `forward` with plain tensors."""

    @staticmethod
    def forward(x: Tensor, find: Find) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return find(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None]:
        return None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, None], x: Tensor, find: Find
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        assert in_dims[0] is not None
        batch = x.movedim(in_dims[0], 0)
        results = outside(find, batch.flatten(0, 1))
        return tuple(result.unflatten(0, batch.shape[:2]) for result in results), (0,) * len(results)


def scored(x: Tensor, ids: Tensor, vectors: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiable scores (Q, k) of the results of a search for x (Q, d), with their ids and vectors, best first.

    ids (Q, k), -1 for padding; vectors (Q, k, d). The results are sorted again, because the search may have rounded
    differently. The score of padding has a derivative of zero.
    """
    padding = ids == -1
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).masked_fill(padding, -1)
    finite = vectors.float().masked_fill(padding[..., None], 0)
    scores = metrics.differentiable_scores(x.masked_fill(padding.all(1, keepdim=True), 0), finite, metric)
    scores, columns = select_topk(scores, columns, ids.shape[1])
    at = columns.clamp(min=0)
    ids = ids.gather(1, at).masked_fill(columns < 0, -1)
    vectors = vectors.gather(1, at[..., None].expand_as(vectors)).masked_fill((columns < 0)[..., None], torch.nan)
    return scores, ids, vectors
