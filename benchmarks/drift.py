"""`python -m benchmarks.drift measure`: an index that grows tenfold while its vectors change, kept up in several ways.
It appends to drift.jsonl. `python -m benchmarks.drift report` writes the tables of docs/drift.md and its plot from it.

N vectors, L lists, d dim, Q queries, k results.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_ivf_module import IndexIVFFlat, SearchParams, from_faiss
from torch_ivf_module.index.rebalancing import Rebalanced

from . import machine
from .drift_data import DATA, K, truth_of
from .tables import NONE, grid

STORED = Path(__file__).with_name("drift.jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "drift.md"
PLOT = PAGE.parent / "img" / "drift.svg"
_MARKED = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)
STEPS = (1, 2, 4, 6, 8, 10)  # sizes at which recall is measured, in tenths of N
READ = (0.01, 0.02, 0.04, 0.08)  # parts of the rows that a query reads
BATCH, UPDATES, UPDATED = 500, 200, 100  # rows of an add; updates, and rows of each
NAMES = {
    "never": "no change of lists",
    "faiss": "faiss, no change of lists",
    "auto 1.5": "`auto_rebalance=1.5`",
    "auto 1": "`auto_rebalance=1`",
    "retrain": "`retrain()` at each point",
    "new": "trained anew at each point",
}
Line = dict[str, Any]


def recall_at(index: Any, truth: Tensor, queries: Tensor) -> list[float | None]:
    """recall@10 if a query reads READ of the rows on average: interpolated between numbers of probed lists,
    None where one list has more rows.

    A search finds those of the true results (Q, k) that are in the lists that it probes.
    """
    sizes, ids = index.list_sizes(), index.list_ids
    lists = torch.empty_like(ids).scatter_(0, ids, torch.repeat_interleave(torch.arange(index.nlist), sizes))
    order = torch.cdist(queries, index.centroids).argsort(1)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(index.nlist).expand_as(order))
    rows = sizes[order].cumsum(1).double().mean(0)
    found = torch.bincount(rank.gather(1, lists[truth]).flatten(), minlength=index.nlist).cumsum(0) / truth.numel()
    answers = index.search(queries, K, params=SearchParams(nprobe=8))[1]
    hits = (answers[:, :, None] == truth[:, None]).any(2).double().mean()
    assert abs(hits - found[7]) < 1e-3, "the lists that a search reads are not those assumed here"
    values = np.interp([part * len(ids) for part in READ], rows, found, left=np.nan).tolist()
    return [None if np.isnan(value) else value for value in values]


class Ours(IndexIVFFlat):
    """An index of this library, and the reports of its calls of `rebalance`."""

    def __init__(self, x: Tensor, nlist: int, auto: float | None = None) -> None:
        super().__init__(x.shape[1], nlist=nlist, nprobe=8, auto_rebalance=auto)
        self.reports: list[Rebalanced] = []
        self.train(x)

    def rebalance(self, **settings: int) -> Rebalanced:
        self.reports.append(super().rebalance(**settings))
        return self.reports[-1]


class Faiss:
    """The same in faiss."""

    def __init__(self, x: Tensor, nlist: int, auto: None = None) -> None:
        import faiss

        self.index = faiss.IndexIVFFlat(faiss.IndexFlatL2(x.shape[1]), x.shape[1], nlist)
        self.index.train(x.numpy())
        self.reports: list[Rebalanced] = []

    def add(self, x: Tensor) -> None:
        self.index.add(x.numpy())

    def update(self, ids: Tensor, x: Tensor) -> None:
        self.index.remove_ids(ids.numpy())
        self.index.add_with_ids(x.numpy(), ids.numpy())


def timed(call: Callable[..., object], *arguments: object) -> float:
    begin = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begin


def latencies(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: of half, of 99% and of all calls at most."""
    return dict(zip(("p50", "p99", "max"), (1e3 * np.percentile(seconds, (50, 99, 100))).tolist(), strict=True))


