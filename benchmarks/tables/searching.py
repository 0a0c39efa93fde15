"""How fast searches are, and what their answers are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..cells import NONE, grid, number, over, speed, times
from ..results import TaskRun

__all__ = [
    "LEVELS",
    "auto",
    "auto_ratios",
    "budgets",
    "filters",
    "floor_of",
    "formats",
    "growth",
    "ladder",
    "pairs",
    "profile",
    "recall",
    "speeds",
]

LEVELS = (0.8, 0.9, 0.95, 0.99)  # of recall
_MIB = 2**20


def speeds(task: TaskRun, engine: str) -> list[str]:
    """Queries/s of an engine at every batch size of the task, with the ratio to faiss."""
    cells = []
    for nq in task.values("nq"):
        found = task.pick(engine=engine, nq=nq)
        ratio = None if engine == "faiss" else task.ratio("qps", engine, nq=nq)
        cells.append(_cell(found[0]["qps"], ratio) if found else NONE)
    return cells


def ladder(task: TaskRun) -> str:
    """Queries/s at every batch size; what share of the floor that is at the best; what the answers were worth."""
    floor = floor_of(task)
    rows = []
    for engine in task.engines():
        mine = task.pick(engine=engine)
        agreements = [row["agreement"] for row in mine if "agreement" in row]
        growth_bytes = max(row["peak_growth_bytes"] for row in mine)
        share = [] if floor is None else [f"{max(row['qps'] for row in mine) / floor:.0%}"]
        worth = [f"{mine[-1]['recall']:.4f}", f"{min(agreements):.5f}" if agreements else NONE]
        rows.append([engine, *speeds(task, engine), *share, *worth, f"{growth_bytes / _MIB:,.0f}"])
    nqs, k = (f"nq {nq:,}" for nq in task.values("nq")), task.rows[0]["k"]
    of_floor = [] if floor is None else ["of the floor"]
    table = grid(["queries/s", *nqs, *of_floor, f"recall@{k}", "same ids", "growth, MiB"], rows)
    return table if floor is None else f"{table}\n\n{_floors(task)}"


def floor_of(task: TaskRun, dtype: str = "float32") -> float | None:
    """Queries/s of this machine, were a search nothing but its products in `dtype`."""
    found = [floor for floor in task.floors if floor["dtype"] == dtype]
    return 1e9 * found[0]["gflops"] / (2 * found[0]["tile"][1] * found[0]["rows_read"]) if found else None


def _floors(task: TaskRun) -> str:
    parts = [
        f"{speed(floor_of(task, floor['dtype']) or 0)} queries/s in {floor['dtype']} ({floor['gflops']:,.0f} GFLOP/s)"
        for floor in task.floors
    ]
    m, d, n = task.floors[0]["tile"]
    read = task.floors[0]["rows_read"]
    return (
        f"The floor is what the products alone would take, in plain calls of ({m:,} × {d}) · ({d} × {n:,}), for the "
        f"{read:,.0f} rows that a query reads: {', '.join(parts)}. Shares are of the one in float32, at the best."
    )


def _cell(qps: float, ratio: float | None) -> str:
    return speed(qps) + (f" ({times(ratio)})" if ratio is not None else "")


def recall(task: TaskRun) -> str:
    """The fastest measured setting that reaches each level of recall; nothing is interpolated."""
    blocks = []
    for nq in task.values("nq"):
        rows = []
        for engine in task.engines():
            mine = task.pick(engine=engine, nq=nq)
            if not mine:
                continue
            cells = [_best([row for row in mine if row["recall"] >= level]) for level in LEVELS]
            rows.append([engine, *cells, number(mine[0]["build_seconds"])])
        head = [f"queries/s, nq {nq:,}", *(f"recall ≥ {level:g}" for level in LEVELS), "build, s"]
        blocks.append(grid(head, rows))
    return "\n\n".join(blocks)


def _best(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return NONE
    best = max(rows, key=lambda row: row["qps"])
    setting = f" ({best['knob']} {best['value']})" if best["knob"] else ""
    return f"{speed(best['qps'])}{setting}"


def pairs(task: TaskRun) -> str:
    """Recall, and queries/s of each engine, for every pair of nlist and nprobe."""
    engines, rows = task.engines(), []
    wanted = sorted({(row["nlist"], row["nprobe"]) for row in task.rows})
    for nlist, nprobe in wanted:
        mine = task.pick(nlist=nlist, nprobe=nprobe)
        found = {(row["engine"], row["nq"]): row["qps"] for row in mine}
        cells = [
            _cell(qps, over(qps, found.get(("faiss", nq))) if name != "faiss" else None) if qps else NONE
            for nq in task.values("nq")
            for name, qps in ((name, found.get((name, nq))) for name in engines)
        ]
        rows.append([f"{nlist:,}, {nprobe}", f"{mine[0]['recall']:.4f}", *cells])
    heads = [f"{name}, nq {nq:,}" for nq in task.values("nq") for name in engines]
    return grid(["nlist, nprobe", f"recall@{task.rows[0]['k']}", *heads], rows)


def auto_ratios(task: TaskRun) -> list[tuple[int, int, float, str]]:
    """(nprobe, nq, time of auto over that of the best fixed mode, which mode that is)."""
    found = []
    for nprobe in task.values("nprobe"):
        for nq in task.values("nq"):
            cell = {row["engine"]: row["seconds"] for row in task.pick(nprobe=nprobe, nq=nq)}
            chosen = cell.pop("ours", None)
            if chosen is not None and cell:
                best = min(cell, key=lambda name: cell[name])
                found.append((nprobe, nq, chosen / cell[best], best.removeprefix("ours-")))
    return found


def auto(task: TaskRun) -> str:
    cells = {(nprobe, nq): f"{ratio:.2f} ({mode})" for nprobe, nq, ratio, mode in auto_ratios(task)}
    nqs = task.values("nq")
    rows = [
        [f"nprobe {nprobe}", *(cells.get((nprobe, nq), NONE) for nq in nqs)]
        for nprobe in task.values("nprobe")
    ]
    unevenness = f"unevenness {task.rows[0]['unevenness']:.1f}"
    return grid([unevenness, *(f"nq {nq:,}" for nq in nqs)], rows)


def budgets(task: TaskRun) -> str:
    """Recall against the unlimited search, and time as a share of its."""
    rows = []
    for nq in task.values("nq"):
        for row in task.pick(nq=nq):
            whole = task.pick(engine="unlimited", nq=nq)[0]
            cells = [f"{row['recall']:.4f}", f"{row['rows_read']:,.0f}", speed(row["qps"])]
            rows.append([f"nq {nq:,}, {row['engine']}", *cells, times(row["qps"] / whole["qps"])])
    head = ["limit", "recall against unlimited", "rows read a query", "queries/s", "/ unlimited"]
    return grid(head, rows)


def filters(task: TaskRun) -> str:
    """Queries/s at every batch size, and in brackets as a multiple of those without a selector."""
    nqs, rows = task.values("nq"), []
    for engine in task.engines():
        cells = []
        for nq in nqs:
            mine, whole = (task.pick(engine=name, nq=nq)[0]["qps"] for name in (engine, "no selector"))
            cells.append(_cell(mine, mine / whole if engine != "no selector" else None))
        rows.append([engine, *cells])
    return grid(["ids that may be found", *(f"nq {nq:,}" for nq in nqs)], rows)


def growth(tasks: Sequence[TaskRun]) -> str:
    """Time per query against the number of base rows."""
    nqs = sorted({nq for task in tasks for nq in task.values("nq")})
    engines = list(dict.fromkeys(engine for task in tasks for engine in task.engines()))
    blocks = []
    for nq in nqs:
        rows = []
        for task in tasks:
            found = [task.pick(engine=engine, nq=nq) for engine in engines]
            times = [number(1e6 * row[0]["seconds"] / nq if row else None) for row in found]
            rows.append([f"{task.rows[0]['nb']:,}", f"{task.rows[0]['nlist']:,}", *times])
        blocks.append(grid([f"µs a query, nq {nq:,}: nb", "nlist", *engines], rows))
    return "\n\n".join(blocks)


def formats(task: TaskRun) -> str:
    """Milliseconds a batch in each format, and in brackets its queries/s as a multiple of faiss's."""
    nqs = task.values("nq")
    rows = []
    for engine in task.engines():
        mine = task.pick(engine=engine)
        cells = [_batch(task, engine, nq) for nq in nqs]
        alone = engine not in ("ours", "faiss") and not engine.startswith("compiled")
        agreements = [row["agreement"] for row in mine if "agreement" in row]
        rows.append(
            [
                "ours, eager" if engine == "ours" else engine,
                *cells,
                f"{mine[0]['bytes'] / _MIB:,.0f}" if mine[0].get("bytes") else NONE,
                number(mine[0].get("make_seconds") if alone else None),  # torch.compile works at the first call
                NONE if engine == "faiss" else "no" if alone else "yes",
                f"{min(agreements):.5f}" if agreements else NONE,
            ]
        )
    head = ["ms a batch", *(f"nq {nq:,}" for nq in nqs), "file, MiB", "made in, s", "needs the package", "same ids"]
    return grid(head, rows)


