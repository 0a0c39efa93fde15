"""The beginning of the benchmarks page: charts, and tables for each question that a user has."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .cases import CASES, DATA, PLAN
from .device import images
from .results import Row, Tasks
from .tables import QPS, TABLES, Figure, Table, count, pivot, scaled, times

_CASE = ("case", "engine")
_FEW = 8  # queries, at most
_P95 = Figure("p95 of nq 1, ms", scaled("seconds_p95", 1e3), where={"nq": 1})


@dataclass(frozen=True)
class Answer:
    """A table over all data sets: which rows of which tasks it has."""

    tasks: tuple[str, ...]
    table: Table
    keep: Callable[[Row], bool] = lambda row: True


@dataclass(frozen=True)
class Question:
    title: str
    text: str
    answers: tuple[Answer, ...]


def _step(task: str, name: str) -> tuple[Figure, Figure]:
    """Seconds of training or adding, and their ratio to faiss's."""
    return (
        Figure(f"{name}, s", "seconds", where={"task": task}),
        Figure(f"{name} / faiss's", "seconds", times, where={"task": task}, over={"engine": "faiss"}),
    )


def _batches(figures: tuple[Figure, ...] = ()) -> Table:
    return Table("", "queries/s (× faiss)", _CASE, ("nq",), QPS, figures)


QUESTIONS = (
    Question(
        "A few queries at a time",
        "Each call has 1 or 8 queries, one call after another in one process.",
        (Answer(("search",), _batches((_P95,)), lambda row: row["nq"] <= _FEW),),
    ),
    Question(
        "Many queries at a time",
        "All queries of a call that probe a list share reading it, so the time per query falls with the batch size.",
        (Answer(("search",), _batches(), lambda row: row["nq"] > _FEW),),
    ),
    Question(
        "A server",
        "Threads that each search one query at a time; then a process beside others that use the processors.",
        (
            Answer(("serving",), Table("", "requests/s (× faiss)", _CASE, ("clients",), QPS, tuple(
                Figure(f"p99, clients {n}, ms", scaled("p99", 1e3), where={"clients": n}) for n in (1, 8)
            ))),
            Answer(("contention",), Table("", "queries/s (× faiss)", (*_CASE, "threads"), ("nq", "busy"), QPS)),
        ),
    ),
    Question(
        "A compiled model",
        "`nn.Sequential(nn.Linear, index)` by `torch.compile`; ratios are to the eager model.",
        (Answer(("compiled",), replace(TABLES["compiled"], index=_CASE)),),
    ),
    Question(
        "Memory",
        "The index as a multiple of its float32 vectors and ids, and what one search of all queries takes beside it.",
        (Answer(("memory",), Table("", "memory", _CASE, figures=(
            Figure("index / raw", lambda row: row["index_bytes"] / row["raw_bytes"], "{:.2f}".format),
            Figure("search, MiB", scaled("scratch_bytes", 1 / 2**20), count, max),
            Figure("of these results, MiB", scaled("result_bytes", 1 / 2**20), "{:,.1f}".format, max),
            Figure("max_bytes, MiB", scaled("max_bytes", 1 / 2**20), count),
        ))),),
    ),
    Question(
        "Building",
        "Ten iterations of k-means, and adding all vectors until a first query is answered.",
        (Answer(("train", "add"), Table(
            "", "seconds", _CASE, figures=(*_step("train", "training"), *_step("add", "adding"))
        )),),
    ),
)  # fmt: skip


def charts(tasks: Tasks, where: str) -> Iterator[str]:
    if ("headline", "search") in tasks:
        yield f"![Queries/s against the number of queries in a batch]({images(where)}/headline.svg)"
    if ("photographs", "quantizers") in tasks:
        yield "Recall and queries/s on the same lists, with vectors stored as they are and in fewer bits:"
        yield f"![Recall against queries/s, photographs]({images(where)}/quantizers-photographs.svg)"


def questions(tasks: Tasks) -> Iterator[str]:
    """The Markdown of all questions that there are figures for."""
    for question in QUESTIONS:
        found = [part for part in (_table(tasks, answer) for answer in question.answers) if part]
        if found:
            yield from (f"## {question.title}", question.text, *found)


def _table(tasks: Tasks, answer: Answer) -> str:
    names = [name for name in dict.fromkeys([*PLAN, *CASES]) if not name.startswith("growth-")]
    found = [tasks[name, task] for name in names for task in answer.tasks if (name, task) in tasks]
    rows = [row for task in found for row in task.rows if answer.keep(row)]
    return pivot(replace(answer.table, words=DATA), rows) if rows else ""


