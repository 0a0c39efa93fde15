"""Several threads searching one index at once: whether they get the answers of one thread, and at what speed."""

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, cycle, takewhile
from typing import Any

import numpy as np

from .. import answers
from ..context import Context
from ..engines import Variant
from ..measure import timed

_THREADS = 4
_SIZES = (1, 8, 64, 512)  # batch sizes are mixed, so that different scans run at the same time
_ENGINES = ("ours", "ours-csr", "ours-matrix", "faiss")
_SLOWEST = 120.0  # seconds one thread alone may take


def run(ctx: Context) -> None:
    # Each mode has an index of its own: a mode is set on the index, and here nothing else may change it.
    for name in (name for name in ctx.names if name in _ENGINES):
        engine = ctx.build_paired(name)[name]
        ctx.note(f"{name}, {_THREADS} threads")
        with engine.without_kernel():
            _compare(ctx, name, engine)


def _compare(ctx: Context, name: str, engine: Variant) -> None:
    cuts = takewhile(lambda end: end < len(ctx.checked), accumulate(cycle(_SIZES)))
    parts = [engine.convert(part) for part in np.split(ctx.checked, list(cuts))]
    engine.search(parts[0], ctx.case.k)

    def search(order: Any) -> np.ndarray:
        """The ids for all queries, their parts searched in the given order."""
        found = {i: engine.ids(engine.search(parts[i], ctx.case.k)) for i in order}
        return np.concatenate([found[i] for i in range(len(parts))])

    alone, single = timed(lambda: search(range(len(parts))))
    if alone > _SLOWEST:
        ctx.skip(name, f"one pass takes {alone:.0f} s")
        return
    # Every thread searches all the queries, each starting at another part.
    orders = [np.roll(np.arange(len(parts)), -i * len(parts) // _THREADS) for i in range(_THREADS)]
    with ThreadPoolExecutor(_THREADS) as pool:
        together, found = timed(lambda: list(pool.map(search, orders)))
    agree = min(answers.agreement(ctx.data.base, ctx.checked, ids, single, ctx.case.metric) for ids in found)
    total = len(ctx.checked)
    speeds = {"qps_alone": total / alone, "qps": _THREADS * total / together}
    ctx.row(name, nprobe=ctx.case.nprobe, concurrent=_THREADS, agreement=agree, **speeds)
