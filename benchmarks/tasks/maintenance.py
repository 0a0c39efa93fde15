"""An index that changes: many small adds against one, adding and searching in turn, many small removals."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..context import Context
from ..engines import IVF, Engine
from ..measure import timed

__all__ = ["run"]

_REPEATS = 3
_STRETCH = 100  # pairs an engine does before the next engine's stretch
_LIMIT = 120.0  # seconds an engine may spend on its pairs; fewer pairs are then reported, not guessed
_ENGINES = ("ours", "faiss")


def run(ctx: Context) -> None:
    names = [name for name in ctx.names if name in _ENGINES]
    donor = IVF[names[0]].adapter(ctx.spec())
    donor.train(ctx.train_rows)
    centroids = np.array(donor.centroids())
    for repeat in range(_REPEATS):
        for name in names:
            for kind, batch in (("one add", len(ctx.data.base)), ("batches", ctx.case.batch)):
                ctx.note(f"{name}, {kind}, {repeat + 1} of {_REPEATS}")
                engine = _empty(ctx, name, centroids)
                seconds = _fill(engine, ctx.data.base, ctx.data.queries[:1], batch)
                ctx.row(name, what=kind, rows=len(ctx.data.base), batch=batch, seconds=seconds)
    engines = {name: _empty(ctx, name, centroids) for name in names}
    _turns(ctx, engines)
    _removals(ctx, engines)


def _empty(ctx: Context, name: str, centroids: np.ndarray) -> Engine:
    engine = IVF[name].adapter(ctx.spec())
    engine.use_centroids(centroids)
    engine.set(ctx.case.nprobe)
    return engine


def _fill(engine: Engine, base: np.ndarray, query: np.ndarray, batch: int) -> float:
    rows, first = engine.native(base), engine.native(query)
    parts = [rows[start : start + batch] for start in range(0, len(base), batch)]

    def fill() -> None:
        for part in parts:
            engine.add(part)
        engine.search(first, 1)  # whatever was put off until reading belongs to the cost of adding

    return timed(fill)[0]


def _turns(ctx: Context, engines: dict[str, Engine]) -> None:
    """add(1) and search(1) in turn on a full index; engines alternate in stretches, means over all pairs."""
    spent = dict.fromkeys(engines, 0.0)
    done = dict.fromkeys(engines, 0)
    rows: dict[str, tuple[Any, Any]] = {}
    for name, engine in engines.items():
        engine.add(engine.native(ctx.data.base))
        rows[name] = (engine.native(ctx.data.base), engine.native(ctx.data.queries))
        engine.search(rows[name][1][:1], ctx.case.k)
    for first in range(0, ctx.case.pairs, _STRETCH):
        ctx.note(f"pairs {first:,} of {ctx.case.pairs:,}")
        for name, engine in engines.items():
            if spent[name] < _LIMIT:
                count = min(_STRETCH, ctx.case.pairs - first)
                spent[name] += _pairs(engine, *rows[name], first, count, ctx.case.k)
                done[name] += count
    for name in engines:
        ctx.row(name, what="turns", pairs=done[name], seconds=spent[name] / done[name], total=spent[name])


def _pairs(engine: Engine, base: Any, queries: Any, first: int, count: int, k: int) -> float:
    start = time.perf_counter()
    for i in range(first, first + count):
        row, query = i % len(base), i % len(queries)
        engine.add(base[row : row + 1])
        engine.search(queries[query : query + 1], k)
    return time.perf_counter() - start


def _removals(ctx: Context, engines: dict[str, Engine]) -> None:
    """Removing a few ids at a time from a full index, and one search at the end; each engine does all in one go."""
    ids = np.random.default_rng(0).permutation(len(ctx.data.base))[: ctx.case.removes * ctx.case.removed]
    parts = np.array_split(ids.astype(np.int64), ctx.case.removes)
    for name, engine in engines.items():
        ctx.note(f"{name}, {len(parts):,} removals of {ctx.case.removed}")
        given, query = [engine.native(part) for part in parts], engine.native(ctx.data.queries[:1])
        start, done = time.perf_counter(), 0
        while done < len(given) and time.perf_counter() - start < _LIMIT:
            engine.remove(given[done])
            done += 1
        engine.search(query, ctx.case.k)  # whatever was put off until reading belongs to the cost of removing
        total = time.perf_counter() - start
        ctx.row(name, what="removes", calls=done, ids=ctx.case.removed, seconds=total / done, total=total)
