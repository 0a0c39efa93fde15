"""One finished task as a Markdown table. Figures are read from stored rows; ratios stay within one run."""

from __future__ import annotations

from collections.abc import Callable

from ..cells import times
from ..results import TaskRun
from .keeping import add, lists, maintenance, memory, threads, train
from .searching import auto, budgets, filters, formats, ladder, pairs, profile, recall

__all__ = ["TABLES", "plain"]

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
    "profile": profile,
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
