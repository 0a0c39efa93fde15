"""Training, adding, and an index that changes: many small adds, adding and searching in turn, many small removals."""

import time

import numpy as np
import torch

from .. import device
from ..context import Context
from ..engines import IVF, Engine
from ..measure import timed

_REPEATS, _ROUNDS = 5, 3  # of training and adding, of maintenance
_STRETCH = 100  # pairs an engine does before the next engine's stretch
_LIMIT = 120.0  # seconds an engine may spend on its pairs; fewer pairs are then reported, not guessed
_CHANGING = ("ours", "faiss")
_NITER = 10  # the default of both this library and faiss
_ENGINES = ("ours", "faiss", "torch-ivf")


def train(ctx: Context) -> None:
    """Seconds, and the objective the centroids reach on all training rows, over several seeds."""
    rows, names = ctx.train_rows, [name for name in ctx.names if name in _ENGINES]
    for name in names:  # not measured: wakes the threads and loads what is loaded on first use
        IVF[name].adapter(ctx.spec()).train(rows[: ctx.case.nlist * 39], niter=1)
    for seed in range(ctx.case.seed, ctx.case.seed + _REPEATS):
        for name in names:
            ctx.note(f"{name}, seed {seed}")
            engine = IVF[name].adapter(ctx.spec(seed))
            seconds, _ = timed(engine.train, rows, _NITER)
            objective = _objective(rows, engine.centroids(), ctx.case.metric)
            ctx.row(name, seed=seed, rows=len(rows), niter=_NITER, seconds=seconds, objective=objective)


def add(ctx: Context) -> None:
    """Seconds to add the whole base to an empty index on given centroids, until a first query is answered."""
    names = [name for name in ctx.names if name in _ENGINES]
    centroids = _centroids(ctx, names[0])
    for repeat in range(_REPEATS):
        for name in names:
            ctx.note(f"{name}, {repeat + 1} of {_REPEATS}")
            seconds = add_in_batches(ctx, name, centroids, len(ctx.data.base))
            ctx.row(name, rows=len(ctx.data.base), seconds=seconds)
    for engine in ctx.build_paired("ours").values():
        query = engine.convert(ctx.data.queries[:1])
        for _ in range(_REPEATS):
            engine.index.codes = None  # frees those there are
            engine.index.codes = 8
            seconds, _ = timed(engine.search, query, 1)  # makes them, and searches
            if engine.index.store.codes.bytes:
                ctx.row("ours, its 8-bit codes", rows=len(ctx.data.base), seconds=seconds)


def _centroids(ctx: Context, name: str) -> np.ndarray:
    """The centroids that all engines are to use: those of the engine `name`."""
    engine = IVF[name].adapter(ctx.spec())
    engine.train(ctx.train_rows)
    return np.array(engine.centroids())


def add_in_batches(ctx: Context, name: str, centroids: np.ndarray, batch: int) -> float:
    """Seconds to add the base to an empty index in batches of so many rows, until a first query is answered."""
    engine = IVF[name].adapter(ctx.spec())
    engine.use_centroids(centroids)
    engine.set(1)
    rows, query = engine.convert(ctx.data.base), engine.convert(ctx.data.queries[:1])
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    start = time.perf_counter()
    for part in parts:
        engine.add(part)
    engine.search(query, 1)  # an index that postpones work until it is searched does that work here
    device.finish()
    return time.perf_counter() - start


def maintenance(ctx: Context) -> None:
    names = [name for name in ctx.names if name in _CHANGING]
    centroids, total = _centroids(ctx, names[0]), len(ctx.data.base)
    for repeat in range(_ROUNDS):
        for name in names:
            for what, batch in (("one add", total), ("batches", ctx.case.batch)):
                ctx.note(f"{name}, {what}, {repeat + 1} of {_ROUNDS}")
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
                numbers = range(first, min(first + _STRETCH, ctx.case.pairs))
                (base, queries), start = rows[name], time.perf_counter()
                for row, query in ((i % len(base), i % len(queries)) for i in numbers):
                    engine.add(base[row : row + 1])
                    engine.search(queries[query : query + 1], ctx.case.k)
                    device.finish()
                spent[name], done[name] = spent[name] + time.perf_counter() - start, done[name] + len(numbers)
    for name in engines:
        ctx.row(name, what="turns", pairs=done[name], seconds=spent[name] / done[name], total=spent[name])


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
        device.finish()
        total = time.perf_counter() - start
        ctx.row(name, what="removes", calls=done, ids=ctx.case.removed, seconds=total / done, total=total)


def _objective(rows: np.ndarray, centroids: np.ndarray, metric: str) -> float:
    """Mean squared distance to the nearest centroid (l2), or mean product with the best one; in float64."""
    c = torch.from_numpy(np.ascontiguousarray(centroids)).double()
    parts = (part.double() for part in torch.from_numpy(rows).split(8_192))
    best = [torch.cdist(x, c).amin(1).square() if metric == "l2" else (x @ c.T).amax(1) for x in parts]
    return float(torch.cat(best).mean())
