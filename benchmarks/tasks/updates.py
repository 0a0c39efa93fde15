"""Single queries while another thread changes the index: how long searches and changes take."""

import contextlib
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from ..context import Context
from ..engines import Variant
from ..measure import timed

_ENGINES = ("ours", "faiss")
_ROUNDS, _SECONDS = 4, 2.0  # of each engine and kind of change; a round lasts so many times `serve_seconds`
_PAUSE = 0.05  # seconds between two changes

Change = Callable[[Variant, Any, np.ndarray], None]  # of an index, by rows and their ids


def updates(ctx: Context) -> None:
    """One thread searches, another changes some rows 20 times a second; in faiss they take turns, by a lock."""
    engines = ctx.build_paired(*_ENGINES)
    calls = {name: ctx.caller(engine, engine.convert(ctx.checked), 1) for name, engine in engines.items()}
    parts = np.array_split(np.arange(len(ctx.data.base)), len(ctx.data.base) // ctx.case.batch)
    kinds: dict[str, Change | None] = {"none": None}
    kinds |= {f"add {ctx.case.batch}": _add, f"replace {ctx.case.batch}": _replace}
    for kind, change in kinds.items():
        searches: dict[str, list[float]] = defaultdict(list)
        changes: dict[str, list[float]] = defaultdict(list)
        numbers = {name: itertools.cycle(parts) for name in engines}
        for turn in range(_ROUNDS):
            ctx.note(f"changes: {kind}, {turn + 1} of {_ROUNDS}")
            for name, engine in engines.items():
                found = _together(ctx, engine, calls[name], change, numbers[name], name == "faiss")
                searches[name] += found[0]
                changes[name] += found[1]
        for name in engines:
            times = {key: _times(values[name]) for key, values in (("search", searches), ("change", changes))}
            ctx.row(name, changes=kind, qps=1 / np.mean(searches[name]), nprobe=ctx.case.nprobe, k=ctx.case.k, **times)


def _together(
    ctx: Context, engine: Variant, search: Callable[[int], Any], change: Change | None, parts: Any, locked: bool
) -> tuple[list[float], list[float]]:
    """Seconds of each search of this thread, and of each change of another one."""
    lock: Any = threading.Lock() if locked else contextlib.nullcontext()
    searched, changed, ended = [], [], threading.Event()

    def within(call: Callable[..., Any], *arguments: Any) -> Any:
        with lock:
            return call(*arguments)

    def write() -> None:
        while change is not None and not ended.wait(_PAUSE):
            ids = next(parts)
            changed.append(timed(within, change, engine, engine.convert(ctx.data.base[ids]), ids)[0])

    search(0)
    writer, end = threading.Thread(target=write), time.perf_counter() + _SECONDS * ctx.effort.serve_seconds
    writer.start()
    while time.perf_counter() < end:
        searched.append(timed(within, search, len(searched))[0])
    ended.set()
    writer.join()
    return searched, changed


def _add(engine: Variant, rows: Any, ids: np.ndarray) -> None:
    engine.add(rows)


def _replace(engine: Variant, rows: Any, ids: np.ndarray) -> None:
    if hasattr(engine.index, "update"):
        engine.index.update(ids, rows)
    else:
        engine.remove(ids)
        engine.index.add_with_ids(rows, ids)


def _times(seconds: list[float]) -> dict[str, float] | None:
    """Median, 99th percentile and the longest, in seconds."""
    if not seconds:
        return None
    return {"p50": float(np.median(seconds)), "p99": float(np.percentile(seconds, 99)), "longest": max(seconds)}