def _batch(task: TaskRun, engine: str, nq: int) -> str:
    found = task.pick(engine=engine, nq=nq)
    if not found:
        return NONE
    ratio = "" if engine == "faiss" else f" ({times(task.ratio('qps', engine, nq=nq))})"
    return f"{1e3 * found[0]['seconds']:.3g}{ratio}"


def profile(task: TaskRun) -> str:
    """Milliseconds of each phase and its share of the search; the operators are those of the largest batch."""
    nqs, rows = task.values("nq"), []
    for engine in task.engines():
        for phase in dict.fromkeys(row["phase"] for row in task.pick(engine=engine)):
            mine = task.pick(engine=engine, phase=phase)
            found = {row["nq"]: row for row in mine}
            cells = [_phase(found[nq], task.pick(engine=engine, phase="search", nq=nq)[0]) for nq in nqs if nq in found]
            cells += [NONE] * (len(nqs) - len(cells))
            rows.append([f"{engine}: {phase}", *cells, ", ".join(mine[-1]["operators"]) or NONE])
    return grid(["ms in a phase", *(f"nq {nq:,}" for nq in nqs), "most of it in"], rows)


def _phase(row: dict[str, Any], whole: dict[str, Any]) -> str:
    if row is whole:
        return f"{1e3 * row['seconds']:.3g} (unprofiled {1e3 * row['alone']:.3g})"
    return f"{1e3 * row['seconds']:.3g} ({row['seconds'] / whole['seconds']:.0%})"
