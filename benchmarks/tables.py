"""One finished task as a Markdown table: one pivot table, and for each task what its rows, columns and figures are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from statistics import median
from typing import Any

from .results import Row, TaskRun

NONE, last = "–", itemgetter(-1)
number, count = "{:,.3g}".format, "{:,.0f}".format
LEVELS = (0.8, 0.9, 0.95, 0.99)  # of recall
_MIB = 2**20


def grid(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; every column after the first `texts` is aligned to the right."""
    lines = [head, ["---"] * texts + ["---:"] * (len(head) - texts), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(value: float) -> str:
    """A ratio."""
    if value >= 10:
        return f"{value:.0f}×" if value >= 100 else f"{value:.3g}×"
    return f"{value:.2f}×" if value >= 0.1 else f"{value:.2g}×"


@dataclass(frozen=True)
class Figure:
    """One figure, of the rows that fit a cell and `where`."""

    head: str
    value: str | Callable[[Row], Any]  # a field of the row, or a function of the row
    form: Callable[[Any], str] = number
    of: Callable[[list[Any]], Any] = median  # the values of several rows as one
    where: Mapping[str, Any] = field(default_factory=dict)
    over: Mapping[str, Any] = field(default_factory=dict)  # fields of the rows that it is divided by
    note: Figure | None = None  # in brackets after it, unless it would compare rows with themselves

    def at(self, rows: Sequence[Row], cell: Mapping[str, Any]) -> Any:
        """The figure of the rows with the values of `cell`; None where there is none."""
        found = self._of(rows, {**cell, **self.where})
        under = self._of(rows, {**cell, **self.where, **self.over}) if self.over else 1
        return found if not self.over or found is None else found / under if under else None

    def text(self, rows: Sequence[Row], cell: Mapping[str, Any]) -> str:
        found, note = self.at(rows, cell), self.note
        if found is None:
            return NONE
        if note is None or (note.over and {**cell, **note.over} == dict(cell)) or note.at(rows, cell) is None:
            return self.form(found)
        return f"{self.form(found)} ({note.text(rows, cell)})"

    def _of(self, rows: Sequence[Row], wanted: Mapping[str, Any]) -> Any:
        fit = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
        values = [self.value(row) if callable(self.value) else row.get(self.value) for row in fit]
        return self.of([v for v in values if v is not None]) if any(v is not None for v in values) else None


@dataclass(frozen=True)
class Table:
    """How a task is tabulated. Numbers that name columns or blocks are sorted, everything else is as it was stored."""

    title: str
    corner: str
    index: tuple[str, ...]  # the fields that name a row
    across: tuple[str, ...] = ()  # the fields that name the columns of `value`
    value: Figure | None = None
    figures: tuple[Figure, ...] = ()  # columns after those
    block: str | None = None  # one table for each value of this field
    rows: Callable[[TaskRun], list[Row]] = lambda task: task.rows  # what is tabulated
    plot: str | None = None  # a function of plots.py
    words: Mapping[str, str] = field(default_factory=dict)  # what stands for a name in the page


def pivot(table: Table, rows: Sequence[Row]) -> str:
    """The Markdown tables, one for each block. A column without any figure is left out."""
    blocks = [{}] if table.block is None else _cells(rows, (table.block,), sort=True)
    return "\n\n".join(_one(table, [row for row in rows if row.items() >= block.items()], block) for block in blocks)


def _one(table: Table, rows: Sequence[Row], block: Mapping[str, Any]) -> str:
    columns: list[tuple[str, Figure, Mapping[str, Any]]] = [(figure.head, figure, {}) for figure in table.figures]
    if table.value is not None:
        across = _cells(rows, table.across, sort=True)
        columns = [*((_label(cell, table.words), table.value, cell) for cell in across), *columns]
    lines = _cells(rows, table.index)
    texts = [[figure.text(rows, {**line, **cell}) for line in lines] for _, figure, cell in columns]
    kept = [(head, text) for (head, _, _), text in zip(columns, texts, strict=True) if set(text) != {NONE}]
    body = zip([_label(line, table.words) for line in lines], *(text for _, text in kept), strict=True)
    corner = ", ".join(filter(None, (table.corner, _label(block, table.words))))
    return grid([corner, *(head for head, _ in kept)], body)


def _cells(rows: Sequence[Row], names: tuple[str, ...], sort: bool = False) -> list[dict[str, Any]]:
    """The combinations of values that occur, in the order of their first row or, where they are numbers, sorted."""
    keys = list(dict.fromkeys(tuple(row[name] for name in names) for row in rows))
    if sort:
        keys.sort(key=lambda key: [0 if isinstance(part, str) else part for part in key])
    return [dict(zip(names, key, strict=True)) for key in keys]


def _label(cell: Mapping[str, Any], words: Mapping[str, str]) -> str:
    named = (words.get(value, value) if isinstance(value, str) else f"{name} {value:,}" for name, value in cell.items())
    return ", ".join(named)


def tabulate(task: TaskRun) -> str:
    return pivot(TABLES[task.task], TABLES[task.task].rows(task))


def _levels(task: TaskRun) -> list[Row]:
    """The fastest measured setting that reaches each level of recall; nothing is interpolated."""
    rows = []
    for cell in _cells(task.rows, ("nq", "engine")):
        measured = task.pick(**cell)
        for level in LEVELS:
            reached = [row for row in measured if row["recall"] >= level]
            best = max(reached, key=lambda row: row["qps"], default={"build_seconds": measured[0]["build_seconds"]})
            rows.append({**best, **cell, "recall ≥": level})
    return rows


def auto_ratios(task: TaskRun) -> list[Row]:
    """Time of `auto` over that of the best fixed mode, and which mode that is."""
    found = []
    for cell in _cells(task.rows, ("nprobe", "nq"), sort=True):
        seconds = {row["engine"]: row["seconds"] for row in task.pick(**cell)}
        auto, best = seconds.pop("ours", None), min(seconds, key=lambda name: seconds[name], default=None)
        if auto is not None and best is not None:
            found.append({**cell, "ratio": auto / seconds[best], "best": best.removeprefix("ours-")})
    return found


def scaled(name: str, factor: float) -> Callable[[Row], float | None]:
    return lambda row: None if row.get(name) is None else row[name] * factor


def _of(head: str, what: str, part: str) -> Figure:
    """Milliseconds of a kind of call."""
    return Figure(head, lambda row: 1e3 * row[what][part] if row.get(what) else None)


def _step(head: str, step: str, form: Callable[[Any], str] = number, factor: float = 1, **over: str) -> Figure:
    return Figure(head, scaled("seconds", factor), form, where={"what": step}, over=over)


_TIMES = {"p50": "p50", "p99": "p99", "at most": "longest"}
_FAISS = {"engine": "faiss"}
TO_FAISS = Figure("", "qps", times, over=_FAISS)
QPS = Figure("", "qps", speed, note=TO_FAISS)
_MS, _P95 = scaled("seconds", 1e3), scaled("seconds_p95", 1e3)
_SECONDS = (Figure("seconds", "seconds"), Figure("time / faiss's", "seconds", times, over=_FAISS))
_RATE = Figure("rows/s", lambda row: row["rows"] / row["seconds"], count)
_OBJECTIVE = (
    Figure("objective", "objective", "{:.5g}".format),
    Figure("objective / faiss's", "objective", "{:.4f}".format, over=_FAISS),
)
_RECALL = Figure("recall", "recall", "{:.4f}".format, last)
_MADE = Figure("made in, s", "make_seconds")
_SAME_IDS = Figure("same ids", "agreement", "{:.5f}".format, min)
_GROWTH = Figure("growth, MiB", scaled("peak_growth_bytes", 1 / _MIB), count, max)
_FLOOR = Figure("of the floor", lambda row: row["qps"] / row["floor"] if "floor" in row else None, "{:.0%}".format, max)
CODES = (
    Figure("rows scored exactly", "rows_scored", "{:.0f}".format),
    Figure("codes / float rows", lambda row: row["codes_bytes"] / row["raw_bytes"] if "codes_bytes" in row else None),
)
_BATCHES = ("queries/s", ("engine",), ("nq",), QPS, (_FLOOR, *CODES, _RECALL, _SAME_IDS, _GROWTH))
SQ8 = Figure("", "qps", speed, note=Figure("", "qps", times, over={"engine": "faiss-sq8"}))
_LIMITS = (
    Figure("recall against unlimited", "recall", "{:.4f}".format),
    Figure("rows read per query", "rows_read", count),
    Figure("queries/s", "qps", speed),
    Figure("/ unlimited", "qps", times, over={"engine": "unlimited"}),
)
_SELECTED = Figure("", "qps", speed, note=Figure("", "qps", times, over={"engine": "no selector"}))
_SETTING = Figure("", lambda row: f"{row['knob']} {row['value']}" if row.get("knob") else None, str, last)
_PART = Figure("", "seconds", "{:.0%}".format, over={"phase": "search"})
_SHAPE = {"lists": len, "empty": lambda sizes: sizes.count(0), "shortest": min, "median": median, "longest": max}
EAGER = Figure("", "qps", speed, note=Figure("", "qps", times, over={"engine": "eager"}))
_PER_QUERY = Figure("", lambda row: 1e6 * row["seconds"] / row["nq"])
GROWTH = Table("How cost grows", "µs per query", ("nb", "nlist"), ("engine",), _PER_QUERY, block="nq")
MAXSIM = Table("Documents of several vectors", "", ("engine",), figures=(
    Figure("ms, one query", _MS, "{:.1f}".format),
    Figure("× loop", lambda row: row["loop"] / row["seconds"]),
    Figure("ms per query of 16", scaled("batch_seconds", 1e3), "{:.1f}".format),
    Figure("× loop", lambda row: row["loop"] / row["batch_seconds"] if "batch_seconds" in row else None),
    Figure("recall@10", "recall", "{:.4f}".format),
))  # fmt: skip
TABLES: dict[str, Table] = {
    "lists": Table("List sizes", "sizes", ("engine",), figures=(
        *(Figure(name, lambda row, of=of: of(row["sizes"]), count) for name, of in _SHAPE.items()),
        Figure("imbalance factor", "imbalance", "{:.2f}".format),
    )),
    "search": Table("Searching the same lists", *_BATCHES, plot="speed"),
    "flat": Table("Exhaustive search", *_BATCHES, plot="speed"),
    "train": Table("Training", "training", ("engine",), figures=(*_SECONDS, *_OBJECTIVE)),
    "add": Table("Adding", "adding", ("engine",), figures=(*_SECONDS, _RATE)),
    "recall": Table(
        "Recall against queries/s, each library's own training", "queries/s", ("engine",), ("recall ≥",),
        Figure("", "qps", speed, note=_SETTING), (Figure("build, s", "build_seconds"),), "nq", _levels, "recall",
    ),
    "quantizers": Table(
        "Which index to take, on the same lists", "queries/s (× faiss-sq8)", ("engine",), ("nq",), SQ8, (
            Figure("stored as", "stored", str, last), Figure("recall@10", "recall", "{:.4f}".format, last),
            Figure("bytes per vector", "bytes", count), Figure("as codes", lambda row: row["codes"] or None, count),
            Figure("/ float rows", lambda row: row["bytes"] / row["raw"], "{:.3f}".format),
        ), "nprobe", plot="recall",
    ),
    "pairs": Table(
        "Recall and queries/s over nlist and nprobe, on the same lists", "queries/s", ("nlist", "nprobe"),
        ("nq", "engine"), QPS, (_RECALL,),
    ),
    "auto": Table(
        "Time of `auto` over that of the best fixed mode, and which mode that is", "time ratio", ("nprobe",), ("nq",),
        Figure("", "ratio", "{:.2f}".format, note=Figure("", "best", str, last)), rows=auto_ratios,
    ),
    "budgets": Table("Budgets of rows, with sorted lists", "limit", ("nq", "engine"), figures=_LIMITS),
    "codes": Table("`max_codes`, with the lists as they are", "limit", ("nq", "engine"), figures=_LIMITS),
    "filters": Table("Searching among some of the ids", "ids that may be found", ("engine",), ("nq",), _SELECTED),
    "query_filters": Table(
        "A filter for each query, by the share of ids that it may find", "queries/s", ("engine",), ("share",),
        QPS, (_SAME_IDS,), "nq",
    ),
    "maintenance": Table("An index that changes", "maintenance", ("engine",), figures=(
        _step("one add, s", "one add"),
        _step("in batches, s", "batches"),
        _step("batches / one", "batches", times, what="one add"),
        Figure("add(1), search(1) pairs", "pairs", count),
        _step("ms per pair", "turns", factor=1e3),
        _step("pair / faiss's", "turns", times, engine="faiss"),
        _step("ms per small removal", "removes", factor=1e3),
        _step("removal / faiss's", "removes", times, engine="faiss"),
    )),
    "updates": Table("Single queries while another thread changes rows", "changes", ("changes", "engine"), figures=(
        Figure("queries/s", "qps", speed, note=TO_FAISS),
        *(_of(f"{what} {head}, ms", what, part) for what in ("search", "change") for head, part in _TIMES.items()),
    )),
    "serving": Table("Request threads", "threads", ("clients", "engine"), figures=(
        Figure("requests/s", "qps", speed, note=TO_FAISS),
        Figure("p50, ms", scaled("p50", 1e3)),
        Figure("p99, ms", scaled("p99", 1e3)),
    )),
    "contention": Table(
        "Beside busy processes", "queries/s", ("engine", "threads"), ("nq", "busy"), QPS,
        tuple(Figure(f"p95 of nq 1, busy {n}, ms", _P95, where={"nq": 1, "busy": n}) for n in (0, 1, 2)),
    ),
    "compiled": Table(
        "Models that hold an index", "queries/s (× eager)", ("engine",), ("nq",), EAGER, (_MADE, _SAME_IDS)
    ),
    "memory": Table("Memory", "memory", ("engine", "nq", "nprobe"), figures=(
        Figure("growth, MiB", scaled("scratch_bytes", 1 / _MIB), count),
        Figure("results, MiB", scaled("result_bytes", 1 / _MIB), "{:,.1f}".format),
        Figure("max_bytes, MiB", scaled("max_bytes", 1 / _MIB), count),
        Figure("index / raw", lambda row: row["index_bytes"] / row["raw_bytes"], "{:.2f}".format),
    )),
    "formats": Table(
        "Formats of model graphs", "ms per batch", ("engine",), ("nq",),
        Figure("", _MS, "{:.3g}".format, note=TO_FAISS), figures=(
            Figure("files, MiB", lambda row: row["bytes"] / _MIB if row.get("bytes") else None, count),
            _MADE, _SAME_IDS,
        ),
    ),
    "profile": Table(
        "Time in each phase, by `torch.profiler`", "ms", ("engine", "phase"), ("nq",), Figure("", _MS, note=_PART),
    ),
}  # fmt: skip
