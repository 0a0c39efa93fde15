"""Score what search_mode="auto" chooses without a kernel, and what it would choose with other constants or rules.

The times of the fixed modes are those that the last `auto` task stored; only the choices are made again, on the same
index. A cell is one batch size and one nprobe of one case. A rule's score is the weighted geometric mean, over all
cells, of the time of the mode it chooses over that of the fastest.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch_ivf_module import native
from torch_ivf_module.functional import cost, strategies

from .. import machine, results
from ..cases import CASES, PLAN
from ..context import Context
from ..measure import QUICK
from ..tables import grid
from ..tasks.params import FIXED, HOPELESS

# The weight of a batch size: four times the queries count half, or twice, as much.
PRESETS = {"latency": lambda nq: nq**-0.5, "throughput": lambda nq: nq**0.5, "even": lambda nq: 1.0}
_FACTORS = (0.5, 0.7, 1.4, 2.0)  # each constant of the cost model times each of these
_THRESHOLDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # queries that probe a list, on average
_NOW = "as it is"
_PLANNED = [name for name, tasks in PLAN.items() if "auto" in tasks]


@dataclass
class Cell:
    name: str
    nq: int
    per_list: float  # queries that probe a list, on average
    seconds: dict[str, float]  # of each fixed mode
    arguments: tuple[Any, ...]  # those of the cost model's call

    def cost(self, mode: str) -> float:
        """The time of a mode over that of the fastest."""
        return self.seconds[mode] / min(self.seconds.values())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--case", action="append", choices=sorted(CASES), help=f"default: {', '.join(_PLANNED)}")
    option("--preset", choices=PRESETS, default="even", help="which batch sizes count (default: even)")
    option("--weights", type=re.compile(r"(\d+)=([\d.]+)").findall, help="or that of each batch size: 1=4,64=1")
    option("--top", type=int, default=10, help="rules to show, best first (default: 10)")
    option("--file", type=Path, default=results.DEFAULT, help="default: benchmarks/benchmarks.jsonl")
    machine.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    machine.set_threads(options.threads)
    stored, cells = results.latest([options.file]), []
    for name in options.case or _PLANNED:
        cells += _cells(stored[name, "auto"], options.threads) if (name, "auto") in stored else ()
    given = {int(nq): float(weight) for nq, weight in options.weights or ()}
    weigh = (lambda nq: given.get(nq, 0.0)) if given else PRESETS[options.preset]
    if not any(weigh(cell.nq) for cell in cells):
        print("nothing to score")
        return 1
    chosen = {name: [rule(cell) for cell in cells] for name, rule in _rules()}
    found, rows = sorted((*score(cells, modes, weigh), name) for name, modes in chosen.items()), []
    for place, (mean, worst, name) in enumerate(found, 1):
        if place <= options.top or name == _NOW:
            rows.append([f"{place}. {name}", f"{mean:.3f}", f"{worst:.2f}"])
    print(grid(["rule", "time / fastest", "worst"], rows))
    return 0


def score(cells: list[Cell], chosen: list[str], weigh: Callable[[int], float]) -> tuple[float, float]:
    """The weighted geometric mean of the chosen modes' times over the fastest's, and the worst of those that count."""
    pairs = [(weigh(cell.nq), cell.cost(mode)) for cell, mode in zip(cells, chosen, strict=True) if weigh(cell.nq)]
    logs = sum(weight * math.log(cost) for weight, cost in pairs)
    return math.exp(logs / sum(weight for weight, _ in pairs)), max(cost for _, cost in pairs)


def _rules() -> Iterator[tuple[str, Callable[[Cell], str]]]:
    """The cost model as it is and with each constant changed, thresholds, and each mode always."""

    def choose(cell: Cell, **changed: float) -> str:
        with patch.object(cost, "_CPU", cost._CPU._replace(**changed)):
            return str(cost.cheapest(*cell.arguments)[0])

    yield _NOW, choose
    for name, value in cost._CPU._asdict().items():
        for new in (factor * value for factor in _FACTORS):
            yield f"{name} × {new / value:g} = {new:.3g}", lambda cell, name=name, new=new: choose(cell, **{name: new})
    for least in _THRESHOLDS:
        yield f"csr from {least:g} queries per list", lambda cell, t=least: "csr" if cell.per_list >= t else "matrix"
    yield from (("always csr", lambda cell: "csr"), ("always matrix", lambda cell: "matrix"))


def _cells(task: results.TaskRun, threads: int) -> Iterator[Cell]:
    """What was measured, with the arguments of the cost model there; nothing where it is not called."""
    case = CASES[task.case]
    context = Context(case, "auto", ("ours",), QUICK, threads, lambda line: None, lambda note: None)
    engine = context.build_paired("ours")["ours"]
    for nprobe in task.values("nprobe"):
        engine.set(nprobe)
        for nq in task.values("nq"):
            found = {row["engine"]: row["seconds"] for row in task.pick(nprobe=nprobe, nq=nq)}
            measured = [found[name] for name in FIXED if name in found]
            with patch.object(strategies, "cheapest", wraps=cost.cheapest) as model, native.disabled():
                engine.search(engine.convert(context.data.queries[:nq]), case.k)
            if model.called and measured:  # a mode that was hopelessly slow was not timed
                times = {name.removeprefix("ours-"): found.get(name, HOPELESS * min(measured)) for name in FIXED}
                name = f"{case.name}, nprobe {nprobe}, nq {nq:,}"
                yield Cell(name, nq, nq * nprobe / case.nlist, times, model.call_args.args)
