"""Searching the same lists: every list-based engine on one set of centroids, in growing batches.

Beside them stands the floor: what this machine needs for the products alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import machine
from ..context import Context
from ..engines import IVF, Variant
from ..measure import interleave
from .ladder import climb

__all__ = ["run"]

_IN_TURN = 8  # lists that the floor's products go through, so that a list is not always the one still in cache


def run(ctx: Context) -> None:
    engines = ctx.build_paired(IVF)
    for engine in engines.values():
        engine.set(ctx.case.nprobe)
    if "ours" in engines:
        _floor(ctx, _rows_read(ctx, engines["ours"]))
    climb(ctx, engines, ctx.case.nqs, nb=ctx.data.base.shape[0], nlist=ctx.case.nlist, nprobe=ctx.case.nprobe)


def _rows_read(ctx: Context, engine: Variant) -> float:
    """Rows that a query reads, on average."""
    from torch_ivf_module import SearchParams

    engine.index.search(engine.native(ctx.checked), ctx.case.k, params=SearchParams(debug_stats=True))
    return float(engine.index.last_search_stats["rows_read"] / len(ctx.checked))


def _floor(ctx: Context, rows_read: float) -> None:
    """GFLOP/s of plain products: the visitors of a list, were all queries one batch, with its rows."""
    ctx.note("floor")
    nb, d = ctx.data.base.shape
    shape = (max(1, len(ctx.data.queries) * ctx.case.nprobe // ctx.case.nlist), d, max(1, nb // ctx.case.nlist))
    dtypes = [torch.float32, *([torch.bfloat16] if machine.bfloat16_units(machine.simd()) else [])]
    calls = {str(dtype).removeprefix("torch."): _products(shape, dtype) for dtype in dtypes}
    for name, timing in interleave(calls, ctx.effort).items():
        gflops = 2 * shape[0] * shape[1] * shape[2] / timing.seconds / 1e9
        ctx.floor(dtype=name, gflops=gflops, tile=shape, rows_read=rows_read)


def _products(shape: tuple[int, int, int], dtype: torch.dtype) -> Callable[[int], Any]:
    m, d, n = shape
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(m, d, generator=generator).to(dtype)
    lists = torch.randn(_IN_TURN, n, d, generator=generator).to(dtype)
    scores = torch.empty(m, n, dtype=dtype)
    return lambda i: torch.mm(queries, lists[i % _IN_TURN].t(), out=scores)
