"""Searching the same lists: every list-based engine on one set of centroids, in growing batches."""

from __future__ import annotations

from ..context import Context
from ..engines import IVF
from .ladder import climb

__all__ = ["run"]


def run(ctx: Context) -> None:
    engines = ctx.build_paired(IVF)
    for engine in engines.values():
        engine.set(ctx.case.nprobe)
    climb(ctx, engines, ctx.case.nqs, nb=ctx.data.base.shape[0], nlist=ctx.case.nlist, nprobe=ctx.case.nprobe)
