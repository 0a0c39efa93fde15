"""Derivatives and torch.func transforms of a search.

Which rows are nearest has no derivative, so a search is one step that no transform looks into, and the scores of what
it found are operations on the queries, which every transform understands. Q queries, d dim, k results.
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


def transforming() -> bool:
    """Whether a torch.func transform (grad, jvp, vmap, ...) is running.

    Tensors computed in one are wrappers that are good for nothing once it has ended, even those computed from plain
    tensors: whatever is kept must be computed by `outside`.
    """
    return transforms_active()


def wrapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to a running transform."""
    return not torch.compiler.is_compiling() and is_transformed(tensor)


def refuse_transform(action: str) -> None:
    """RuntimeError inside a torch.func transform, for what cannot be done there."""
    if transforming():
        raise RuntimeError(
            f"{action} is not supported inside a torch.func transform (grad, jvp, vmap, ...): only search, "
            f"search_and_reconstruct and forward are; call {action} outside"
        )


def differentiable(x: Tensor) -> bool:
    """Whether derivatives with respect to `x` may be asked for: in reverse or forward mode, or by a transform."""
    return tracked(x) or transforming()


def tracked(x: Tensor) -> bool:
    """Whether autograd follows `x`, in reverse or forward mode."""
    return (x.requires_grad and torch.is_grad_enabled()) or (forward_ad._current_level >= 0 and is_dual(x))


def is_dual(x: Tensor) -> bool:
    """Whether `x` has a tangent, as forward mode gives it."""
    return forward_ad.unpack_dual(x).tangent is not None


def outside(find: Find, x: Tensor) -> tuple[Tensor, ...]:
    """``find(x)`` on plain tensors, outside of all transforms, without derivatives.

    x (Q, d). `find` returns tensors (Q, ...), each row from the same row of x alone: under vmap it is called once, with
    the rows of the whole batch.
    """
    x = x.detach()
    if not transforming():
        with torch.no_grad():
            return find(x)
    found: tuple[Tensor, ...] = _Outside.apply(x, find)
    return found


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
    """torch.func calls `forward` of such a function with the transforms set aside and plain tensors."""

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
        found = outside(find, batch.flatten(0, 1))
        return tuple(part.unflatten(0, batch.shape[:2]) for part in found), (0,) * len(found)


def scored(x: Tensor, ids: Tensor, vectors: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (Q, k) of found vectors (Q, k, d) in operations on x (Q, d), with their ids and the vectors, best first.

    An id of -1 is padding. The order is made anew, because the step that found them may have rounded differently; a
    place without a result has a derivative of zero.
    """
    missing = ids == -1
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).masked_fill(missing, -1)
    known = vectors.float().masked_fill(missing[..., None], 0)
    scores = metrics.differentiable_scores(x.masked_fill(missing.all(1, keepdim=True), 0), known, metric)
    scores, places = select_topk(scores, places, ids.shape[1])
    at = places.clamp(min=0)
    ids = ids.gather(1, at).masked_fill(places < 0, -1)
    vectors = vectors.gather(1, at[..., None].expand_as(vectors)).masked_fill((places < 0)[..., None], torch.nan)
    return scores, ids, vectors
