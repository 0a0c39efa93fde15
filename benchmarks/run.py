"""Measure and append JSON lines. `python -m benchmarks.run --help` lists cases, tasks and engines.

Nothing heavy is imported before the number of threads is settled: thread pools are sized on first import.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import results
from .cases import CASES, PLAN, QUICK, Case
from .machine import describe, run_id, set_threads

__all__ = ["main"]

_BUSY = 0.5  # processes running besides this one


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(arguments)
    set_threads(options.threads)
    from .engines import LIBRARIES, missing

    jobs = _jobs(options)
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
    facts = describe(options.threads, _what_was_asked(options))
    if facts["load"] > _BUSY:
        print(f"the machine is busy (load {facts['load']:.1f}): figures taken now say little")
    run = run_id(facts)
    results.append(out, {"kind": "run", "schema": 1, "run": run, **facts, "skipped": skipped})
    failures = _measure(jobs, names, options, run, out)
    _say(run, out)
    return 1 if failures else 0


def _measure(
    jobs: list[tuple[Case, str]], names: tuple[str, ...], options: argparse.Namespace, run: str, out: Path
) -> int:
    """Do every job, each on its own: one that fails is told of and leaves the others to go on."""
    from tqdm import tqdm

    from .context import Context
    from .measure import Effort
    from .tasks import TASKS

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


def _jobs(options: argparse.Namespace) -> list[tuple[Case, str]]:
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


def _what_was_asked(options: argparse.Namespace) -> list[str]:
    """The options that decide what is measured; where it is written to does not."""
    words = ["--quick"] if options.quick else []
    for name in ("case", "task"):
        words += [word for value in getattr(options, name) or () for word in (f"--{name}", value)]
    if options.engines:
        words += ["--engines", ",".join(options.engines)]
    return [*words, "--threads", str(options.threads)]


def _say(run: str, out: Path) -> None:
    from .tables import plain

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


def _parser() -> argparse.ArgumentParser:
    tasks = sorted({task for planned in PLAN.values() for task in planned})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="ours and faiss, few repetitions; by itself the headline, under a minute",
    )
    parser.add_argument(
        "--case", action="append", choices=sorted(CASES), help="only this case (may be repeated)"
    )
    parser.add_argument("--task", action="append", choices=tasks, help="only this task (may be repeated)")
    parser.add_argument("--engines", type=_comma, help="only these, with commas between them")
    parser.add_argument("--out", type=Path, help="the file to append to")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--threads",
        type=int,
        default=int(os.environ.get("OMP_NUM_THREADS", "2")),
        help="threads for every library (default: OMP_NUM_THREADS, or else 2)",
    )
    return parser


def _comma(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


if __name__ == "__main__":
    sys.exit(main())
