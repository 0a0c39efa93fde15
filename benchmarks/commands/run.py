"""Measure and append JSON lines: the plan, the cases and tasks that are named, or one task over other values (sweeps).

torch and numpy are imported after the number of threads is set: thread pools get their size on first import.
"""

import argparse
import importlib
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import device, machine, results
from ..cases import CASES, PLAN, QUICK_CASE, QUICK_ENGINES, Case

Job = tuple[Case, str]


SWEEPS: dict[str, tuple[str, str]] = {  # the task, the field of the case
    "sweep-nq": ("search", "nqs"),
    "sweep-ivf": ("pairs", "ivf"),
    "sweep-codes": ("codes", "codes"),
    "sweep-budgets": ("budgets", "budgets"),
    "profile": ("profile", "profile_nqs"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    if parser.prog.split()[-1] in SWEEPS:
        option("--case", choices=sorted(CASES), default="headline", help="default: headline")
        option("--values", help="instead of the case's own, as 1,8 (pairs: 512:32,512:64). Stored, but not reported")
    else:
        tasks = sorted({task for planned in PLAN.values() for task in planned})
        option("--case", action="append", choices=sorted(CASES), help="only this case (may be repeated)")
        option("--task", action="append", choices=tasks, help="only this task (may be repeated)")
        option("--list", action="store_true", help="only list what would be measured, and when it last was")
    option("--quick", action="store_true", help="ours and faiss, few repetitions, stored in quick.jsonl, not committed")
    option("--engines", type=lambda text: text.split(","), help="only these, with commas between them")
    option("--out", type=Path, help="the file to append to")
    option("--quiet", action="store_true", help="no progress bar on a terminal either")
    machine.add_arguments(parser)
    device.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.command in SWEEPS:
        return _sweep(options)
    jobs, last = _jobs(options), results.latest([_out(options)])
    for case, task in jobs if options.list else ():
        when, found = "never", last.get((case.name, task))
        if found is not None:
            when = f"{found.facts['date'][:10]}, commit {found.facts['commit'][:7]}, {found.seconds:,.0f} s"
        print(f"{f'--case {case.name} --task {task}':42} {when}")
    if options.list:
        return 0
    words = [f"--case {case}" for case in options.case or ()] + [f"--task {task}" for task in options.task or ()]
    return measure(jobs, options, words, {})


def _jobs(options: argparse.Namespace) -> list[Job]:
    if options.quick and not options.case and not options.task:
        return [(QUICK_CASE, "search")]
    if options.case and options.task:  # whether planned or not; a task by itself is done where it is planned
        return [(CASES[name], task) for name in options.case for task in options.task]
    planned = [(name, task) for name in options.case or PLAN for task in PLAN.get(name, ("search",))]
    return [(CASES[name], task) for name, task in planned if not options.task or task in options.task]


def _sweep(options: argparse.Namespace) -> int:
    (task, field), case, values = SWEEPS[options.command], CASES[options.case], {}
    words = [f"--case {case.name}"]
    if options.values is not None:
        like = ",".join(str(value).strip("()").replace(", ", ":") for value in getattr(case, field)[:2])
        pattern = r"\d+:\d+" if ":" in like else r"\d+"
        if not re.fullmatch(f"{pattern}(,{pattern})*", options.values):
            raise SystemExit(f"--values must be like {like}, got {options.values!r}")
        given = [tuple(map(int, word.split(":"))) for word in options.values.split(",")]
        values[field] = tuple(given) if ":" in like else tuple(value for (value,) in given)
        words.append(f"--values {options.values}")
    return measure([(replace(case, **values), task)], options, words, values)


def measure(jobs: Sequence[Job], options: argparse.Namespace, words: list[str], values: Mapping[str, Any]) -> int:
    """Do the jobs, append their figures, print them. `words` are the options that say which jobs these are.

    `values` are settings that the cases do not have; figures measured with some are stored, but not reported.
    """
    machine.set_threads(options.threads)
    device.use(options.device)
    from ..engines import LIBRARIES, build_kernel, default

    native = build_kernel()
    asked = options.engines or (QUICK_ENGINES if options.quick else default(device.name))
    skipped = {}
    for name in asked:
        if name not in LIBRARIES:
            raise SystemExit(f"unknown engine {name!r}; there are {', '.join(LIBRARIES)}")
        try:
            importlib.import_module(LIBRARIES[name])
        except ImportError as error:
            skipped[name] = f"{LIBRARIES[name]} cannot be imported: {error.msg}"
            print(f"skipping {name}: {skipped[name]}")
    if not (names := tuple(name for name in asked if name not in skipped)):
        raise SystemExit("no engine is left to measure")
    words += ["--quick"] if options.quick else []
    words += ["--engines " + ",".join(options.engines)] if options.engines else []
    words += [f"--device {options.device}"] if device.name != "cpu" else []
    command = " ".join([options.command, *words, f"--threads {options.threads}"])
    facts = machine.describe(options.threads, command) | {"native": native, "skipped": skipped, "values": values}
    if facts["load"] > 0.5:
        print(f"the machine is busy (load {facts['load']:.1f}): these figures mean little")
    out = _out(options)
    run = results.name(facts)
    results.append(out, {"kind": "run", "schema": 1, "run": run, **facts})
    failures = _do(jobs, names, options, lambda line: results.append(out, {**line, "run": run}))
    _print(run, out)
    return 1 if failures else 0


def _out(options: argparse.Namespace) -> Path:
    """The file that figures are appended to; each kind of device has its own."""
    path = results.QUICK if options.quick else results.DEFAULT
    return options.out or device.variant(path, options.device.partition(":")[0])


def _do(jobs: Sequence[Job], names: tuple[str, ...], options: argparse.Namespace, write: Callable[[Any], None]) -> int:
    """Do every job; one that fails is reported and the others go on. The number of failures."""
    from tqdm import tqdm

    from ..context import Context
    from ..measure import QUICK, Effort
    from ..tasks import TASKS

    effort = QUICK if options.quick else Effort()
    failures = 0
    for case, task in (bar := tqdm(jobs, unit="task", disable=options.quiet or None)):
        bar.set_description(f"{case.name}, {task}")
        start, job = time.perf_counter(), {"case": case.name, "task": task}
        try:
            TASKS[task](Context(case, task, names, effort, options.threads, write, bar.set_postfix_str))
            write({"kind": "done", **job, "seconds": time.perf_counter() - start})
        except Exception as error:
            failures += 1
            traceback.print_exc()
            write({"kind": "failed", **job, "reason": repr(error)[:500]})
    return failures


def _print(run: str, out: Path) -> None:
    """The tables of this run; for searches also the ratio to faiss in the last run of the same command."""
    from ..tables import TO_FAISS, tabulate

    last: dict[Any, results.TaskRun] = {}
    for task in results.history([out]):
        same = (task.case, task.task, task.facts["command"])
        before, last[same] = last.get(same), task
        if task.facts["run"] == run:
            print(f"\n{task.case}, {task.task}\n{tabulate(task) if task.rows else 'nothing was measured'}")
            print("".join(f"left out: {skip['engine']}, {skip['reason']}\n" for skip in task.skips), end="")
            if before is not None and task.task in ("search", "flat"):
                cells = [{"engine": "ours", "nq": nq} for nq in task.values("nq")]
                told = [f"{TO_FAISS.text(before.rows, cell)} → {TO_FAISS.text(task.rows, cell)}" for cell in cells]
                print(f"ours / faiss, before ({before.facts['commit'][:7]}) → now: {', '.join(told)}")
    print(f"appended to {os.path.relpath(out)}")
