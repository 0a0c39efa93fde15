"""Searching in growing batches: shared by the paired search and the exhaustive one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from .. import answers, rss
from ..context import Context
from ..engines import Variant
from ..measure import Timing, interleave, rotation

__all__ = ["climb"]

_CHECKED = 256  # at least so many queries are checked at every batch size


def climb(ctx: Context, engines: Mapping[str, Variant], nqs: Iterable[int], **fields: Any) -> None:
    """Time every engine at every batch size, and check what it answers there."""
    native = {name: engine.native(ctx.data.queries) for name, engine in engines.items()}
    per_query = dict.fromkeys(engines, 0.0)  # seconds, from the last batch size an engine was timed at
    for nq in (nq for nq in nqs if nq <= ctx.data.queries.shape[0]):
        ctx.note(f"nq {nq:,}")
        running = {name: engine for name, engine in engines.items() if name in per_query}
        for name in [name for name in running if per_query[name] * nq > ctx.effort.call_seconds]:
            ctx.skip(name, f"one call would take about {per_query[name] * nq:.0f} s", nq=nq)
            del running[name]
        first = {name: _first_call(ctx, name, engine, native[name], nq) for name, engine in running.items()}
        running = {name: engine for name, engine in running.items() if first[name] is not None}
        timings = _times(ctx, running, native, nq)
        facts = _check(ctx, running, native, nq, first)
        for name, timing in timings.items():
            per_query[name] = timing.seconds / nq
            speed = {"nq": nq, "k": ctx.case.k, "qps": nq / timing.seconds, **timing.fields()}
            ctx.row(name, **fields, **speed, **facts[name])
        for name in set(engines) - set(running):
            per_query.pop(name, None)


def _first_call(ctx: Context, name: str, engine: Variant, native: Any, nq: int) -> tuple[int, Any] | None:
    """How far memory grew in the first call at this batch size, and its answer; None if the engine failed."""
    try:
        rss.trim()
        return rss.growth(lambda: engine.search(native[:nq], ctx.case.k))
    except (RuntimeError, MemoryError, ValueError) as error:
        ctx.skip(name, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", nq=nq)
        return None


def _times(
    ctx: Context, running: Mapping[str, Variant], native: Mapping[str, Any], nq: int
) -> dict[str, Timing]:
    def caller(name: str) -> Any:
        parts, search, k = rotation(native[name], nq), running[name].search, ctx.case.k
        return lambda i: search(parts[i % len(parts)], k)

    return interleave({name: caller(name) for name in running}, ctx.effort) if running else {}


def _check(
    ctx: Context, running: Mapping[str, Variant], native: Mapping[str, Any], nq: int, first: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Recall, and agreement with the reference, of answers given in batches of this very size."""
    ids = {name: _ids(ctx, engine, native[name], nq, first[name][1]) for name, engine in running.items()}
    reference = ctx.first_of(ids)
    facts: dict[str, dict[str, float]] = {}
    for name, found in ids.items():
        checked = len(found)
        rows = (ctx.data.base, ctx.checked[:checked], found)
        facts[name] = {
            "recall": answers.recall(*rows, ctx.truth[:checked], ctx.case.metric),
            "checked": checked,
            "peak_growth_bytes": first[name][0],
        }
        if reference is not None and name != reference:
            facts[name]["agreement"] = answers.agreement(*rows, ids[reference], ctx.case.metric)
    return facts


def _ids(ctx: Context, engine: Variant, native: Any, nq: int, answer: Any) -> np.ndarray:
    """The ids of the first queries, batch after batch; `answer` is that to the first batch."""
    checked = min(len(ctx.checked), max(nq, _CHECKED))
    found = [engine.ids(answer)]
    for start in range(nq, checked, nq):
        found.append(engine.ids(engine.search(native[start : start + nq], ctx.case.k)))
    return np.concatenate(found)[:checked]
