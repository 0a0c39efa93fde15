"""Score what search_mode="auto" chooses, and what it would choose with other constants or by a plain threshold.

The times of the fixed modes are those that the last `auto` task stored; only the choices are made anew, on the same
index. A cell is one batch size and one nprobe of one case. A rule's score is the weighted geometric mean, over all
cells, of the time of the mode it chooses over that of the fastest.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from .. import results
from ..cases import CASES, PLAN
from ..cells import grid
from ..machine import add_threads, set_threads
from ..results import TaskRun

__all__ = ["PRESETS", "Cell", "add_arguments", "run", "score"]

# The weight of a batch size. Either way four times the queries are worth half, or twice, as much.
PRESETS: dict[str, Callable[[int], float]] = {
    "latency": lambda nq: nq**-0.5,
    "throughput": lambda nq: nq**0.5,
    "even": lambda nq: 1.0,
}
_FACTORS = (0.5, 0.7, 1.4, 2.0)  # each constant of the cost model times each of these
_THRESHOLDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # visitors of a list on average, from which on lists are scanned
_NOW = "as it is"
_WRONG = 1.05  # a choice that takes so many times the fastest is told of


@dataclass
class Cell:
    case: str
    nq: int
    nprobe: int
    visitors: float  # of a list, on average
    seconds: dict[str, float]  # of each fixed mode
    asked: tuple[Any, ...]  # the arguments that the cost model was called with

    def cost(self, mode: str) -> float:
        """The time of a mode over that of the fastest."""
        return self.seconds[mode] / min(self.seconds.values())


Rule = Callable[[Cell], str]  # a cell's mode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    planned = [name for name, tasks in PLAN.items() if "auto" in tasks]
    parser.add_argument("--case", action="append", choices=sorted(CASES), help=f"default: {', '.join(planned)}")
    parser.add_argument("--preset", choices=PRESETS, default="even", help="which batch sizes count (default: even)")
    parser.add_argument("--weights", type=_weights, help="or of each batch size its weight: 1=4,64=1")
    parser.add_argument("--top", type=int, default=10, help="rules to show, best first (default: 10)")
    parser.add_argument("--file", type=Path, default=results.DEFAULT, help="default: benchmarks/benchmarks.jsonl")
    add_threads(parser)
    parser.set_defaults(planned=planned)


def _weights(text: str) -> dict[int, float]:
    pairs = [word.split("=") for word in text.split(",")]
    return {int(nq): float(weight) for nq, weight in pairs}


def run(options: argparse.Namespace) -> int:
    set_threads(options.threads)
    stored = results.latest([options.file])
    cells: list[Cell] = []
    for name in options.case or options.planned:
        if (name, "auto") in stored:
            cells += _cells(stored[name, "auto"], options.threads)
        else:
            print(f"{name} has not been measured: python -m benchmarks run --case {name} --task auto")
    weigh = PRESETS[options.preset] if options.weights is None else lambda nq: options.weights.get(nq, 0.0)
    if not any(weigh(cell.nq) for cell in cells):
        print("nothing to score")
        return 1
    rules = dict(_rules(cells))
    now = {id(cell): rules[_NOW](cell) for cell in cells}
    found = []
    for name, rule in rules.items():
        chosen = [rule(cell) for cell in cells]
        mean, worst = score(cells, chosen, weigh)
        other = sum(mode != now[id(cell)] for cell, mode in zip(cells, chosen, strict=True))
        found.append((mean, worst, name, other))
    _print(found, cells, now, options.top)
    return 0


def score(cells: list[Cell], chosen: list[str], weigh: Callable[[int], float]) -> tuple[float, float]:
    """The weighted geometric mean of the chosen modes' times over the fastest's, and the worst of those that count."""
    weights = [weigh(cell.nq) for cell in cells]
    costs = [cell.cost(mode) for cell, mode in zip(cells, chosen, strict=True)]
    logs = sum(weight * math.log(cost) for weight, cost in zip(weights, costs, strict=True) if weight)
    return math.exp(logs / sum(weights)), max(cost for weight, cost in zip(weights, costs, strict=True) if weight)


def _rules(cells: list[Cell]) -> Iterator[tuple[str, Rule]]:
    """The cost model as it is and with each constant changed, thresholds, and each mode always."""
    from torch_ivf_module.functional import cost

    def by_model(**changed: float) -> Rule:
        def choose(cell: Cell) -> str:
            with patch.object(cost, "_CPU", cost._CPU._replace(**changed)):
                return str(cost.cheapest(*cell.asked)[0])

        return choose

    yield _NOW, by_model()
    for name, value in cost._CPU._asdict().items():
        for factor in _FACTORS:
            yield f"{name} × {factor:g} = {factor * value:.3g}", by_model(**{name: factor * value})
    modes = dict.fromkeys(mode for cell in cells for mode in cell.seconds)
    if {"csr", "matrix"} <= modes.keys():
        for least in _THRESHOLDS:
            yield f"csr from {least:g} visitors a list on", partial(_by_threshold, least)
    for mode in modes:
        yield f"always {mode}", lambda cell, mode=mode: mode


def _by_threshold(least: float, cell: Cell) -> str:
    return "csr" if cell.visitors >= least else "matrix"


def _cells(task: TaskRun, threads: int) -> Iterator[Cell]:
    """What was measured, with what the cost model is asked there."""
    from ..context import Context
    from ..engines import IVF
    from ..measure import Effort
    from ..tasks.auto import HOPELESS

    case = CASES[task.case]
    context = Context(case, "auto", ("ours",), Effort.quick(), threads, lambda line: None, lambda note: None)
    engine = context.build_paired(IVF, "ours")["ours"]
    # Where there is a native kernel it is always taken; the model is asked where there is none.
    modes = [name.removeprefix("ours-") for name in task.engines() if name not in ("ours", "ours-native")]
    for nprobe in task.values("nprobe"):
        engine.set(nprobe)
        for nq in task.values("nq"):
            rows = {row["engine"].removeprefix("ours-"): row["seconds"] for row in task.pick(nprobe=nprobe, nq=nq)}
            seconds = {mode: rows[mode] for mode in modes if mode in rows}
            slowest = HOPELESS * min(seconds.values(), default=0)
            asked = _asked(engine, context.data.queries[:nq], case.k)
            if seconds and asked is not None:
                # What is hopelessly slow was not measured to the end.
                seconds = {mode: seconds.get(mode, slowest) for mode in modes}
                yield Cell(case.name, nq, nprobe, nq * nprobe / case.nlist, seconds, asked)


def _asked(engine: Any, queries: Any, k: int) -> tuple[Any, ...] | None:
    """The arguments with which a search asks the cost model, None if it does not."""
    from torch_ivf_module.functional import cost, search

    asked: list[tuple[Any, ...]] = []

    def listen(*arguments: Any) -> Any:
        asked.append(arguments)
        return cost.cheapest(*arguments)

    with patch.object(search, "cheapest", listen), patch.dict(os.environ, TORCH_IVF_NATIVE="0"):
        engine.search(engine.native(queries), k)
    return asked[0] if asked else None


def _print(found: list[tuple[float, float, str, int]], cells: list[Cell], now: dict[int, str], top: int) -> None:
    ordered = sorted(found, key=lambda rule: rule[:2])
    shown = ordered[:top] + [rule for rule in ordered[top:] if rule[2] == _NOW]
    rows = [
        [f"{1 + ordered.index(rule)}. {rule[2]}", f"{rule[0]:.3f}", f"{rule[1]:.2f}", f"{rule[3]} of {len(cells)}"]
        for rule in shown
    ]
    print(grid(["rule", "time / fastest", "worst", "chosen otherwise"], rows))
    wrong = [cell for cell in cells if cell.cost(now[id(cell)]) > _WRONG]
    for cell in sorted(wrong, key=lambda cell: -cell.cost(now[id(cell)])):
        best = min(cell.seconds, key=lambda mode: cell.seconds[mode])
        mode = now[id(cell)]
        print(f"{cell.case}, nprobe {cell.nprobe}, nq {cell.nq:,}: {mode} takes {cell.cost(mode):.2f} × {best}")
