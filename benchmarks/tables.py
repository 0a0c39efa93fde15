"""One finished task as a Markdown table. Figures are read from stored rows; ratios stay within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

from .results import TaskRun

__all__ = ["LEVELS", "TABLES", "auto_ratios", "grid", "growth", "middle", "plain"]

LEVELS = (0.8, 0.9, 0.95, 0.99)  # of recall
_MIB = 2**20
_NONE = "–"


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is set to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def middle(rows: Iterable[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return median(values) if values else None


def _number(value: float | None, form: str = "{:,.3g}") -> str:
    return _NONE if value is None else form.format(value)


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(value: float | None) -> str:
    if value is None:
        return _NONE
    if value >= 10:
        return f"{value:.0f}×" if value >= 100 else f"{value:.3g}×"
    return f"{value:.2f}×" if value >= 0.1 else f"{value:.2g}×"


def _over(mine: float | None, theirs: float | None) -> float | None:
    return mine / theirs if mine is not None and theirs else None


# --------------------------------------------------------------------------------------------- one per task


def ladder(task: TaskRun) -> str:
    """Queries/s at every batch size, with the ratio to faiss; then what the answers were worth."""
    nqs = task.values("nq")
    rows = []
    for engine in task.engines():
        cells = []
        for nq in nqs:
            found = task.pick(engine=engine, nq=nq)
            ratio = task.ratio("qps", engine, nq=nq)
            cells.append(_NONE if not found else _cell(found[0]["qps"], ratio if engine != "faiss" else None))
        mine = task.pick(engine=engine)
        agreements = [row["agreement"] for row in mine if "agreement" in row]
        growth_bytes = max(row["peak_growth_bytes"] for row in mine)
        rows.append(
            [
                engine,
                *cells,
                f"{mine[-1]['recall']:.4f}",
                f"{min(agreements):.5f}" if agreements else _NONE,
                f"{growth_bytes / _MIB:,.0f}",
            ]
        )
    k = task.rows[0]["k"]
    return grid(["queries/s", *(f"nq {nq:,}" for nq in nqs), f"recall@{k}", "same ids", "growth, MiB"], rows)


def _cell(qps: float, ratio: float | None) -> str:
    return _speed(qps) + (f" ({_times(ratio)})" if ratio is not None else "")


def train(task: TaskRun) -> str:
    rows = []
    for engine in task.engines():
        seconds, objective = (middle(task.pick(engine=engine), name) for name in ("seconds", "objective"))
        beside = [middle(task.pick(engine="faiss"), name) for name in ("seconds", "objective")]
        ratios = [_times(_over(seconds, beside[0])), _number(_over(objective, beside[1]), "{:.4f}")]
        rows.append([engine, _number(seconds), ratios[0], _number(objective, "{:.5g}"), ratios[1]])
    return grid(["training", "seconds", "time / faiss's", "objective", "objective / faiss's"], rows)


def add(task: TaskRun) -> str:
    rows = []
    for engine in task.engines():
        seconds = middle(task.pick(engine=engine), "seconds")
        ratio = _over(seconds, middle(task.pick(engine="faiss"), "seconds"))
        rate = _over(float(task.rows[0]["rows"]), seconds)
        rows.append([engine, _number(seconds), _number(rate, "{:,.0f}"), _times(ratio)])
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
            rows.append([engine, *cells, _number(mine[0]["build_seconds"])])
        head = [f"queries/s, nq {nq:,}", *(f"recall ≥ {level:g}" for level in LEVELS), "build, s"]
        blocks.append(grid(head, rows))
    return "\n\n".join(blocks)


def _best(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return _NONE
    best = max(rows, key=lambda row: row["qps"])
    setting = f" ({best['knob']} {best['value']})" if best["knob"] else ""
    return f"{_speed(best['qps'])}{setting}"


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
        [f"nprobe {nprobe}", *(cells.get((nprobe, nq), _NONE) for nq in nqs)]
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
            cells = [f"{row['recall']:.4f}", f"{row['rows_read']:,.0f}", _speed(row["qps"])]
            rows.append([f"nq {nq:,}, {row['engine']}", *cells, _times(row["qps"] / whole["qps"])])
    head = ["ordered lists", "recall against unlimited", "rows read a query", "queries/s", "/ unlimited"]
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
                _number(whole),
                _number(batches),
                _times(_over(batches, whole)),
                f"{pairs:,}",
                _number(per_pair),
                _times(_over(turns, theirs)),
                _number(None if removes is None else removes * 1_000),
                _times(_over(removes, middle(task.pick(engine="faiss", what="removes"), "seconds"))),
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
                _NONE if limit is None else f"{limit / _MIB:,.0f}",
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
            _speed(row["qps_alone"]),
            _speed(row["qps"]),
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
            times = [_number(1e6 * row[0]["seconds"] / nq if row else None) for row in found]
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
                f"{mine[0]['bytes'] / _MIB:,.0f}" if mine[0].get("bytes") else _NONE,
                _number(mine[0].get("make_seconds") if alone else None),  # torch.compile works at the first call
                _NONE if engine == "faiss" else "no" if alone else "yes",
                f"{min(agreements):.5f}" if agreements else _NONE,
            ]
        )
    head = ["ms a batch", *(f"nq {nq:,}" for nq in nqs), "file, MiB", "made in, s", "needs the package", "same ids"]
    return grid(head, rows)


def _batch(task: TaskRun, engine: str, nq: int) -> str:
    found = task.pick(engine=engine, nq=nq)
    if not found:
        return _NONE
    ratio = "" if engine == "faiss" else f" ({_times(task.ratio('qps', engine, nq=nq))})"
    return f"{1e3 * found[0]['seconds']:.3g}{ratio}"


TABLES: dict[str, Callable[[TaskRun], str]] = {
    "search": ladder,
    "flat": ladder,
    "train": train,
    "add": add,
    "recall": recall,
    "auto": auto,
    "budgets": budgets,
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
        told = [f"nq {nq:,}: {_times(old)} → {_times(new)}" for nq, old, new in pairs if old and new]
        lines.append(f"ours / faiss, before ({before.facts['commit'][:7]}) → now: " + ", ".join(told))
    return "\n".join(lines)
