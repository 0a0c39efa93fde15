"""What is aimed at, beside what was reached."""

from collections.abc import Iterator
from typing import NamedTuple

from .cases import AIMS, BATCHES, FLOAT_AIMS
from .results import Tasks
from .tables import TABLES, TO_FAISS, Figure, grid, speed, times

# Of compiled models: the time of eager search, and so much more (a share of it, and seconds).
_SHARE, _SECONDS = 0.05, 30e-6
_SPEED, _P95 = 0.9, 1.5  # of all threads, beside one thread: queries/s of a batch, p95 of a single query
_INDEX, _CODES = 1.05, 0.28  # of the raw vectors and ids; of the float rows
_RATE = 2e6 * 128  # numbers a second that are made codes
_CODED = "ours, its 8-bit codes"


class Aim(NamedTuple):
    what: str
    aimed: str
    reached: str
    missed: bool


def missed(tasks: Tasks) -> str:
    """A table of the aims that were not reached; how many there are; empty where none was measured."""
    found = [aim for part in (_search, _serving, _contention, _compiled, _memory, _codes) for aim in part(tasks)]
    if not found:
        return ""
    lines = [(aim.what, aim.aimed, aim.reached) for aim in found if aim.missed]
    said = f"{len(found) - len(lines)} of {len(found)} aims are reached" + (". The others:" if lines else ".")
    return said + ("\n\n" + grid(["aim", "aimed at", "reached"], lines) if lines else "")


def _search(tasks: Tasks) -> Iterator[Aim]:
    """Queries/s as multiples of faiss's, with codes by what the processor multiplies with, and without."""
    for case, task in ((case, task) for (case, name), task in tasks.items() if name == "search"):
        unit = next((unit for unit in AIMS if unit in task.facts["simd"]), "")
        coded = any("rows_scored" in row for row in task.rows)
        for engine, aims in {"ours": AIMS.get(unit, {}) if coded else {}, "ours-float": FLOAT_AIMS}.items():
            for nq, aim in zip(BATCHES, aims.get(case, ()), strict=False):
                ratio = TO_FAISS.at(task.rows, {"engine": engine, "nq": nq})
                if ratio is not None:
                    yield _least(f"{case}, {engine}, nq {nq:,}: queries/s / faiss's", aim, ratio)


def _serving(tasks: Tasks) -> Iterator[Aim]:
    for (case, name), task in tasks.items():
        for clients in task.values("clients") if name == "serving" else ():
            ratio = TO_FAISS.at(task.rows, {"engine": "ours", "clients": clients})
            if ratio is not None:
                yield _least(f"{case}, request threads {clients}: requests/s / faiss's", 1, ratio)


def _contention(tasks: Tasks) -> Iterator[Aim]:
    """All threads beside one thread."""
    for (case, name), task in tasks.items():
        for busy in task.values("busy") if name == "contention" and task.facts["threads"] > 1 else ():
            beside, over = f"{case}, busy processes {busy}", {"threads": 1}
            cell = {"engine": "ours", "busy": busy, "threads": task.facts["threads"]}
            fast = Figure("", "qps", over=over).at(task.rows, {**cell, "nq": 512})
            if fast is not None:
                yield _least(f"{beside}, nq 512: queries/s / one thread's", _SPEED, fast)
            late = Figure("", "seconds_p95", over=over).at(task.rows, {**cell, "nq": 1})
            if late is not None:
                yield _most(f"{beside}, nq 1: p95 / one thread's", _P95, late)


def _compiled(tasks: Tasks) -> Iterator[Aim]:
    seconds = Figure("", "seconds")
    for (case, name), task in tasks.items():
        for nq in task.values("nq") if name == "compiled" else ():
            eager, own = (seconds.at(task.rows, {"engine": engine, "nq": nq}) for engine in ("eager", "compiled"))
            if eager is not None and own is not None:
                most = eager * (1 + _SHARE) + _SECONDS
                aimed, reached = f"{nq / most:,.0f}", speed(nq / own)
                yield Aim(f"{case}, compiled model, nq {nq:,}: queries/s", aimed, reached, own > most)


def _memory(tasks: Tasks) -> Iterator[Aim]:
    size, search = Figure("", lambda row: row["index_bytes"] / row["raw_bytes"]), Figure("", "scratch_bytes", of=max)
    for (case, name), task in tasks.items():
        if name != "memory":
            continue
        ratio = size.at(task.rows, {"engine": "ours-float"})
        if ratio is not None:
            yield _most(f"{case}, ours-float: index / raw vectors and ids", _INDEX, ratio)
        taken = search.at(task.rows, {"engine": "ours"})
        limit = Figure("", "max_bytes").at(task.rows, {"engine": "ours"})
        if taken is not None and limit is not None:
            aimed, reached = f"{limit / 2**20:,.0f} MiB", f"{taken / 2**20:,.0f} MiB"
            yield Aim(f"{case}, ours: memory of a search", aimed, reached, taken > limit)


def _codes(tasks: Tasks) -> Iterator[Aim]:
    """Their size, and how fast they are made."""
    share = TABLES["search"].figures[2]
    for (case, name), task in tasks.items():
        size = share.at(task.rows, {"engine": "ours"}) if name == "search" else None
        if size is not None:
            yield _most(f"{case}, ours: codes / float rows", _CODES, size)
        made = Figure("", lambda row: row["rows"] / row["seconds"]).at(task.rows, {"engine": _CODED})
        search = tasks.get((case, "search"))
        if name == "add" and made is not None and search is not None:
            d = Figure("", lambda row: row.get("raw_bytes", 0) / row["nb"] / 4 or None).at(search.rows, {})
            if d:
                aimed = _RATE / d
                yield Aim(f"{case}: rows/s made codes", f"{aimed:,.0f}", f"{made:,.0f}", made < aimed)


def _least(what: str, aim: float, reached: float) -> Aim:
    return Aim(what, f"≥ {aim:g}×", times(reached), reached < aim)


def _most(what: str, aim: float, reached: float) -> Aim:
    return Aim(what, f"≤ {aim:g}×", f"{reached:.3g}×", reached > aim)
