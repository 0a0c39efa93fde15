"""Settings of this library against others: search modes, budgets of rows, selectors of ids."""

from typing import Any

import torch

from torch_ivf_module import SearchParams
from torch_ivf_module.tune import recall

from ..context import Context
from ..engines import Variant
from ..measure import rotation, timed

FIXED = ("ours-csr", "ours-matrix")
HOPELESS = 8.0  # a mode this many times slower than the other one is not timed any further
_LARGEST = 2  # batch sizes of the case that limits are measured at, from its largest down


def budgets(ctx: Context) -> None:
    """Each budget, with sorted lists, and two other limits of the first budget's size."""
    first = ctx.case.budgets[0]
    limits = {f"budget {n:,}": {"candidate_budget": n, "use_per_list_sizes": True} for n in ctx.case.budgets}
    limits[f"uniform {first:,}"] = {"candidate_budget": first, "budget_strategy": "uniform"}
    _limits(ctx, {**limits, f"max_codes {first:,}": {"max_codes": first}}, sort=True)


def codes(ctx: Context) -> None:
    _limits(ctx, {f"max_codes {rows:,}": {"max_codes": rows} for rows in ctx.case.codes}, sort=False)


def _limits(ctx: Context, limits: dict[str, dict[str, Any]], sort: bool) -> None:
    settings = {name: SearchParams(debug_stats=True, **limit) for name, limit in {"unlimited": {}, **limits}.items()}
    for engine in ctx.build_paired("ours").values():
        if sort:
            engine.index.rebuild_lists()
            engine.warm(engine.convert(ctx.checked[:64]))  # codes are dropped with the old order
        for nq in ctx.case.nqs[-_LARGEST:]:
            facts, truth = {}, None
            for name, params in settings.items():
                found = engine.index.search(engine.convert(ctx.data.queries[:nq]), ctx.case.k, params=params)[1]
                truth = found if truth is None else truth
                read = engine.index.last_search_stats["rows_read"] / nq
                facts[name] = {"recall": recall(found, truth), "rows_read": read}
            _time(ctx, engine, nq, settings, facts)


def filters(ctx: Context) -> None:
    """Speed of a search among a share of the ids, given as ids and as a mask."""
    for engine in ctx.build_paired("ours").values():
        total = engine.index.ntotal
        order = torch.randperm(total, generator=torch.Generator().manual_seed(ctx.case.seed))
        settings = {"no selector": SearchParams()}
        for share in (1.0, 0.5, 0.01, 0.0001):
            chosen = order[: max(1, round(share * total))].to(engine.index.device)
            mask = torch.zeros(total, dtype=torch.bool, device=chosen.device).index_fill_(0, chosen, True)
            settings[f"{share:.2%} as ids"] = SearchParams(selector=chosen)
            settings[f"{share:.2%} as a mask"] = SearchParams(selector=mask)
        for nq in ctx.case.nqs:
            _time(ctx, engine, nq, settings, {})


def _time(ctx: Context, engine: Variant, nq: int, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    parts, search, k = rotation(engine.convert(ctx.data.queries), nq), engine.index.search, ctx.case.k
    calls = {name: lambda i, p=params: search(parts[i % len(parts)], k, params=p) for name, params in settings.items()}
    ctx.time(calls, nq, facts=facts, nprobe=ctx.case.nprobe)


def auto(ctx: Context) -> None:
    """The time of `auto` and of the two fixed modes. With a native kernel `auto` uses it, else a cost model chooses."""
    engines = ctx.build_paired("ours", *FIXED)
    if "ours" not in engines or len(engines) == 1:
        return
    unevenness, rows = engines["ours"].index.imbalance_factor(), engines["ours"].convert(ctx.data.queries)
    for nprobe in ctx.case.auto_nprobes:
        running = dict(engines)
        for engine in engines.values():
            engine.set(nprobe)
        for nq in ctx.case.auto_nqs:
            ctx.note(f"nprobe {nprobe}, nq {nq:,}")
            where = {"nprobe": nprobe, "unevenness": unevenness}
            calls = {name: ctx.caller(engine, rows, nq) for name, engine in running.items()}
            once = {name: min(timed(calls[name], i)[0] for i in (0, -1)) for name in FIXED if name in calls}
            for name, seconds in once.items():
                if seconds > HOPELESS * min(once.values()):
                    reason = f"{seconds / min(once.values()):.0f} times slower than the other mode"
                    ctx.skip(name, reason, nq=nq, **where)
                    del calls[name]
                    if name == "ours-matrix":  # larger batches only make it worse
                        del running[name]
            ctx.time(calls, nq, **where)
