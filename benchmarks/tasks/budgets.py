"""What a budget of rows costs in recall and buys in speed, against the same search without one; lists in order."""

from __future__ import annotations

from typing import Any

from ..context import Context
from ..engines import IVF
from ..measure import interleave, rotation

__all__ = ["BUDGETS", "run"]

BUDGETS = (16_384, 32_768, 65_536, 131_072)
_LARGEST = 2  # batch sizes of the case, from its largest down


def run(ctx: Context) -> None:
    from torch_ivf_module import SearchParams

    engines = ctx.build_paired(IVF, "ours")
    if not engines:
        return
    engine = engines["ours"]
    engine.set(ctx.case.nprobe)
    index, k = engine.index, ctx.case.k
    index.rebuild_lists()
    settings = {"unlimited": SearchParams(debug_stats=True)} | {
        f"budget {rows:,}": SearchParams(
            profile="approx", candidate_budget=rows, use_per_list_sizes=True, debug_stats=True
        )
        for rows in BUDGETS
    }
    for nq in ctx.case.nqs[-_LARGEST:]:
        parts = rotation(engine.native(ctx.data.queries), nq)
        shares, read = _shares(index, parts[0], settings, k)
        calls = {
            name: lambda i, parts=parts, params=params: index.search(parts[i % len(parts)], k, params=params)
            for name, params in settings.items()
        }
        for name, timing in interleave(calls, ctx.effort).items():
            figures = {"recall": shares[name], "rows_read": read[name], "qps": nq / timing.seconds}
            ctx.row(name, nq=nq, k=k, nprobe=ctx.case.nprobe, **figures, **timing.fields())


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
