"""`python -m tests.fuzz`: run random sequences until the time is over or an answer is wrong.

The last line counts what ran. A wrong answer or any error ends the run with exit code 1 and the shortest sequence of
calls that hypothesis finds for it, as a Python program: `--replay FILE` runs such a program, `--seed` the same search.
"""

from __future__ import annotations

import argparse
import itertools
import runpy
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.reporting import with_reporter
from hypothesis.stateful import run_state_machine_as_test
from tqdm import tqdm

from tests.fuzz.against_faiss import faiss
from tests.fuzz.machine import TALLY, Fuzz
from torch_ivf_module import native

STEPS = 25  # calls in a sequence
BATCH = 25  # sequences that share a seed
HEADER = "from tests.fuzz.machine import Fuzz\n\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parsed(arguments)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    build_kernel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if options.replay:
            runpy.run_path(str(options.replay))
            print(f"{options.replay}: no mismatch")
            return 0
        return fuzz(options)


def fuzz(options: argparse.Namespace) -> int:
    """Run batches of sequences, each with another seed, until a mismatch or the end."""
    began = time.monotonic()
    TALLY.cases = TALLY.operations = TALLY.comparisons = 0
    with tqdm(total=options.cases or round(options.seconds), unit=" cases" if options.cases else " s") as bar:
        for number in itertools.count(options.seed):
            batch = next_batch(options, time.monotonic() - began)
            if not batch:
                break
            bar.set_postfix(seed=number, **vars(TALLY))
            report = mismatch(number, batch)
            done = TALLY.cases if options.cases else int(time.monotonic() - began)
            bar.update(min(bar.total, done) - bar.n)
            if report:
                bar.close()
                print(f"{report}\n\nLooking for a shorter sequence, up to five minutes.\n", flush=True)
                print(f"{mismatch(number, batch, shrink=True)}\n\n{ran(began)}: a mismatch at --seed {number}")
                return 1
    print(f"{ran(began)}: no mismatch")
    return 0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to run (default 60)")
    parser.add_argument("--cases", type=int, help="run so many sequences instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first sequences (default 0)")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run the sequence that a report shows")
    return parser.parse_args(arguments)


def build_kernel() -> None:
    """Build the kernel before the first search, so that a sequence runs the same code every time."""
    try:
        native.build()
    except (ImportError, RuntimeError) as error:
        print(f"without the kernel: {error}", file=sys.stderr)


def next_batch(options: argparse.Namespace, spent: float) -> int:
    """How many sequences to run next, 0 to end."""
    if options.cases:
        return min(BATCH, max(0, options.cases - TALLY.cases))
    left, mean = options.seconds - spent, spent / max(1, TALLY.cases)
    if left <= 0:
        return 0
    return max(1, min(BATCH, int(left / mean))) if mean else BATCH


def mismatch(number: int, cases: int, *, shrink: bool = False) -> str | None:
    """Run `cases` sequences of one seed; a report of a mismatch, with `shrink` of the shortest sequence, or None."""
    lines: list[str] = []
    machine = seed(number)(type("Fuzz", (Fuzz,), {"__module__": Fuzz.__module__}))
    limits = settings(
        max_examples=cases,
        stateful_step_count=STEPS,
        deadline=None,
        database=None,
        verbosity=Verbosity.normal,
        derandomize=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    try:
        with with_reporter(lines.append):
            run_state_machine_as_test(machine, settings=limits)
    except Exception as error:
        steps = [line for note in (*lines, *getattr(error, "__notes__", ())) for line in note.splitlines()]
        calls = (step for step in steps if step.startswith(("state = ", "state.")))
        program = "\n".join(call for call in calls if call != "state.teardown()")
        return f"{''.join(traceback.format_exception(error))}\n# The sequence:\n\n{HEADER}{program}"
    return None


def ran(began: float) -> str:
    spent = time.monotonic() - began
    return f"{TALLY.cases} cases, {TALLY.operations} operations and {TALLY.comparisons} comparisons in {spent:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