def grown(way: str, x: Tensor, nlist: int, truths: dict[int, tuple[Tensor, Tensor]]) -> Iterator[Line]:
    """The index at each of STEPS, and how long `add` and then `update` took."""
    n, first = x.shape[0], x.shape[0] // 10
    auto = float(way.split()[1]) if way.startswith("auto") else None
    engine: Any = (Faiss if way == "faiss" else Ours)(x[:first], nlist, auto)
    adds, extra, moved, begun = [], 0.0, 0, 0
    for step in STEPS:
        for part in x[begun : step * first].split(BATCH):
            adds.append(timed(engine.add, part))
        begun, seconds = step * first, time.perf_counter()
        if way == "retrain" and step > 1:
            moved += engine.retrain().moved
        elif way == "new" and step > 1:
            engine = Ours(x[:begun], nlist)
            engine.add(x[:begun])
        extra += time.perf_counter() - seconds
        index = from_faiss(engine.index) if way == "faiss" else engine
        yield {"tenths": step, "recall": recall_at(index, *truths[step]), "imbalance": index.imbalance_factor()}
    reports = list(engine.reports)
    moved += sum(report.moved for report in reports)
    line: Line = {"add": latencies(adds), "seconds": sum(adds) + extra, "moved": moved / n}
    line |= {"calls": len(reports), "read": sum(report.read for report in reports) / n}
    if way not in ("retrain", "new"):
        generator = torch.Generator().manual_seed(1)
        chosen = torch.randperm(n, generator=generator)[: UPDATES * UPDATED].split(UPDATED)
        rows = x[-n // 10 :][torch.randint(n // 10, (UPDATES * UPDATED,), generator=generator)].split(UPDATED)
        line["update"] = latencies([timed(engine.update, *both) for both in zip(chosen, rows, strict=False)])
    yield line


def measure(options: argparse.Namespace) -> None:
    machine.set_threads(options.threads)
    facts = machine.describe(options.threads, "drift measure")
    for data in options.data.split(","):
        x = DATA[data](options.rows)
        truths = {step: truth_of(x[: step * (options.rows // 10)]) for step in STEPS}
        for way in options.ways.split(","):
            line: Line = {"data": data, "way": way, "n": x.shape[0], "d": x.shape[1], "nlist": options.nlist}
            *steps, total = grown(way, x, options.nlist, truths)
            line |= {"steps": steps, **total, **{name: facts[name] for name in ("cpu", "threads", "date", "commit")}}
            print(json.dumps(line), flush=True)
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def lines(path: Path = STORED) -> list[Line]:
    """What was measured last, of each data set and way."""
    stored = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    last = {(line["data"], line["way"]): line for line in stored}
    return [last[data, way] for data in DATA for way in NAMES if (data, way) in last]


def recalls(measured: list[Line]) -> str:
    """A table of recall after the growth."""
    head = ["vectors", "", *(f"{part:.0%} of the rows" for part in READ), "imbalance"]
    rows = []
    for line in measured:
        end = line["steps"][-1]
        found = [NONE if value is None else f"{value:.4f}" for value in end["recall"]]
        rows.append([_vectors(line), NAMES[line["way"]], *found, f"{end['imbalance']:.2f}"])
    return grid(head, rows)


def costs(measured: list[Line]) -> str:
    """A table of what it took."""
    head = ["vectors", "", "add: p50, p99, max ms", "update: p50, p99, max ms", "all adds and training, s"]
    head += ["calls", "rows moved / N", "rows read / N"]

    def ms(values: dict[str, float] | None) -> str:
        return NONE if values is None else ", ".join(f"{value:.3g}" for value in values.values())

    def row(line: Line) -> list[str]:
        calls, read = (str(line["calls"]), f"{line['read']:.2f}") if line["calls"] else (NONE, NONE)
        times = [ms(line.get("add")), ms(line.get("update")), f"{line['seconds']:.1f}" if "seconds" in line else NONE]
        return [_vectors(line), NAMES[line["way"]], *times, calls, f"{line['moved']:.2f}", read]

    where = f"{measured[0]['cpu']}, threads: {measured[0]['threads']}; {measured[0]['nlist']} lists."
    return f"{grid(head, (row(line) for line in measured if line['way'] != 'new'))}\n\n{where}"


def _vectors(line: Line) -> str:
    return f"{line['data']}, {line['n']:,} × {line['d']}"


def plot(measured: list[Line]) -> str:
    """Recall over growth where a query reads 4% of the rows: one panel per data set."""
    from .plots import plt, svg

    figure, panels = plt.subplots(1, len(DATA), figsize=(9.6, 3.8), squeeze=False)
    for axes, data in zip(panels[0], DATA, strict=True):
        for line in (line for line in measured if line["data"] == data):
            at, values = zip(*((step["tenths"], step["recall"][2] or np.nan) for step in line["steps"]), strict=True)
            label, style = NAMES[line["way"]].replace("`", ""), "--" if line["way"] == "faiss" else "-"
            axes.plot(at, values, label=label, marker="o", ms=4, ls=style)
        axes.set(xlabel="vectors, relative to those of the training", ylabel="recall@10", title=data)
    return svg(figure, panels[0, 0])


def page(text: str, measured: list[Line]) -> str:
    """The text of the page with the tables of what was measured."""
    tables = {"recalls": recalls, "costs": costs}
    return _MARKED.sub(lambda match: f"{match[1]}\n{tables[match[2]](measured)}\n\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=("measure", "report"))
    parser.add_argument("--rows", type=int, default=200_000, help="vectors at the end (default: 200,000)")
    parser.add_argument("--nlist", type=int, default=512)
    parser.add_argument("--data", default=",".join(DATA))
    parser.add_argument("--ways", default=",".join(NAMES))
    parser.add_argument("--results", type=Path, default=STORED)
    machine.add_arguments(parser)
    options = parser.parse_args()
    if options.action == "measure":
        measure(options)
        return
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), lines()), encoding="utf-8")
    PLOT.write_text(plot(lines()), encoding="utf-8")


if __name__ == "__main__":
    main()
