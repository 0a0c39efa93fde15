"""docs/benchmarks.md: the questions that users have, then the details of each data set."""

from collections.abc import Callable, Iterable
from typing import Any

from .aims import missed
from .cases import CASES, DATA, PLAN
from .device import images, kind
from .questions import charts, questions
from .results import TaskRun, Tasks
from .tables import GROWTH, TABLES, pivot, tabulate

Say = Callable[[str], str]  # a text in the language of the page

_HEAD = """# Benchmarks

The speed of this package beside other libraries: first charts and a few questions with a table each, then the details
of each data set."""

_NAMES = """How to read the tables:

- Engines take turns on the same rows with the same number of threads; figures are medians of many calls. A ratio in
  brackets is to faiss-cpu in the same run. [benchmarks/README.md](../benchmarks/README.md) describes how each figure is
  measured.
- `ours` is the default: the native kernel, with 8-bit codes where the index makes them. `ours-float` has no codes
  (`codes=None`). `ours-csr` and `ours-matrix` are PyTorch operations.
- “recall” is recall@20, unless another number is given; “same ids” is the lowest share of ids, over all batch sizes,
  that agree with faiss's, ties aside.
- `python -m benchmarks report` writes this page from `benchmarks/benchmarks.jsonl`: change the program, not the
  page."""

_FLOOR = """“of the floor” is the best speed as a share of what the matrix products alone, in plain calls, would allow;
“growth” is the largest rise of the process's memory in a first call."""

_ON_DEVICE = """# Benchmarks on an accelerator: {names}

Written by `python -m benchmarks report --device {kind}` from `benchmarks/benchmarks-{kind}.jsonl`; change the program,
not this page. faiss and the other libraries without a device in their name search on the CPU of the same machine.
[benchmarks.md](benchmarks.md) has the figures of CPUs, and what the words mean."""


def _head(tasks: Tasks, where: str) -> str:
    names = dict.fromkeys(task.facts["device_name"] for task in tasks.values()) if where != "cpu" else ()
    return _ON_DEVICE.format(names=", ".join(names), kind=where) if names else _HEAD


def page(tasks: Tasks, where: str = "cpu") -> str:
    names = list(dict.fromkeys([*PLAN, *CASES]))
    shown = [name for name in names if any((name, task) in tasks for task in TABLES) and not name.startswith("growth-")]
    own = [task for (case, _), task in tasks.items() if case in CASES]
    parts = [_head(tasks, where), _where(own, str), *charts(tasks, where)]
    parts += [*([_NAMES] if where == "cpu" else []), "The data sets:", "\n".join(map(_data, shown)), *questions(tasks)]
    for name in shown:
        parts += [f"## Details: {name}", f"{CASES[name].description}."]
        for task in (tasks[name, task] for task in TABLES if (name, task) in tasks):
            parts += [f"### {name}: {TABLES[task.task].title}", *_section(task)]
    found = [tasks[name, "search"] for name in CASES if name.startswith("growth-") and (name, "search") in tasks]
    if found:
        parts += [f"## {GROWTH.title}", "nlist is close to 4·√nb and nprobe is 32: the rows a query reads grow as √nb."]
        parts += [pivot(GROWTH, [row for task in found for row in task.rows]), *dict.fromkeys(map(caption, found))]
    aims = missed(tasks)
    parts += ["## Aims that are missed", aims] if aims else []
    return "\n\n".join([*parts, "## Runs", *_runs(tasks.values())]) + "\n"


def _data(name: str) -> str:
    """An item of the list of data sets."""
    known_as = f"{DATA[name]}, case " if DATA.get(name, name) != name else ""
    return f"- {known_as}`{name}`: {CASES[name].description}"


def plot_file(task: TaskRun) -> str:
    return f"{task.task}-{task.case}.svg"


def _section(task: TaskRun) -> list[str]:
    table = TABLES[task.task]
    parts = [*([_FLOOR] if task.task == "search" else []), tabulate(task)]
    if task.task == "auto":
        parts.append(f"Unevenness of the lists: {task.rows[0]['unevenness']:.1f} (1 for lists of one size).")
    if table.plot is not None:
        parts.append(f"![{table.title}, {task.case}]({images(kind(task.facts))}/{plot_file(task)})")
    return [*parts, caption(task), *_left_out(task)]


def measured(tasks: Iterable[TaskRun], say: Say = str) -> str:
    """On what data, with what and when these tasks were measured."""
    tasks = list(tasks)
    data = "; ".join(dict.fromkeys(say(CASES[task.case].description) for task in tasks))
    return f"*{data}{say('. ')}{_where(tasks, say)}*"


def _where(tasks: list[TaskRun], say: Say) -> str:
    facts = tasks[0].facts
    dates = sorted({task.facts["date"][:10] for task in tasks})
    versions = {name: version for task in tasks for name, version in task.facts["versions"].items()}
    return say("{cpu}, {threads} threads, {versions}; {when}, commit {commits}.").format(
        cpu=facts["cpu"],
        threads=facts["threads"],
        versions=", ".join(f"{name} {versions[name]}" for name in ("torch", "faiss-cpu") if name in versions),
        when=" – ".join(dict.fromkeys([dates[0], dates[-1]])),
        commits=", ".join(dict.fromkeys(task.facts["commit"][:7] for task in tasks)),
    )


def caption(task: TaskRun) -> str:
    facts, kernel = task.facts, ", native kernel" if task.facts.get("native") else ""
    commit = facts["commit"][:7] + (" with uncommitted changes" if facts["changed"] else "")
    on = f"{facts['device_name']}; host " if kind(facts) != "cpu" else ""
    where = f"{on}{facts['cpu']}, {facts['threads']} threads{kernel}; {facts['date'][:10]}, commit {commit}"
    return f"*{where}; run {facts['run']}*"


def _left_out(task: TaskRun) -> list[str]:
    """Figures that were not taken, and why."""
    lines = []
    for skip in task.skips if task.task != "auto" else ():  # there the slower mode is left out by design
        where = ", ".join(f"{key} {skip[key]:,}" for key in ("nq", "nprobe", "value") if skip.get(key) is not None)
        lines.append(f"- {skip['engine']}{' at ' + where if where else ''}: {skip['reason']}")
    return ["Left out:\n\n" + "\n".join(dict.fromkeys(lines))] if lines else []


def _runs(tasks: Iterable[TaskRun]) -> list[str]:
    """The runs of each machine, with its versions."""
    machines: dict[str, list[str]] = {}
    for facts in sorted({task.facts["run"]: task.facts for task in tasks}.values(), key=lambda facts: facts["run"]):
        machines.setdefault(_machine(facts), []).append(_run(facts))
    return [f"{machine}\n\n" + "\n".join(runs) for machine, runs in machines.items()]


def _machine(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_bytes'] / 2**30:.0f} GiB; {facts['system']}, "
        f"Python {facts['python']}, torch capability {facts['torch_capability']}; {versions}; "
        f"vector instructions: {' '.join(facts['simd']) or 'unknown'}:"
    )


def _run(facts: dict[str, Any]) -> str:
    return (
        f"- **{facts['run']}**: {facts['date']}, `{facts['command']}`, commit `{facts['commit']}`"
        f"{' with uncommitted changes' if facts['changed'] else ''}, {facts['threads']} threads, "
        f"load {facts['load']:.2f} at the start"
    )
