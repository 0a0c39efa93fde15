"""What SearchParams cost and buy, against the same search without them: budgets of rows, and selectors of ids."""

from __future__ import annotations

from typing import Any

import torch

from ..context import Context
from ..engines import IVF, Variant
from ..measure import Timing, interleave, rotation

__all__ = ["budgets", "filters"]

_LARGEST = 2  # batch sizes of the case that limits are tried on, from its largest down
_SHARES = (1.0, 0.5, 0.01, 0.0001)  # of the ids


def budgets(ctx: Context) -> None:
    """Recall and speed of each budget, with the lists in order, beside two other limits on the first of them."""
    from torch_ivf_module import SearchParams

    first = ctx.case.budgets[0]
    settings = {
        f"budget {rows:,}": SearchParams(candidate_budget=rows, use_per_list_sizes=True, debug_stats=True)
        for rows in ctx.case.budgets
    }
    settings[f"uniform {first:,}"] = SearchParams(candidate_budget=first, budget_strategy="uniform", debug_stats=True)
    settings[f"max_codes {first:,}"] = SearchParams(max_codes=first, debug_stats=True)
    _limits(ctx, settings, in_order=True)


def codes(ctx: Context) -> None:
    """Recall and speed of each `max_codes`, with the lists as they are."""
    from torch_ivf_module import SearchParams

    limits = {f"max_codes {rows:,}": SearchParams(max_codes=rows, debug_stats=True) for rows in ctx.case.codes}
    _limits(ctx, limits, in_order=False)


def _limits(ctx: Context, limits: dict[str, Any], in_order: bool) -> None:
    from torch_ivf_module import SearchParams

    settings = {"unlimited": SearchParams(debug_stats=True), **limits}
    for engine in ctx.build_paired(IVF, "ours").values():
        engine.set(ctx.case.nprobe)
        if in_order:
            engine.index.rebuild_lists()
        for nq in ctx.case.nqs[-_LARGEST:]:
            parts = rotation(engine.native(ctx.data.queries), nq)
            shares, read = _shares(engine.index, parts[0], settings, ctx.case.k)
            for name, timing in _times(ctx, engine, parts, settings).items():
                figures = {"recall": shares[name], "rows_read": read[name], "qps": nq / timing.seconds}
                ctx.row(name, nq=nq, k=ctx.case.k, nprobe=ctx.case.nprobe, **figures, **timing.fields())


def filters(ctx: Context) -> None:
    """Speed of a search among a share of the ids, given as ids and as a mask."""
    from torch_ivf_module import SearchParams

    for engine in ctx.build_paired(IVF, "ours").values():
        engine.set(ctx.case.nprobe)
        total = engine.index.ntotal
        order = torch.randperm(total, generator=torch.Generator().manual_seed(ctx.case.seed))
        settings = {"no selector": SearchParams()}
        for share in _SHARES:
            chosen = order[: max(1, round(share * total))]
            mask = torch.zeros(total, dtype=torch.bool).index_fill_(0, chosen, True)
            settings[f"{share:.2%} as ids"] = SearchParams(selector=chosen)
            settings[f"{share:.2%} as a mask"] = SearchParams(selector=mask)
        for nq in ctx.case.nqs:
            parts = rotation(engine.native(ctx.data.queries), nq)
            for name, timing in _times(ctx, engine, parts, settings).items():
                ctx.row(name, nq=nq, k=ctx.case.k, qps=nq / timing.seconds, **timing.fields())


def _times(ctx: Context, engine: Variant, parts: list[Any], settings: dict[str, Any]) -> dict[str, Timing]:
    def caller(params: Any) -> Any:
        return lambda i: engine.index.search(parts[i % len(parts)], ctx.case.k, params=params)

    return interleave({name: caller(params) for name, params in settings.items()}, ctx.effort)


def _shares(index: Any, queries: Any, settings: dict[str, Any], k: int) -> tuple[dict[str, float], dict[str, float]]:
    """Recall against the first of `settings`, and rows read a query."""
    shares, read, truth = {}, {}, None
    for name, params in settings.items():
        found = index.search(queries, k, params=params)[1]
        truth = found if truth is None else truth
        hits = sum(float((found[:, [j]] == truth).any(1).double().sum()) for j in range(k))
        shares[name] = hits / max(1, int((truth >= 0).sum()))
        read[name] = index.last_search_stats["rows_read"] / len(queries)
    return shares, read
