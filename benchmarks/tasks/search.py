"""Searching in growing batches: the same lists for every list-based engine, or exhaustively; and the list sizes.

With the lists comes the floor: the time of the matrix products alone on this machine.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from torch_ivf_module import SearchParams

from .. import answers, machine, rss
from ..context import Context
from ..engines import FLAT, Variant
from ..measure import interleave

_CHECKED = 256  # at least so many queries are checked at every batch size
_LISTS = 8  # lists that the floor's products alternate between, so that a list is not always in the cache


def lists(ctx: Context) -> None:
    """The list sizes that this library's training gives; a property of the data, not of the machine."""
    for name, engine in ctx.build_paired("ours").items():
        ctx.row(name, sizes=engine.index.list_sizes().tolist(), imbalance=engine.index.imbalance_factor())


def run(ctx: Context) -> None:
    engines = ctx.build_paired()
    if "ours" in engines:
        _floor(ctx, _rows_read(ctx, engines["ours"]))
    _batches(ctx, engines, ctx.case.nqs, nb=len(ctx.data.base), nlist=ctx.case.nlist, nprobe=ctx.case.nprobe)


def flat(ctx: Context) -> None:
    engines = ctx.make(FLAT)
    ctx.note("building")
    for engine in engines.values():
        engine.add(engine.convert(ctx.data.base))
    _batches(ctx, engines, ctx.case.flat_nqs, nb=len(ctx.data.base))


def _batches(ctx: Context, engines: Mapping[str, Variant], nqs: Iterable[int], **fields: Any) -> None:
    """Time every engine at every batch size, and check what it answers there."""
    rows = {name: engine.convert(ctx.data.queries) for name, engine in engines.items()}
    per_query = dict.fromkeys(engines, 0.0)  # seconds, from the last batch size an engine was timed at
    for nq in (nq for nq in nqs if nq <= len(ctx.data.queries)):
        ctx.note(f"nq {nq:,}")
        first = {}
        for name, expected in list(per_query.items()):
            if expected * nq > ctx.effort.call_seconds:
                ctx.skip(name, f"one call would take about {expected * nq:.0f} s", nq=nq)
            else:
                first[name] = _first_call(ctx, name, engines[name], rows[name], nq)
        running = {name: engines[name] for name, found in first.items() if found is not None}
        calls = {name: ctx.caller(engine, rows[name], nq) for name, engine in running.items()}
        timings = ctx.time(calls, nq, facts=_check(ctx, running, rows, nq, first), **fields)
        per_query = {name: timing["seconds"] / nq for name, timing in timings.items()}


def _first_call(ctx: Context, name: str, engine: Variant, rows: Any, nq: int) -> tuple[int, Any] | None:
    """How far memory grew in the first call at this batch size, and its answer; None if the engine failed."""
    try:
        rss.trim()
        return rss.growth(lambda: engine.search(rows[:nq], ctx.case.k))
    except (RuntimeError, MemoryError, ValueError) as error:
        ctx.skip(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", nq=nq)
        return None


def _check(
    ctx: Context, running: Mapping[str, Variant], rows: Mapping[str, Any], nq: int, first: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Recall, and agreement with faiss (or the first engine), of answers given in batches of this very size."""
    ids = {name: _ids(ctx, engine, rows[name], nq, first[name][1]) for name, engine in running.items()}
    reference = "faiss" if "faiss" in ids else next(iter(ids), None)
    facts: dict[str, dict[str, float]] = {}
    for name, found in ids.items():
        checked = len(found)
        given = (ctx.data.base, ctx.checked[:checked], found)
        share = answers.recall(*given, ctx.truth[:checked], ctx.case.metric)
        facts[name] = {"recall": share, "checked": checked, "peak_growth_bytes": first[name][0]}
        if reference is not None and name != reference:
            facts[name]["agreement"] = answers.agreement(*given, ids[reference], ctx.case.metric)
    return facts


def _ids(ctx: Context, engine: Variant, rows: Any, nq: int, answer: Any) -> np.ndarray:
    """The ids of the first queries, batch after batch; `answer` is that to the first batch."""
    checked = min(len(ctx.checked), max(nq, _CHECKED))
    rest = [engine.ids(engine.search(rows[start : start + nq], ctx.case.k)) for start in range(nq, checked, nq)]
    return np.concatenate([engine.ids(answer), *rest])[:checked]


def _rows_read(ctx: Context, engine: Variant) -> float:
    """Rows that a query reads, on average."""
    engine.index.search(engine.convert(ctx.checked), ctx.case.k, params=SearchParams(debug_stats=True))
    return float(engine.index.last_search_stats["rows_read"] / len(ctx.checked))


def _floor(ctx: Context, rows_read: float) -> None:
    """GFLOP/s of plain products: the queries that probe a list, if all queries were one batch, with its rows."""
    ctx.note("floor")
    nb, d = ctx.data.base.shape
    shape = (max(1, len(ctx.data.queries) * ctx.case.nprobe // ctx.case.nlist), d, max(1, nb // ctx.case.nlist))
    dtypes = [torch.float32, *([torch.bfloat16] if machine.bfloat16_units(machine.simd()) else [])]
    calls = {str(dtype).removeprefix("torch."): _products(shape, dtype) for dtype in dtypes}
    for name, timing in interleave(calls, ctx.effort).items():
        gflops = 2 * shape[0] * shape[1] * shape[2] / timing["seconds"] / 1e9
        ctx.floor(dtype=name, gflops=gflops, tile=shape, rows_read=rows_read)


def _products(shape: tuple[int, int, int], dtype: torch.dtype) -> Callable[[int], Any]:
    m, d, n = shape
    queries, lists = torch.randn(m, d).to(dtype), torch.randn(_LISTS, n, d).to(dtype)
    scores = torch.empty(m, n, dtype=dtype)
    return lambda i: torch.mm(queries, lists[i % _LISTS].t(), out=scores)
