"""Scratch memory of one search, and what an index weighs: each figure in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..context import Context

__all__ = ["run"]

_ENGINES = ("ours", "ours-csr", "ours-matrix", "ours-native", "faiss")
_ROOT = Path(__file__).resolve().parents[2]
_MATRIX_LIMIT = (
    100_000_000  # (query, row) pairs on average; beyond it the query-major mode would take minutes
)
_TIMEOUT = 300.0  # seconds


def run(ctx: Context) -> None:
    nlist, nprobe = ctx.case.nlist, ctx.case.nprobe
    total = ctx.data.queries.shape[0]
    # One query, a large batch, all the queries there are, and every list visited.
    shapes = [(1, nprobe), (min(2_048, total), nprobe), (total, nprobe), (min(512, total), nlist)]
    for name in (name for name in ctx.names if name in _ENGINES):
        for nq, visited in dict.fromkeys(shapes):
            if name == "ours-matrix" and nq * len(ctx.data.base) * visited / nlist > _MATRIX_LIMIT:
                ctx.skip(
                    name, "query-major search of so many candidates would take minutes", nq=nq, nprobe=visited
                )
                continue
            ctx.note(f"{name}, nq {nq:,}, nprobe {visited}")
            _measure(ctx, name, nq, visited)


def _measure(ctx: Context, name: str, nq: int, nprobe: int) -> None:
    job = {"case": ctx.case.name, "engine": name, "nq": nq, "nprobe": nprobe, "threads": ctx.threads}
    command = [sys.executable, "-m", "benchmarks.scratch", json.dumps(job)]
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        ctx.skip(name, f"not done after {_TIMEOUT:.0f} s", nq=nq, nprobe=nprobe)
        return
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        ctx.skip(name, reason[:200], nq=nq, nprobe=nprobe)
        return
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    ctx.row(name, nq=nq, nprobe=nprobe, k=ctx.case.k, **facts)
