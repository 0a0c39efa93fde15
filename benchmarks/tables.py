"""One finished task as a Markdown table. Figures are read from stored rows; ratios stay within one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from .cells import NONE, grid, middle, number, over, speed, times
from .results import TaskRun

__all__ = ["LEVELS", "TABLES", "auto_ratios", "floor_of", "growth", "plain", "speeds"]

LEVELS = (0.8, 0.9, 0.95, 0.99)  # of recall
_MIB = 2**20


# --------------------------------------------------------------------------------------------- one per task


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


def train(task: TaskRun) -> str:
    rows = []
    for engine in task.engines():
        seconds, objective = (middle(task.pick(engine=engine), name) for name in ("seconds", "objective"))
        beside = [middle(task.pick(engine="faiss"), name) for name in ("seconds", "objective")]
        ratios = [times(over(seconds, beside[0])), number(over(objective, beside[1]), "{:.4f}")]
        rows.append([engine, number(seconds), ratios[0], number(objective, "{:.5g}"), ratios[1]])
    return grid(["training", "seconds", "time / faiss's", "objective", "objective / faiss's"], rows)


def add(task: TaskRun) -> str:
    rows = []
    for engine in task.engines():
        seconds = middle(task.pick(engine=engine), "seconds")
        ratio = over(seconds, middle(task.pick(engine="faiss"), "seconds"))
        rate = over(float(task.rows[0]["rows"]), seconds)
        rows.append([engine, number(seconds), number(rate, "{:,.0f}"), times(ratio)])
    return grid(["adding", "seconds", "rows/s", "time / faiss's"], rows)


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


def lists(task: TaskRun) -> str:
    sizes = sorted(task.rows[0]["sizes"])
    shape = [f"{len(sizes):,}", f"{sizes.count(0):,}", f"{sizes[0]:,}", f"{median(sizes):,.0f}", f"{sizes[-1]:,}"]
    head = ["lists", "empty", "shortest", "median", "longest", "imbalance factor"]
    return grid(head, [[*shape, f"{task.rows[0]['imbalance']:.2f}"]])


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


def maintenance(task: TaskRun) -> str:
    rows = []
    for engine in task.engines():
        kinds = ("one add", "batches", "turns", "removes")
        whole, batches, turns, removes = (middle(task.pick(engine=engine, what=kind), "seconds") for kind in kinds)
        theirs = middle(task.pick(engine="faiss", what="turns"), "seconds")
        pairs = task.pick(engine=engine, what="turns")[0]["pairs"]
        per_pair = None if turns is None else turns * 1_000
        rows.append(
            [
                engine,
                number(whole),
                number(batches),
                times(over(batches, whole)),
                f"{pairs:,}",
                number(per_pair),
                times(over(turns, theirs)),
                number(None if removes is None else removes * 1_000),
                times(over(removes, middle(task.pick(engine="faiss", what="removes"), "seconds"))),
            ]
        )
    batch = task.pick(what="batches")[0]["batch"]
    small = f"batches of {batch}, s"
    return grid(
        [
            "maintenance",
            "one add, s",
            small,
            "batches / one",
            "add(1)+search(1) pairs",
            "ms a pair",
            "/ faiss's",
            "ms a small removal",
            "/ faiss's",
        ],
        rows,
    )


def memory(task: TaskRun) -> str:
    rows = []
    for row in task.rows:
        limit = row["max_bytes"]
        rows.append(
            [
                row["engine"],
                f"{row['nq']:,}",
                f"{row['nprobe']}",
                f"{row['scratch_bytes'] / _MIB:,.0f}",
                f"{row['result_bytes'] / _MIB:,.1f}",
                NONE if limit is None else f"{limit / _MIB:,.0f}",
                f"{row['index_bytes'] / row['raw_bytes']:.2f}",
            ]
        )
    return grid(
        ["memory", "nq", "nprobe", "growth, MiB", "results, MiB", "max_bytes, MiB", "index / raw"], rows
    )


def threads(task: TaskRun) -> str:
    rows = [
        [
            f"{row['engine']}, {row['concurrent']} threads",
            f"{row['agreement']:.5f}",
            speed(row["qps_alone"]),
            speed(row["qps"]),
        ]
        for row in task.rows
    ]
    return grid(
        ["concurrent searches", "agreement with one thread", "one thread's queries/s", "together"], rows
    )


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


TABLES: dict[str, Callable[[TaskRun], str]] = {
    "lists": lists,
    "search": ladder,
    "flat": ladder,
    "train": train,
    "add": add,
    "recall": recall,
    "pairs": pairs,
    "auto": auto,
    "budgets": budgets,
    "codes": budgets,
    "filters": filters,
    "maintenance": maintenance,
    "threads": threads,
    "memory": memory,
    "formats": formats,
}


def plain(task: TaskRun, before: TaskRun | None = None) -> str:
    """For the terminal: the table, and how ours stood to faiss in the run before."""
    table = TABLES[task.task](task) if task.rows else "nothing was measured"
    lines = [f"\n{task.case}, {task.task}", table]
    lines += [f"left out: {skip['engine']}, {skip['reason']}" for skip in task.skips]
    if before is not None and task.task in ("search", "flat"):
        pairs = [
            (nq, before.ratio("qps", "ours", nq=nq), task.ratio("qps", "ours", nq=nq))
            for nq in task.values("nq")
        ]
        told = [f"nq {nq:,}: {times(old)} → {times(new)}" for nq, old, new in pairs if old and new]
        lines.append(f"ours / faiss, before ({before.facts['commit'][:7]}) → now: " + ", ".join(told))
    return "\n".join(lines)
