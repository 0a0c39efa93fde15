"""How long the lists are that this library's training gives; a fact of the data, not of the machine."""

from __future__ import annotations

from ..context import Context
from ..engines import IVF

__all__ = ["run"]


def run(ctx: Context) -> None:
    for name, engine in ctx.build_paired(IVF, "ours").items():
        ctx.row(name, sizes=engine.index.list_sizes().tolist(), imbalance=engine.index.imbalance_factor())
