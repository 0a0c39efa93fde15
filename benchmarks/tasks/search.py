"""Searching in growing batches: the same lists for every list-based engine, or exhaustively; and the list sizes.

With the lists comes the floor: the time of the matrix products alone on this machine.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from torch_ivf_module import SearchParams

from .. import answers, device, rss
from ..context import Context
from ..engines import FLAT, Variant
from ..measure import interleave

_CHECKED = 256  # at least so many queries are checked at every batch size
_LISTS = 8  # lists that the floor's products alternate between, so that a list is not always in the cache


def lists(ctx: Context) -> None:
    """The list sizes that this library's training gives; a property of the data, not of the machine."""
    for name, engine in ctx.build_paired("ours").items():
        ctx.row(name, sizes=engine.index.list_sizes().tolist(), imbalance=engine.index.imbalance_factor())


def search(ctx: Context) -> None:
    engines = ctx.build_paired()
    fields: dict[str, Any] = {"nb": len(ctx.data.base), "nlist": ctx.case.nlist, "nprobe": ctx.case.nprobe}
    if "ours" in engines:
        fields["floor"] = _floor(ctx, engines["ours"])
    _batches(ctx, engines, ctx.case.nqs, **fields)


def _coded(ctx: Context, engine: Variant) -> dict[str, float]:
    """The memory of 8-bit codes beside that of the rows, and how many rows a query scores exactly in spite of them."""
    store = getattr(engine.index, "store", None)
    if store is None or not store.codes.bytes or not engine.entry.kernel:
        return {}
    engine.index.search(engine.convert(ctx.checked), ctx.case.k, params=SearchParams(debug_stats=True))
    scored = engine.index.last_search_stats["rows_scored"] / len(ctx.checked)
    return {"codes_bytes": store.codes.bytes, "raw_bytes": ctx.data.base.nbytes, "rows_scored": scored}


def flat(ctx: Context) -> None:
    engines = ctx.make(FLAT)
    for engine in engines.values():
        engine.add(engine.convert(ctx.data.base))
        engine.warm(engine.convert(ctx.data.queries[:64]))
    _batches(ctx, engines, ctx.case.flat_nqs, nb=len(ctx.data.base))


def _batches(ctx: Context, engines: Mapping[str, Variant], nqs: Iterable[int], **fields: Any) -> None:
    """Time every engine at every batch size, and check what it answers there."""
    rows = {name: engine.convert(ctx.data.queries) for name, engine in engines.items()}
    coded = {name: _coded(ctx, engine) for name, engine in engines.items()}
    per_query = dict.fromkeys(engines, 0.0)  # seconds, from the last batch size an engine was timed at
    for nq in (nq for nq in nqs if nq <= len(ctx.data.queries)):
        ctx.note(f"nq {nq:,}")
        first: dict[str, tuple[int, Any]] = {}  # how far memory grew in the first call at this size, and its answer
        for name, expected in per_query.items():
            if expected * nq > ctx.effort.call_seconds:
                ctx.skip(name, f"one call would take about {expected * nq:.0f} s", nq=nq)
                continue
            rss.trim()
            answer = ctx.attempt(name, rss.growth, engines[name].search, rows[name][:nq], ctx.case.k, nq=nq)
            if answer is not None:
                first[name] = answer
        calls = {name: ctx.caller(engines[name], rows[name], nq) for name in first}
        facts = {name: {**coded[name], **found} for name, found in _check(ctx, engines, rows, nq, first).items()}
        timings = ctx.time(calls, nq, facts, **fields)
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


def _floor(ctx: Context, engine: Variant) -> float:
    """Queries/s of this machine, if a search were nothing but plain products in float32: the queries that probe a list,
    if all queries were one batch, with its rows."""
    ctx.note("floor")
    engine.index.search(engine.convert(ctx.checked), ctx.case.k, params=SearchParams(debug_stats=True))
    rows_read = float(engine.index.last_search_stats["rows_read"] / len(ctx.checked))
    nb, d = ctx.data.base.shape
    m, n = max(1, len(ctx.data.queries) * ctx.case.nprobe // ctx.case.nlist), max(1, nb // ctx.case.nlist)
    queries, rows, out = (torch.rand(*shape, device=device.name) for shape in ((m, d), (_LISTS, n, d), (m, n)))
    calls = {"": lambda i: torch.mm(queries, rows[i % _LISTS].t(), out=out)}
    return m * n / interleave(calls, ctx.effort)[""]["seconds"] / rows_read
