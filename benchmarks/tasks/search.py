"""Searching in growing batches: the same lists for every list-based engine, or exhaustively; and the list sizes.

With the lists comes the floor: the time of the matrix products alone on this machine.
"""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import accumulate, cycle, takewhile
from typing import Any

import numpy as np
import torch

from torch_ivf_module import SearchParams, native

from .. import answers, machine, rss
from ..context import Context
from ..engines import FLAT, Variant
from ..measure import interleave, timed

_CHECKED = 256  # at least so many queries are checked at every batch size
_THREADS = 4
_THREADED = ("ours", "ours-csr", "ours-matrix", "faiss")
_SIZES = (1, 8, 64, 512)  # batch sizes are mixed, so that different scans run at the same time
_LISTS = 8  # lists that the floor's products alternate between, so that a list is not always in the cache


def lists(ctx: Context) -> None:
    """The list sizes that this library's training gives; a property of the data, not of the machine."""
    for name, engine in ctx.build_paired("ours").items():
        ctx.row(name, sizes=engine.index.list_sizes().tolist(), imbalance=engine.index.imbalance_factor())


def search(ctx: Context) -> None:
    engines = ctx.build_paired()
    if "ours" in engines:
        _floor(ctx, engines["ours"])
    _batches(ctx, engines, ctx.case.nqs, nb=len(ctx.data.base), nlist=ctx.case.nlist, nprobe=ctx.case.nprobe)


def flat(ctx: Context) -> None:
    engines = ctx.make(FLAT)
    for engine in engines.values():
        engine.add(engine.convert(ctx.data.base))
    _batches(ctx, engines, ctx.case.flat_nqs, nb=len(ctx.data.base))


def _batches(ctx: Context, engines: Mapping[str, Variant], nqs: Iterable[int], **fields: Any) -> None:
    """Time every engine at every batch size, and check what it answers there."""
    rows = {name: engine.convert(ctx.data.queries) for name, engine in engines.items()}
    per_query = dict.fromkeys(engines, 0.0)  # seconds, from the last batch size an engine was timed at
    for nq in (nq for nq in nqs if nq <= len(ctx.data.queries)):
        ctx.note(f"nq {nq:,}")
        first: dict[str, tuple[int, Any]] = {}  # how far memory grew in the first call at this size, and its answer
        for name, expected in per_query.items():
            if expected * nq > ctx.effort.call_seconds:
                ctx.skip(name, f"one call would take about {expected * nq:.0f} s", nq=nq)
                continue
            try:
                rss.trim()
                first[name] = rss.growth(engines[name].search, rows[name][:nq], ctx.case.k)
            except (RuntimeError, MemoryError, ValueError) as error:
                ctx.skip(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", nq=nq)
        calls = {name: ctx.caller(engines[name], rows[name], nq) for name in first}
        timings = ctx.time(calls, nq, _check(ctx, engines, rows, nq, first), **fields)
        per_query = {name: timing["seconds"] / nq for name, timing in timings.items()}


def _check(ctx: Context, engines: Any, rows: Any, nq: int, first: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Recall, and agreement with faiss (or the first engine), of the first queries in batches of this very size."""
    checked, ids, facts = min(len(ctx.checked), max(nq, _CHECKED)), {}, {}
    reference = "faiss" if "faiss" in first else next(iter(first), None)
    for name in sorted(first, key=lambda name: name != reference):
        batches = (rows[name][start : start + nq] for start in range(nq, checked, nq))
        found = [first[name][1], *(engines[name].search(batch, ctx.case.k) for batch in batches)]
        ids[name] = np.concatenate([engines[name].ids(answer) for answer in found])[:checked]
        given = (ctx.data.base, ctx.checked[:checked], ids[name])
        share = answers.recall(*given, ctx.truth[:checked], ctx.case.metric)
        facts[name] = {"recall": share, "checked": checked, "peak_growth_bytes": first[name][0]}
        if name != reference:
            facts[name]["agreement"] = answers.agreement(*given, ids[reference], ctx.case.metric)
    return facts


def _floor(ctx: Context, engine: Variant) -> None:
    """GFLOP/s of plain products: the queries that probe a list, if all queries were one batch, with its rows."""
    ctx.note("floor")
    engine.index.search(engine.convert(ctx.checked), ctx.case.k, params=SearchParams(debug_stats=True))
    rows_read = float(engine.index.last_search_stats["rows_read"] / len(ctx.checked))
    nb, d = ctx.data.base.shape
    m, n = max(1, len(ctx.data.queries) * ctx.case.nprobe // ctx.case.nlist), max(1, nb // ctx.case.nlist)
    fast = {"avx512_bf16", "amx_bf16", "bf16"} & set(machine.simd())  # units that multiply bfloat16; the last is Arm's
    for dtype in (torch.float32, torch.bfloat16) if fast else (torch.float32,):
        queries, rows, scores = (torch.rand(*shape, dtype=dtype) for shape in ((m, d), (_LISTS, n, d), (m, n)))
        calls = {"": lambda i, q=queries, r=rows, out=scores: torch.mm(q, r[i % _LISTS].t(), out=out)}
        name, seconds = str(dtype).removeprefix("torch."), interleave(calls, ctx.effort)[""]["seconds"]
        ctx.line("floor", dtype=name, gflops=2 * m * n * d / seconds / 1e9, tile=(m, d, n), rows_read=rows_read)


def threads(ctx: Context) -> None:
    """Several threads searching one index at once: whether they get the answers of one thread, and at what speed."""
    # Each mode has an index of its own: a mode is set on the index, and here nothing else may change it.
    for name in (name for name in ctx.names if name in _THREADED):
        engine = ctx.build_paired(name)[name]
        ctx.note(f"{name}, {_THREADS} threads")
        with nullcontext() if engine.entry.kernel else native.disabled():  # for all threads together
            ctx.row(name, nprobe=ctx.case.nprobe, concurrent=_THREADS, **_concurrent(ctx, engine))


def _concurrent(ctx: Context, engine: Variant) -> dict[str, float]:
    cuts = takewhile(lambda end: end < len(ctx.checked), accumulate(cycle(_SIZES)))
    parts = [engine.convert(part) for part in np.split(ctx.checked, list(cuts))]
    engine.search(parts[0], ctx.case.k)

    def answer(order: Iterable[int]) -> np.ndarray:
        """The ids for all queries, their parts searched in the given order."""
        found = {i: engine.ids(engine.search(parts[i], ctx.case.k)) for i in order}
        return np.concatenate([found[i] for i in range(len(parts))])

    alone, single = timed(answer, range(len(parts)))
    # Every thread searches all the queries, each starting at another part.
    orders = [np.roll(np.arange(len(parts)), -i * len(parts) // _THREADS) for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        together, found = timed(lambda: list(pool.map(answer, orders)))
    agree = min(answers.agreement(ctx.data.base, ctx.checked, ids, single, ctx.case.metric) for ids in found)
    total = len(ctx.checked)
    return {"agreement": agree, "qps_alone": total / alone, "qps": _THREADS * total / together}
