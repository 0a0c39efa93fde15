"""Measure and append JSON lines: the plan, or the cases and tasks that are named.

Nothing heavy is imported before the number of threads is settled: thread pools are sized on first import.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import results
from ..cases import CASES, PLAN, QUICK, Case
from ..machine import add_threads, commit, describe, run_id, set_threads

__all__ = ["add_arguments", "add_common", "measure", "run"]

_BUSY = 0.5  # processes running besides this one
_Job = tuple[Case, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = sorted({task for planned in PLAN.values() for task in planned})
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="only this case (may be repeated)")
    parser.add_argument("--task", action="append", choices=tasks, help="only this task (may be repeated)")
    parser.add_argument("--list", action="store_true", help="only say what would be measured, and when it last was")
    parser.add_argument("--resume", action="store_true", help="leave out what this very commit has measured already")
    add_common(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    """What every command that measures can be told."""
    parser.add_argument(
        "--quick", action="store_true", help="ours and faiss, few repetitions, stored in quick.jsonl, not committed"
    )
    parser.add_argument("--engines", type=_comma, help="only these, with commas between them")
    parser.add_argument("--out", type=Path, help="the file to append to")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_threads(parser)


def run(options: argparse.Namespace) -> int:
    jobs = _jobs(options)
    last = results.latest([options.out or results.DEFAULT])
    if options.resume:
        done = {key for key, task in last.items() if task.facts["commit"] == commit()}
        jobs = [(case, task) for case, task in jobs if (case.name, task) not in done]
    if options.list:
        return _list(jobs, last)
    if not jobs:
        print("nothing is left to measure")
        return 0
    words = ["run", *(word for name in ("case", "task") for value in _given(options, name) for word in value)]
    return measure(jobs, options, words)


def _given(options: argparse.Namespace, name: str) -> list[tuple[str, str]]:
    return [(f"--{name}", value) for value in getattr(options, name) or ()]


def _jobs(options: argparse.Namespace) -> list[_Job]:
    if options.quick and not options.case and not options.task:
        quick = replace(CASES[QUICK.case], nqs=QUICK.nqs, truth_queries=QUICK.truth_queries)
        return [(quick, QUICK.task)]
    cases = options.case or [name for name in PLAN if not options.task or set(options.task) & set(PLAN[name])]
    jobs = []
    for name in cases:
        planned = PLAN.get(name, ("search",))
        # A task named beside a case is done whether planned or not; by itself it goes where it is planned.
        tasks = options.task if options.case and options.task else planned
        jobs += [(CASES[name], task) for task in tasks if not options.task or task in options.task]
    return jobs


def _list(jobs: Sequence[_Job], last: Mapping[tuple[str, str], results.TaskRun]) -> int:
    for case, task in jobs:
        told, done = "never", last.get((case.name, task))
        if done is not None:
            told = f"{done.facts['date'][:10]}, commit {done.facts['commit'][:7]}, {done.seconds:,.0f} s"
        print(f"{f'--case {case.name} --task {task}':42} {told}")
    return 0


def measure(
    jobs: Sequence[_Job], options: argparse.Namespace, words: list[str], values: Mapping[str, Any] | None = None
) -> int:
    """Do the jobs, append what they find, print it. `words` say again what was asked for.

    `values` are settings that the cases do not have; figures taken with some are stored, but stay out of the report.
    """
    set_threads(options.threads)
    from ..engines import LIBRARIES, missing, settle_native

    native = settle_native()
    asked = options.engines or (QUICK.engines if options.quick else tuple(LIBRARIES))
    unknown = [name for name in asked if name not in LIBRARIES]
    if unknown:
        raise SystemExit(f"unknown engine {unknown[0]!r}; there are {', '.join(LIBRARIES)}")
    skipped = missing(asked)
    for name, reason in skipped.items():
        print(f"skipping {name}: {reason}")
    names = tuple(name for name in asked if name not in skipped)
    if not names:
        raise SystemExit("no engine is left to measure")
    out = options.out or (results.QUICK if options.quick else results.DEFAULT)
    facts = describe(options.threads, [*words, *_settings(options)]) | {"native": native}
    if facts["load"] > _BUSY:
        print(f"the machine is busy (load {facts['load']:.1f}): figures taken now say little")
    run = run_id(facts)
    results.append(out, {"kind": "run", "schema": 1, "run": run, **facts, "skipped": skipped, "values": values or {}})
    failures = _do(jobs, names, options, run, out)
    _say(run, out)
    return 1 if failures else 0


def _do(jobs: Sequence[_Job], names: tuple[str, ...], options: argparse.Namespace, run: str, out: Path) -> int:
    """Do every job, each on its own: one that fails is told of and leaves the others to go on."""
    from tqdm import tqdm

    from ..context import Context
    from ..measure import Effort
    from ..tasks import TASKS

    effort = Effort.quick() if options.quick else Effort()
    failures = 0
    with tqdm(jobs, unit="task", disable=options.quiet) as bar:
        for case, task in bar:
            bar.set_description(f"{case.name}, {task}")

            def write(line: dict[str, Any]) -> None:
                results.append(out, {**line, "run": run})

            start = time.perf_counter()
            try:
                TASKS[task](Context(case, task, names, effort, options.threads, write, bar.set_postfix_str))
            except Exception as error:
                failures += 1
                traceback.print_exc()
                write({"kind": "failed", "case": case.name, "task": task, "reason": repr(error)[:500]})
                continue
            spent = time.perf_counter() - start
            write({"kind": "done", "case": case.name, "task": task, "seconds": spent})
    return failures


def _settings(options: argparse.Namespace) -> list[str]:
    """The common options that decide what is measured; where it is written to does not."""
    words = ["--quick"] if options.quick else []
    if options.engines:
        words += ["--engines", ",".join(options.engines)]
    return [*words, "--threads", str(options.threads)]


def _say(run: str, out: Path) -> None:
    from ..tables import plain

    finished = results.history([out])
    for task in (task for task in finished if task.facts["run"] == run):
        same = (task.case, task.task, task.facts["command"])
        before = [
            old
            for old in finished
            if old.facts["run"] != run and (old.case, old.task, old.facts["command"]) == same
        ]
        print(plain(task, before[-1] if before else None))
    print(f"appended to {os.path.relpath(out)}")


def _comma(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
