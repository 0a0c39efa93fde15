"""docs/benchmarks.md and its pictures, out of the last finished run of each (case, task)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from . import verdicts
from .cases import CASES, PLAN
from .results import TaskRun
from .tables import TABLES
from .tables.searching import growth

__all__ = ["Tasks", "caption", "page", "pictures"]

Tasks = Mapping[tuple[str, str], TaskRun]

_TITLES = {
    "lists": "How long the lists are",
    "search": "Searching the same lists",
    "flat": "Exhaustive search",
    "train": "Training",
    "add": "Adding",
    "recall": "Recall against queries/s, each library's own training",
    "pairs": "Recall and queries/s over nlist and nprobe, on the same lists",
    "auto": "`auto` against the best fixed mode (time ratio, and which mode is the best)",
    "budgets": "Budgets of rows, with the lists in order",
    "codes": "`max_codes`, with the lists as they are",
    "filters": "Searching among some of the ids",
    "maintenance": "An index that changes",
    "threads": "Concurrent searches",
    "memory": "Memory",
    "formats": "Formats of model graphs",
    "profile": "Where the time goes, by `torch.profiler`",
}

# What is drawn of a task: the name of a function of plots.py.
_KINDS = {"search": "speed", "flat": "speed", "recall": "recall", "lists": "lists"}

_HEAD = """# Benchmarks

Written by `python -m benchmarks report` from `benchmarks/benchmarks.jsonl`; edit the instrument, not this page.
How each figure is taken is told in [benchmarks/README.md](../benchmarks/README.md). In short: engines take
turns on the same rows with the same number of threads, medians of many calls; a ratio in brackets is to
faiss-cpu in the same run; “same ids” is the lowest share of ids, over all batch sizes, that agree with
faiss's, ties aside; “growth” is how far the process's memory rose in a first call, at the most.
"""


def page(tasks: Tasks) -> str:
    parts = [_HEAD.strip(), "## What was wanted, what was measured", verdicts.table(tasks)]
    for name in [*PLAN, *(name for name in CASES if name not in PLAN)]:
        mine = {task: tasks[name, task] for task in TABLES if (name, task) in tasks}
        if mine and not name.startswith("growth-"):
            parts.append(f"## {name}\n\n{CASES[name].about}.")
            for task in mine.values():
                parts += [f"### {name}: {_TITLES[task.task]}", *_section(task)]
    parts += [*_growth(tasks), *_auto(tasks), "## Runs", *_runs(tasks)]
    return "\n\n".join(parts) + "\n"


def pictures(tasks: Tasks) -> dict[str, Callable[[], str]]:
    """The files in docs/img/ and what draws each as SVG; before that is called, nothing that draws is imported."""
    drawn: dict[str, Callable[[], str]] = {}
    for (case, name), task in tasks.items():
        kind = _KINDS.get(name)
        if kind is not None and not case.startswith("growth-"):
            drawn[_file(task)] = partial(_draw, kind, task, f"{case}, {name}")
    if ("headline", "search") in tasks:
        drawn["headline.svg"] = partial(_draw, "headline", tasks["headline", "search"])
    grown, compared = _grown(tasks), _compared(tasks)
    if grown:
        drawn["growth.svg"] = partial(_draw, "growth", grown, "Gaussian")
    if compared:
        drawn["auto.svg"] = partial(_draw, "auto", compared)
    return drawn


def _draw(kind: str, *arguments: Any) -> str:
    from . import plots

    return str(getattr(plots, kind)(*arguments))


def _file(task: TaskRun) -> str:
    return f"{task.task}-{task.case}.svg"


def _section(task: TaskRun) -> list[str]:
    parts = [TABLES[task.task](task)]
    if task.task in _KINDS:
        parts.append(f"![{_TITLES[task.task]}, {task.case}](img/{_file(task)})")
    return [*parts, caption(task), *_left_out(task)]


def _grown(tasks: Tasks) -> list[TaskRun]:
    return [tasks[name, "search"] for name in CASES if name.startswith("growth-") and (name, "search") in tasks]


def _growth(tasks: Tasks) -> list[str]:
    found = _grown(tasks)
    if not found:
        return []
    about = "nlist is close to 4·√nb and nprobe is 32, so the rows a query reads grow as √nb."
    image = "![Time per query against the number of base rows](img/growth.svg)"
    captions = list(dict.fromkeys(caption(task) for task in found))
    return ["## How cost grows", about, growth(found), image, *captions]


def _compared(tasks: Tasks) -> list[TaskRun]:
    return [tasks[name, "auto"] for name in CASES if (name, "auto") in tasks]


def _auto(tasks: Tasks) -> list[str]:
    image = "![Time of auto over that of the best fixed mode](img/auto.svg)"
    return ["## auto, all cases", image] if _compared(tasks) else []


def caption(task: TaskRun) -> str:
    facts = task.facts
    changed = " with uncommitted changes" if facts["changed"] else ""
    native = ", native kernel" if facts.get("native") else ""
    return (
        f"*{facts['cpu']}, {facts['threads']} threads{native}; {facts['date'][:10]}, "
        f"commit {facts['commit'][:7]}{changed}; `{facts['command']}`; run {facts['run']}*"
    )


def _left_out(task: TaskRun) -> list[str]:
    """Engines that were not measured everywhere, and why."""
    lines = [f"- {name}: {reason}" for name, reason in task.facts["skipped"].items()]
    if task.task != "auto":  # there the slower mode is left out by design
        for skip in task.skips:
            where = ", ".join(f"{key} {skip[key]:,}" for key in ("nq", "nprobe", "value") if key in skip)
            lines.append(f"- {skip['engine']}{' at ' + where if where else ''}: {skip['reason']}")
    return ["Left out:\n\n" + "\n".join(dict.fromkeys(lines))] if lines else []


def _runs(tasks: Tasks) -> list[str]:
    runs = {task.facts["run"]: task.facts for task in tasks.values()}
    return [_run(facts) for _, facts in sorted(runs.items())]


def _run(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"**{facts['run']}**: {facts['date']}, `{facts['command']}`, commit `{facts['commit']}`"
        f"{' with uncommitted changes' if facts['changed'] else ''}. {facts['cpu']}, {facts['cores']} cores, "
        f"{facts['memory_bytes'] / 2**30:.0f} GiB, {facts['threads']} threads, "
        f"load {facts['load']:.2f} at the start; "
        f"{facts['system']}, Python {facts['python']}, torch capability {facts['torch_capability']}. "
        f"{versions}. Vector instructions: {' '.join(facts['simd']) or 'unknown'}."
    )
