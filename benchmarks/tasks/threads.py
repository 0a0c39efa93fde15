"""Several threads searching one index at once: the same answers as one thread, and at what speed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .. import answers
from ..context import Context
from ..engines import IVF, Variant
from ..measure import timed

__all__ = ["run"]

_THREADS = 4
_SIZES = (1, 8, 64, 512)  # batch sizes are mixed, so that different scans run side by side
_ENGINES = ("ours", "ours-csr", "ours-matrix", "ours-native", "faiss")
_SLOWEST = 120.0  # seconds one thread alone may take


def run(ctx: Context) -> None:
    # Each mode has an index of its own: a mode is set on the index, and here nothing else may touch it.
    for name in (name for name in ctx.names if name in _ENGINES):
        engine = ctx.build_paired(IVF, name)[name]
        engine.set(ctx.case.nprobe)
        ctx.note(f"{name}, {_THREADS} threads")
        _compare(ctx, name, engine)


def _compare(ctx: Context, name: str, engine: Variant) -> None:
    queries = ctx.checked
    parts = [engine.native(part) for part in _mixed(queries)]
    engine.search(parts[0], ctx.case.k)

    def answer(part: Any) -> np.ndarray:
        return engine.ids(engine.search(part, ctx.case.k))

    alone, expected = timed(lambda: [answer(part) for part in parts])
    if alone > _SLOWEST:
        ctx.skip(name, f"one pass takes {alone:.0f} s")
        return
    # Every thread goes through all the queries, each starting somewhere else.
    orders = [np.roll(np.arange(len(parts)), -i * len(parts) // _THREADS) for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        together, found = timed(
            lambda: list(pool.map(lambda order: {i: answer(parts[i]) for i in order}, orders))
        )
    single = np.concatenate(expected)
    agree = [
        answers.agreement(
            ctx.data.base, queries, np.concatenate([f[i] for i in range(len(parts))]), single, ctx.case.metric
        )
        for f in found
    ]
    ctx.row(
        name,
        nprobe=ctx.case.nprobe,
        concurrent=_THREADS,
        agreement=min(agree),
        qps_alone=len(queries) / alone,
        qps=_THREADS * len(queries) / together,
    )


def _mixed(queries: np.ndarray) -> list[np.ndarray]:
    """All the queries once, cut into pieces of mixed sizes."""
    parts, start, turn = [], 0, 0
    while start < len(queries):
        size = _SIZES[turn % len(_SIZES)]
        parts.append(queries[start : start + size])
        start, turn = start + size, turn + 1
    return parts
