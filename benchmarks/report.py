"""Read the stored lines and write docs/benchmarks.md, its figures, and the block of figures in README.md.

Nothing is measured here. The last finished run of each (case, task) is shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import results, verdicts
from .cases import CASES, PLAN
from .results import TaskRun
from .tables import TABLES, growth

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[1]
_BEGIN, _END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
_Tasks = Mapping[tuple[str, str], TaskRun]

_TITLES = {
    "search": "Searching the same lists",
    "flat": "Exhaustive search",
    "train": "Training",
    "add": "Adding",
    "recall": "Recall against queries/s, each library's own training",
    "auto": "`auto` against the best fixed mode (time ratio, and which mode is the best)",
    "budgets": "Budgets of rows, with the lists in order",
    "filters": "Searching among some of the ids",
    "maintenance": "An index that changes",
    "threads": "Concurrent searches",
    "memory": "Memory",
    "formats": "Formats of model graphs",
}

_HEAD = """# Benchmarks

Written by `python -m benchmarks.report` from `benchmarks/results/`; edit the instrument, not this page.
How each figure is taken is told in [benchmarks/README.md](../benchmarks/README.md). In short: engines take
turns on the same rows with the same number of threads, medians of many calls; a ratio in brackets is to
faiss-cpu in the same run; “same ids” is the lowest share of ids, over all batch sizes, that agree with
faiss's, ties aside; “growth” is how far the process's memory rose in a first call, at the most.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="default: benchmarks/results/benchmarks.jsonl")
    parser.add_argument("--root", type=Path, default=_ROOT, help="where docs/ and README.md are")
    options = parser.parse_args(argv)
    tasks = {
        key: task for key, task in results.latest(options.files or [results.DEFAULT]).items() if task.rows
    }
    if not tasks:
        print("no finished measurement is stored yet: run `python -m benchmarks.run` first")
        return 0
    docs = options.root / "docs"
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text(_page(tasks, docs / "img"), encoding="utf-8")
    print("wrote docs/benchmarks.md")
    if _fill_readme(options.root / "README.md", tasks):
        print("wrote the figures in README.md")
    return 0


def _page(tasks: _Tasks, images: Path) -> str:
    parts = [_HEAD.strip(), "## What was wanted, what was measured", verdicts.table(tasks)]
    for name in [*PLAN, *(name for name in CASES if name not in PLAN)]:
        mine = {task: tasks[name, task] for task in TABLES if (name, task) in tasks}
        if mine and not name.startswith("growth-"):
            parts.append(f"## {name}\n\n{CASES[name].about}.")
            for task in mine.values():
                parts += [f"### {name}: {_TITLES[task.task]}", *_section(task, images)]
    parts += [*_growth(tasks, images), *_auto(tasks, images), "## Runs", *_runs(tasks)]
    return "\n\n".join(parts) + "\n"


def _section(task: TaskRun, images: Path) -> list[str]:
    from . import plots

    parts = [TABLES[task.task](task)]
    draw = {"search": plots.speed, "flat": plots.speed, "recall": plots.recall}.get(task.task)
    if draw is not None:
        file = f"{task.task}-{task.case}.svg"
        draw(task, f"{task.case}, {task.task}", images / file)
        parts.append(f"![{_TITLES[task.task]}, {task.case}](img/{file})")
    return [*parts, _caption(task), *_left_out(task)]


def _growth(tasks: _Tasks, images: Path) -> list[str]:
    from . import plots

    found = [
        tasks[name, "search"] for name in CASES if name.startswith("growth-") and (name, "search") in tasks
    ]
    if not found:
        return []
    plots.growth(found, "Gaussian", images / "growth.svg")
    about = "nlist is close to 4·√nb and nprobe is 32, so the rows a query reads grow as √nb."
    image = "![Time per query against the number of base rows](img/growth.svg)"
    captions = list(dict.fromkeys(_caption(task) for task in found))
    return ["## How cost grows", about, growth(found), image, *captions]


def _auto(tasks: _Tasks, images: Path) -> list[str]:
    from . import plots

    found = [task for (_, name), task in tasks.items() if name == "auto"]
    if not found:
        return []
    plots.auto(found, images / "auto.svg")
    return ["## auto, all cases", "![Time of auto over that of the best fixed mode](img/auto.svg)"]


def _caption(task: TaskRun) -> str:
    facts = task.facts
    changed = " with uncommitted changes" if facts["changed"] else ""
    return (
        f"*{facts['cpu']}, {facts['threads']} threads; {facts['date'][:10]}, "
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


def _runs(tasks: _Tasks) -> list[str]:
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


def _fill_readme(readme: Path, tasks: _Tasks) -> bool:
    """Put the search tables between the markers; a README without them is left alone."""
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    shown = [tasks[name, "search"] for name in ("headline", "photographs") if (name, "search") in tasks]
    if _BEGIN not in text or _END not in text or not shown:
        return False
    blocks = [f"{CASES[task.case].about}:\n\n{TABLES['search'](task)}\n\n{_caption(task)}" for task in shown]
    versions = shown[0].facts["versions"]
    names = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "faiss-cpu", "torch-ivf") if name in versions
    )
    blocks.append(f"With {names}. All figures: [docs/benchmarks.md](docs/benchmarks.md).")
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    readme.write_text(before + "\n\n".join([_BEGIN, *blocks, _END]) + after, encoding="utf-8")
    return True


if __name__ == "__main__":
    sys.exit(main())
