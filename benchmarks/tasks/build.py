"""Training centroids and adding rows: new indexes in turn, the same number of k-means iterations."""

from functools import partial

import numpy as np
import torch

from ..context import Context
from ..engines import IVF
from ..measure import timed

_REPEATS = 5
_NITER = 10  # the default of both this library and faiss
_TRAINED = ("ours", "faiss", "torch-ivf")  # torch-similarity-search has a fixed number of iterations
_FILLED = (*_TRAINED, "torch-similarity-search")


def train(ctx: Context) -> None:
    """Seconds, and the objective the centroids reach on all training rows, over several seeds."""
    rows = ctx.train_rows
    names = [name for name in ctx.names if name in _TRAINED]
    for name in names:  # not measured: wakes the threads and loads what is loaded on first use
        IVF[name].adapter(ctx.spec()).train(rows[: ctx.case.nlist * 39], niter=1)
    for seed in range(ctx.case.seed, ctx.case.seed + _REPEATS):
        for name in names:
            ctx.note(f"{name}, seed {seed}")
            engine = IVF[name].adapter(ctx.spec(seed))
            seconds, _ = timed(partial(engine.train, rows, niter=_NITER))
            objective = _objective(rows, engine.centroids(), ctx.case.metric)
            ctx.row(name, seed=seed, rows=len(rows), niter=_NITER, seconds=seconds, objective=objective)


def add(ctx: Context) -> None:
    """Seconds to add the whole base to an empty index on given centroids, until a first query is answered."""
    names = [name for name in ctx.names if name in _FILLED]
    centroids = ctx.given_centroids(names[0])
    for repeat in range(_REPEATS):
        for name in names:
            ctx.note(f"{name}, {repeat + 1} of {_REPEATS}")
            seconds = add_in_batches(ctx, name, centroids, len(ctx.data.base))
            ctx.row(name, rows=len(ctx.data.base), seconds=seconds)


def add_in_batches(ctx: Context, name: str, centroids: np.ndarray, batch: int) -> float:
    """Seconds to add the base to an empty index in batches of so many rows, until a first query is answered."""
    engine = IVF[name].adapter(ctx.spec())
    engine.use_centroids(centroids)
    engine.set(1)
    rows, query = engine.convert(ctx.data.base), engine.convert(ctx.data.queries[:1])
    parts = [rows[start : start + batch] for start in range(0, len(rows), batch)]

    def fill() -> None:
        for part in parts:
            engine.add(part)
        engine.search(query, 1)  # an index that postpones work until it is searched does that work here

    return timed(fill)[0]


def _objective(rows: np.ndarray, centroids: np.ndarray, metric: str) -> float:
    """Mean squared distance to the nearest centroid (l2), or mean product with the best one; in float64."""
    c = torch.from_numpy(np.ascontiguousarray(centroids)).double()
    total = 0.0
    for part in torch.from_numpy(rows).split(8_192):
        x = part.double()
        best = torch.cdist(x, c).amin(1).square() if metric == "l2" else (x @ c.T).amax(1)
        total += float(best.sum())
    return total / len(rows)
