"""Fitting centroids and adding rows: fresh indexes in turn, the same number of k-means rounds."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from ..context import Context
from ..engines import IVF, Entry, Spec
from ..measure import timed

__all__ = ["add", "train"]

_REPEATS = 5
_NITER = 10  # what both this library and faiss take unasked
_TRAINED = ("ours", "faiss", "torch-ivf")  # torch-similarity-search takes no number of rounds
_FILLED = (*_TRAINED, "torch-similarity-search")


def train(ctx: Context) -> None:
    """Seconds, and the objective the centroids reach on all training rows, over several seeds."""
    rows = ctx.train_rows
    names = [name for name in ctx.names if name in _TRAINED]
    # One unmeasured fit on few rows wakes threads and loads what is loaded on first use.
    for name in names:
        IVF[name].adapter(ctx.spec()).train(rows[: ctx.case.nlist * 39], niter=1)
    for repeat in range(_REPEATS):
        for name in names:
            ctx.note(f"{name}, {repeat + 1} of {_REPEATS}")
            seed = ctx.case.seed + repeat
            engine = IVF[name].adapter(ctx.spec(seed))
            seconds, _ = timed(partial(engine.train, rows, niter=_NITER))
            objective = _objective(rows, engine.centroids(), ctx.case.metric)
            ctx.row(name, seed=seed, rows=len(rows), niter=_NITER, seconds=seconds, objective=objective)


def add(ctx: Context) -> None:
    """Seconds to add the whole base to an empty index on given centroids, until a first query is answered."""
    names = [name for name in ctx.names if name in _FILLED]
    centroids = ctx.data.centroids
    if centroids is None:
        donor = IVF[names[0]].adapter(ctx.spec())
        donor.train(ctx.train_rows)
        centroids = np.array(donor.centroids())
    for repeat in range(_REPEATS):
        for name in names:
            ctx.note(f"{name}, {repeat + 1} of {_REPEATS}")
            seconds = _one_add(IVF[name], ctx.spec(), centroids, ctx.data.base, ctx.data.queries[:1])
            ctx.row(name, rows=len(ctx.data.base), seconds=seconds)


def _one_add(entry: Entry, spec: Spec, centroids: np.ndarray, base: np.ndarray, query: np.ndarray) -> float:
    engine = entry.adapter(spec)
    engine.use_centroids(centroids)
    engine.set(1)
    rows, first = engine.native(base), engine.native(query)

    def fill() -> None:
        engine.add(rows)
        engine.search(first, 1)  # an index that puts work off until it is read does that work here

    return timed(fill)[0]


def _objective(rows: np.ndarray, centroids: np.ndarray, metric: str) -> float:
    """Mean squared distance to the nearest centroid (l2), or mean product with the best one; in float64."""
    c = torch.from_numpy(np.ascontiguousarray(centroids)).double()
    total = 0.0
    for part in torch.from_numpy(rows).split(8_192):
        x = part.double()
        if metric == "l2":
            near = (c * c).sum(1) - 2 * (x @ c.T)
            total += float((near.amin(1) + (x * x).sum(1)).sum())
        else:
            total += float((x @ c.T).amax(1).sum())
    return total / len(rows)
