"""The time of mode `auto` and of the two fixed modes, over batch sizes and numbers of lists probed.

With a native kernel `auto` uses it; without one a cost model chooses one of the two modes.
"""

from functools import partial

from ..context import Context
from ..measure import timed

FIXED = ("ours-csr", "ours-matrix")
HOPELESS = 8.0  # a mode this many times slower than the other one is not timed any further


def run(ctx: Context) -> None:
    engines = ctx.build_paired("ours", *FIXED)
    if "ours" not in engines or len(engines) == 1:
        return
    sizes = engines["ours"].index.list_sizes().double()
    # Rows in the list of an average row, over rows in an average list: 1 for even lists.
    unevenness = float(sizes.square().mean() / sizes.mean().square())
    rows = engines["ours"].convert(ctx.data.queries)
    for nprobe in ctx.case.auto_nprobes:
        running = dict(engines)
        for engine in engines.values():
            engine.set(nprobe)
        for nq in ctx.case.auto_nqs:
            ctx.note(f"nprobe {nprobe}, nq {nq:,}")
            where = {"nprobe": nprobe, "unevenness": unevenness}
            calls = {name: ctx.caller(engine, rows, nq) for name, engine in running.items()}
            once = {name: min(timed(partial(calls[name], i))[0] for i in (0, -1)) for name in FIXED if name in calls}
            for name, seconds in once.items():
                if seconds > HOPELESS * min(once.values()):
                    reason = f"{seconds / min(once.values()):.0f} times slower than the other mode"
                    ctx.skip(name, reason, nq=nq, **where)
                    del calls[name]
                    if name == "ours-matrix":  # larger batches only make it worse
                        del running[name]
            ctx.time(calls, nq, **where)
