"""docs/benchmarks.md and its plots, from the last finished run of each (case, task)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .cases import AIMS, BATCHES, CASES, PLAN
from .device import images, kind
from .results import TaskRun
from .tables import GROWTH, TABLES, TO_FAISS, grid, pivot, tabulate

Tasks = Mapping[tuple[str, str], TaskRun]

SHOWN = ("ours", "ours-float", "ours-csr", "faiss", "torch-ivf")  # engines, in the READMEs' tables and chart
_HEAD = """# Benchmarks

Written by `python -m benchmarks report` from `benchmarks/benchmarks.jsonl`; change the program, not this page.
How each figure is measured is described in [benchmarks/README.md](../benchmarks/README.md). In short: engines take
turns on the same rows with the same number of threads, and figures are medians of many calls. A ratio in brackets is
to faiss-cpu in the same run. “recall” is recall@20; “same ids” is the lowest share of ids, over all batch sizes, that
agree with faiss's, ties aside; “of the floor” is the best speed as a share of what the matrix products alone, in plain
calls, would allow; “growth” is the largest rise of the process's memory in a first call. Where a native
kernel is named, `ours` uses it, with its 8-bit codes where the default makes them, and `ours-float` without codes;
`ours-csr` and `ours-matrix` are always PyTorch operations."""


_ON_DEVICE = """# Benchmarks on an accelerator: {names}

Written by `python -m benchmarks report --device {kind}` from `benchmarks/benchmarks-{kind}.jsonl`; change the program,
not this page. faiss and the other libraries without a device in their name search on the CPU of the same machine.
[benchmarks.md](benchmarks.md) has the figures of CPUs, and what the words mean."""


def _head(tasks: Tasks, where: str) -> str:
    names = dict.fromkeys(task.facts["device_name"] for task in tasks.values()) if where != "cpu" else ()
    return _ON_DEVICE.format(names=", ".join(names), kind=where) if names else _HEAD


def page(tasks: Tasks, where: str = "cpu") -> str:
    parts = [_head(tasks, where)]
    for name in dict.fromkeys([*PLAN, *CASES]):
        found = [tasks[name, task] for task in TABLES if (name, task) in tasks]
        if found and not name.startswith("growth-"):
            parts.append(f"## {name}\n\n{CASES[name].description}.")
            for task in found:
                parts += [f"### {name}: {TABLES[task.task].title}", *_section(task)]
    found = [tasks[name, "search"] for name in CASES if name.startswith("growth-") and (name, "search") in tasks]
    if found:
        parts += [f"## {GROWTH.title}", "nlist is close to 4·√nb and nprobe is 32: the rows a query reads grow as √nb."]
        parts += [pivot(GROWTH, [row for task in found for row in task.rows]), *dict.fromkeys(map(caption, found))]
    runs = {task.facts["run"]: task.facts for task in tasks.values()}
    return "\n\n".join([*parts, "## Runs", *(_run(runs[name]) for name in sorted(runs))]) + "\n"


def aims(task: TaskRun) -> str:
    """The ratios to faiss that were reached with codes, beside those to be reached on such a processor."""
    unit = next((unit for unit in AIMS if unit in task.facts["simd"]), "")
    aim = dict(zip(BATCHES, AIMS.get(unit, {}).get(task.case, ()), strict=False))
    if not aim or not any("rows_scored" in row for row in task.rows):
        return ""
    found = [TO_FAISS.text(task.rows, {"engine": "ours", "nq": nq}) for nq in aim]
    aimed = [f"{ratio:g}×" for ratio in aim.values()]
    return grid(["queries/s / faiss's", *(f"nq {nq:,}" for nq in aim)], [["ours", *found], [f"aim, {unit}", *aimed]])


def which_index(tasks: Tasks) -> str:
    """The task `quantizers` at the nprobe of each case, for the page about these indexes; empty if it was not done."""
    parts, names = [], ("photographs", "tokens", "headline")
    found = [tasks[name, "quantizers"] for name in names if (name, "quantizers") in tasks]
    for task in found:
        table, rows = replace(TABLES["quantizers"], block=None), task.pick(nprobe=CASES[task.case].nprobe)
        parts += [f"{CASES[task.case].description}:", pivot(table, rows)]
        parts += [f"![Recall against queries/s, {task.case}](img/{plot_file(task)})", caption(task)]
    return "\n\n".join(parts)


def query_filters(tasks: Tasks) -> str:
    """The task `query_filters` of the headline, for the page about filters; empty if it was not done."""
    task = tasks.get(("headline", "query_filters"))
    return "" if task is None else f"{CASES[task.case].description}:\n\n{tabulate(task)}\n\n{caption(task)}"


def plot_file(task: TaskRun) -> str:
    return f"{task.task}-{task.case}.svg"


def _section(task: TaskRun) -> list[str]:
    table = TABLES[task.task]
    parts = [tabulate(task)]
    if task.task == "auto":
        parts.append(f"Unevenness of the lists: {task.rows[0]['unevenness']:.1f} (1 for lists of one size).")
    if table.plot is not None:
        parts.append(f"![{table.title}, {task.case}]({images(kind(task.facts))}/{plot_file(task)})")
    parts += [aims(task)] if task.task == "search" and aims(task) else []
    return [*parts, caption(task), *_left_out(task)]


def caption(task: TaskRun) -> str:
    facts, kernel = task.facts, ", native kernel" if task.facts.get("native") else ""
    commit = facts["commit"][:7] + (" with uncommitted changes" if facts["changed"] else "")
    on = f"{facts['device_name']}; host " if kind(facts) != "cpu" else ""
    where = f"{on}{facts['cpu']}, {facts['threads']} threads{kernel}; {facts['date'][:10]}, commit {commit}"
    return f"*{where}; `{facts['command']}`; run {facts['run']}*"


def _left_out(task: TaskRun) -> list[str]:
    """Engines that were not measured everywhere, and why."""
    lines = [f"- {name}: {reason}" for name, reason in task.facts["skipped"].items()]
    for skip in task.skips if task.task != "auto" else ():  # there the slower mode is left out by design
        where = ", ".join(f"{key} {skip[key]:,}" for key in ("nq", "nprobe", "value") if skip.get(key) is not None)
        lines.append(f"- {skip['engine']}{' at ' + where if where else ''}: {skip['reason']}")
    return ["Left out:\n\n" + "\n".join(dict.fromkeys(lines))] if lines else []


def _run(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"**{facts['run']}**: {facts['date']}, `{facts['command']}`, commit `{facts['commit']}`"
        f"{' with uncommitted changes' if facts['changed'] else ''}. {facts['cpu']}, {facts['cores']} cores, "
        f"{facts['memory_bytes'] / 2**30:.0f} GiB, {facts['threads']} threads, load {facts['load']:.2f} at the start; "
        f"{facts['system']}, Python {facts['python']}, torch capability {facts['torch_capability']}. "
        f"{versions}. Vector instructions: {' '.join(facts['simd']) or 'unknown'}."
    )
