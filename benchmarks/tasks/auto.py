"""What `auto` costs beside the better fixed mode, over batch sizes and numbers of lists visited."""

from __future__ import annotations

import math
from functools import partial

from ..context import Context
from ..engines import IVF, Variant
from ..measure import interleave, rotation, timed

__all__ = ["HOPELESS", "run"]

_AUTO = "ours"
_COMPARED = ("ours-csr", "ours-matrix")  # what the cost model chooses between
_FIXED = (*_COMPARED, "ours-native")
HOPELESS = 8.0  # a mode this many times slower than the other one is the worse of the two: not repeated


def run(ctx: Context) -> None:
    engines = ctx.build_paired(IVF, _AUTO, *_FIXED)
    if _AUTO not in engines or not any(name in engines for name in _FIXED):
        return
    lengths = engines[_AUTO].index.list_offsets.diff().double()
    # Rows in the list of an average row, over rows in an average list: 1 for even lists.
    unevenness = float(lengths.square().mean() / lengths.mean().square())
    for nprobe in ctx.case.auto_nprobes:
        running = dict(engines)
        for engine in engines.values():
            engine.set(nprobe)
        for nq in ctx.case.auto_nqs:
            ctx.note(f"nprobe {nprobe}, nq {nq:,}")
            _cell(ctx, running, nq, nprobe, unevenness)


def _cell(ctx: Context, running: dict[str, Variant], nq: int, nprobe: int, unevenness: float) -> None:
    """One point of the sweep. The query-major mode, once hopeless, leaves `running` for larger batches."""
    engines = dict(running)
    parts = rotation(engines[_AUTO].native(ctx.data.queries), nq)
    once = {}
    for name, engine in running.items():
        engine.search(parts[0], ctx.case.k)
        once[name] = timed(partial(engine.search, parts[-1], ctx.case.k))[0]
    fastest = min(once.get(name, math.inf) for name in _COMPARED)
    where = {"nq": nq, "nprobe": nprobe, "unevenness": unevenness}
    for name in (name for name in _COMPARED if once.get(name, 0) > HOPELESS * fastest):
        ctx.skip(name, f"{once[name] / fastest:.0f} times slower than the other mode", **where)
        del engines[name]
        if name == "ours-matrix":
            del running[name]
    calls = {
        name: lambda i, engine=engine: engine.search(parts[i % len(parts)], ctx.case.k)
        for name, engine in engines.items()
    }
    for name, timing in interleave(calls, ctx.effort).items():
        ctx.row(name, **where, k=ctx.case.k, qps=nq / timing.seconds, **timing.fields())
