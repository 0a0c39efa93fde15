"""Generated parts of other pages: what stands between <!-- NAME:begin --> and <!-- NAME:end --> there.

NAME is one of BLOCKS, or CASE/TASK for the table of that task. A part whose figures are not stored stays as it is.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .cases import CASES, DATA
from .page import Say, caption, measured, plot_file
from .results import Row, TaskRun, Tasks
from .tables import EAGER, MAXSIM, NONE, QPS, SQ8, TABLES, TO_FAISS, Figure, grid, last, pivot, tabulate, times
from .words import JAPANESE

MARKED = re.compile(r"(<!-- ([\w/-]+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
ENGINES = {"ours": "with 8-bit copy", "ours-float": "without copy", "ours-csr": "no kernel", "faiss": "faiss"}

_PACE = Figure("", lambda row: 1 / row["seconds"], times, over={"engine": "faiss"})
_SECONDS = Figure("", "seconds", "{:.3g} s".format, note=_PACE)


def fill(text: str, tasks: Tasks, japanese: bool = False) -> str:
    """The text of a page with its parts as the stored figures have them."""

    def block(match: re.Match[str]) -> str:
        name, (case, _, task) = match[2], match[2].partition("/")
        if name in BLOCKS:
            parts = [part for part in BLOCKS[name](tasks, JAPANESE.__getitem__ if japanese else str) if part]
        else:
            parts = [*_table(tasks[case, task])] if (case, task) in tasks else []
        return "\n\n".join([match[1], *parts, match[3]]).replace("\n\n\n", "\n\n") if parts else match[0]

    return MARKED.sub(block, text)


def _table(task: TaskRun) -> Iterator[str]:
    yield from (f"{CASES[task.case].description}:", tabulate(task), caption(task))


def which_index(tasks: Tasks, _: Say = str) -> Iterator[str]:
    """The task `quantizers` at the nprobe of each case."""
    names = ("photographs", "tokens", "headline")
    for task in (tasks[name, "quantizers"] for name in names if (name, "quantizers") in tasks):
        table, rows = replace(TABLES["quantizers"], block=None), task.pick(nprobe=CASES[task.case].nprobe)
        yield f"{CASES[task.case].description}:"
        yield pivot(table, rows)
        yield f"![Recall against queries/s, {task.case}](img/{plot_file(task)})"
        yield caption(task)


def maxsim(tasks: Tasks, _: Say) -> Iterator[str]:
    """The figures of the command `multi-vector`."""
    if ("documents", "maxsim") in tasks:
        task = tasks["documents", "maxsim"]
        yield from (pivot(MAXSIM, task.rows), caption(task))


# Of each index to choose: the engine of the task, the name, and when to take it.
_CHOICES = (
    ("flat", "`IndexFlatL2(d)`, `IndexFlatIP(d)`", "up to some 10,000 vectors, or exact results"),
    ("ours", "`IndexIVFFlat(d, nlist=…)`", "more vectors: a query reads `nprobe` of the lists"),
    ("ours-float16", "the same with `dtype=torch.float16`", "half of the memory"),
    ("ours-sq8", "`IndexIVFScalarQuantizer(d, nlist=…)`", "a quarter of the memory: codes of 8 bits"),
    ("ours-sq4", "the same with `bits=4`", "the least memory, approximate: codes of 4 bits"),
)


def choice(tasks: Tasks, say: Say) -> Iterator[str]:
    """The indexes to choose from, with what was measured of each on the photographs."""
    if ("photographs", "quantizers") not in tasks:
        return
    task, flat = tasks["photographs", "quantizers"], tasks.get(("photographs", "flat"))
    rows = task.pick(nprobe=CASES[task.case].nprobe)
    rows += [{**row, "engine": "flat"} for row in (flat.pick(engine="ours") if flat else ())]
    columns: list[tuple[str, Figure, dict[str, Any]]] = [
        (say("bytes of a vector"), Figure("", _bytes, str, last), {}),
        (say("recall@10"), Figure("", "recall", "{:.3f}".format, last), {}),
        *((f"{say('queries/s')}, nq {nq:,}", replace(QPS, note=None), {"nq": nq}) for nq in task.values("nq")),
    ]
    lines = [
        [name if engine in ("flat", "ours", "ours-sq8") else say(name), say(use)]
        + [figure.text(rows, {"engine": engine, **cell}) for _, figure, cell in columns]
        for engine, name, use in _CHOICES
    ]
    yield grid([say("index"), say("for"), *(head for head, _, _ in columns)], lines, texts=2)
    yield measured([task, *([flat] if flat else [])], say)


def _bytes(row: Row) -> str | None:
    """Of a vector in the index, and of its 8-bit copy."""
    copy = f" + {row['codes']:,.0f}" if row.get("codes") else ""
    return f"{row['bytes'] - row['codes']:,.0f}{copy}" if "bytes" in row else None


@dataclass(frozen=True)
class Line:
    """A line of the table of what is fast and what is slow; `figure` has the ratio as its note."""

    what: str
    task: str
    cell: Mapping[str, Any] = field(default_factory=dict)
    figure: Figure = QPS
    against: str = "faiss"

    def of(self, task: TaskRun) -> dict[str, Any]:
        """The rows of this task that the figure is of."""
        threads = {"threads": task.facts["threads"]} if self.task == "contention" else {}
        nprobe = {"nprobe": CASES[task.case].nprobe} if self.task == "quantizers" else {}
        return {"engine": "ours", **threads, **nprobe, **self.cell}


_CODES = {"engine": "ours-sq8"}
LINES = (
    Line("server: 1 thread searches single queries", "serving", {"clients": 1}),
    Line("server: 4 threads search single queries", "serving", {"clients": 4}),
    Line("server: 8 threads search single queries", "serving", {"clients": 8}),
    Line("1 query, 1 other process busy", "contention", {"nq": 1, "busy": 1}),
    Line("512 queries, 2 other processes busy", "contention", {"nq": 512, "busy": 2}),
    Line("compiled model, 1 query", "compiled", {"engine": "compiled", "nq": 1}, EAGER, "eager model"),
    Line("compiled model, 512 queries", "compiled", {"engine": "compiled", "nq": 512}, EAGER, "eager model"),
    Line("`IndexIVFScalarQuantizer`, 1 query", "quantizers", {**_CODES, "nq": 1}, SQ8, "faiss SQ8"),
    Line("`IndexIVFScalarQuantizer`, 2,048 queries", "quantizers", {**_CODES, "nq": 2_048}, SQ8, "faiss SQ8"),
    Line("exhaustive search, 1 query", "flat", {"nq": 1}),
    Line("exhaustive search, 512 queries", "flat", {"nq": 512}),
    Line("training", "train", {}, _SECONDS),
    Line("adding", "add", {}, _SECONDS),
)


def fast(tasks: Tasks, say: Say) -> Iterator[str]:
    """Where searches are fast and where they are slow: by batch size, in other situations, and what is slower."""
    searches = [tasks[name, "search"] for name in DATA if (name, "search") in tasks]
    if not searches:
        return
    names = {name: say(words) for name, words in {**DATA, **ENGINES}.items()}
    recall = Figure(say("recall@{}").format(searches[0].rows[0]["k"]), "recall", "{:.3f}".format, last)
    table = replace(TABLES["search"], corner=say("queries/s (× faiss)"), figures=(recall,), words=names)
    rows = [row for task in searches for row in task.rows if row["engine"] in ENGINES]
    yield pivot(replace(table, index=("case", "engine")), rows)
    found = [(line, tasks[name, line.task]) for line in LINES for name in DATA if (name, line.task) in tasks]
    texts = {(line.what, task.case): line.figure.text(task.rows, line.of(task)) for line, task in found}
    body = [
        [say(line.what), say(line.against), *(texts.get((line.what, name), NONE) for name in DATA)]
        for line in LINES
        if any(texts.get((line.what, name), NONE) != NONE for name in DATA)
    ]
    yield grid([say("queries/s, or seconds"), say("compared with"), *map(say, DATA.values())], body, 2) if body else ""
    yield _slower(searches, found, say)
    yield measured([*searches, *(task for _, task in found)], say)


def _slower(searches: Iterable[TaskRun], others: Iterable[tuple[Line, TaskRun]], say: Say) -> str:
    """What is slower than what it is compared with."""
    ratios: list[tuple[str, TaskRun, Any]] = []
    for task in searches:
        for engine, nq in [(name, nq) for name in ("ours", "ours-float") for nq in task.values("nq")]:
            what = f"nq {nq:,} {say(ENGINES[engine])}"
            ratios.append((what, task, TO_FAISS.at(task.rows, {"engine": engine, "nq": nq})))
    for line, task in others:
        ratios.append((say(line.what), task, line.figure.note and line.figure.note.at(task.rows, line.of(task))))
    found: dict[str, list[str]] = {}
    for what, task, ratio in ratios:
        if ratio is not None and ratio < 1:
            found.setdefault(what, []).append(f"{say(DATA[task.case])} {times(ratio)}")
    parts = [f"{what} ({', '.join(cases)})" for what, cases in found.items()]
    return say("Slower than what it is compared with: {}.").format("; ".join(parts)) if parts else ""


BLOCKS: dict[str, Callable[[Tasks, Say], Iterator[str]]] = {
    "quantizers": which_index,
    "choice": choice,
    "fast": fast,
    "maxsim": maxsim,
}
