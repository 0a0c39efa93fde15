"""Exhaustive search: the flat indexes and scikit-learn's brute force."""

from __future__ import annotations

from ..context import Context
from ..engines import FLAT
from .ladder import climb

__all__ = ["run"]


def run(ctx: Context) -> None:
    engines = ctx.make(FLAT)
    ctx.note("building")
    for engine in engines.values():
        engine.add(engine.native(ctx.data.base))
    climb(ctx, engines, ctx.case.flat_nqs, nb=ctx.data.base.shape[0])
