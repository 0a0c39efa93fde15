"""An index that changes: many small adds against one, adding and searching in turn, many small removals."""

import time
from typing import Any

import numpy as np

from ..context import Context
from ..engines import IVF, Engine
from .build import add_in_batches

_REPEATS = 3
_STRETCH = 100  # pairs an engine does before the next engine's stretch
_LIMIT = 120.0  # seconds an engine may spend on its pairs; fewer pairs are then reported, not guessed
_ENGINES = ("ours", "faiss")


def run(ctx: Context) -> None:
    names = [name for name in ctx.names if name in _ENGINES]
    centroids, total = ctx.given_centroids(names[0]), len(ctx.data.base)
    for repeat in range(_REPEATS):
        for name in names:
            for what, batch in (("one add", total), ("batches", ctx.case.batch)):
                ctx.note(f"{name}, {what}, {repeat + 1} of {_REPEATS}")
                seconds = add_in_batches(ctx, name, centroids, batch)
                ctx.row(name, what=what, rows=total, batch=batch, seconds=seconds)
    engines = {name: IVF[name].adapter(ctx.spec()) for name in names}
    for engine in engines.values():
        engine.use_centroids(centroids)
        engine.set(ctx.case.nprobe)
        engine.add(engine.convert(ctx.data.base))
        engine.search(engine.convert(ctx.data.queries[:1]), ctx.case.k)
    _alternate(ctx, engines)
    _remove(ctx, engines)


def _alternate(ctx: Context, engines: dict[str, Engine]) -> None:
    """add(1) and search(1) in turn on a full index; engines alternate in stretches, means over all pairs."""
    spent, done = dict.fromkeys(engines, 0.0), dict.fromkeys(engines, 0)
    rows = {name: (engine.convert(ctx.data.base), engine.convert(ctx.data.queries)) for name, engine in engines.items()}
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


def _remove(ctx: Context, engines: dict[str, Engine]) -> None:
    """Removing a few ids at a time from a full index, and one search at the end; each engine does all at once."""
    ids = np.random.default_rng(0).permutation(len(ctx.data.base))[: ctx.case.removes * ctx.case.removed]
    parts = np.array_split(ids.astype(np.int64), ctx.case.removes)
    for name, engine in engines.items():
        ctx.note(f"{name}, {len(parts):,} removals of {ctx.case.removed}")
        given, query = [engine.convert(part) for part in parts], engine.convert(ctx.data.queries[:1])
        start, done = time.perf_counter(), 0
        while done < len(given) and time.perf_counter() - start < _LIMIT:
            engine.remove(given[done])
            done += 1
        engine.search(query, ctx.case.k)  # postponed work belongs to the cost of removing
        total = time.perf_counter() - start
        ctx.row(name, what="removes", calls=done, ids=ctx.case.removed, seconds=total / done, total=total)
