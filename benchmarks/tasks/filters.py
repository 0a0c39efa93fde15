"""What a search among some of the ids costs, beside one among all."""

from __future__ import annotations

import torch

from ..context import Context
from ..engines import IVF
from ..measure import interleave, rotation

__all__ = ["SHARES", "run"]

SHARES = (1.0, 0.5, 0.01, 0.0001)


def run(ctx: Context) -> None:
    from torch_ivf_module import SearchParams

    engines = ctx.build_paired(IVF, "ours")
    if not engines:
        return
    engine = engines["ours"]
    engine.set(ctx.case.nprobe)
    index, k = engine.index, ctx.case.k
    order = torch.randperm(index.ntotal, generator=torch.Generator().manual_seed(ctx.case.seed))
    settings = {"no selector": SearchParams()}
    for share in SHARES:
        chosen = order[: max(1, round(share * index.ntotal))]
        mask = torch.zeros(index.ntotal, dtype=torch.bool).index_fill_(0, chosen, True)
        settings[f"{share:.2%} as ids"] = SearchParams(selector=chosen)
        settings[f"{share:.2%} as a mask"] = SearchParams(selector=mask)
    for nq in ctx.case.nqs:
        parts = rotation(engine.native(ctx.data.queries), nq)
        calls = {
            name: lambda i, parts=parts, params=params: index.search(parts[i % len(parts)], k, params=params)
            for name, params in settings.items()
        }
        for name, timing in interleave(calls, ctx.effort).items():
            ctx.row(name, nq=nq, k=k, qps=nq / timing.seconds, **timing.fields())
