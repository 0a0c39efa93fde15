"""The plots: each function draws stored rows and returns the SVG. The same rows give the same bytes."""

import io
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from .cases import DATA
from .page import plot_file
from .results import TaskRun, Tasks
from .tables import TABLES

# Reproducible element ids, text as text, a white background also on a dark page.
_SVG = {"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "savefig.facecolor": "white"}
_STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
matplotlib.rcParams.update(_SVG | _STYLE | {"axes.grid": True, "grid.alpha": 0.3})
# Okabe and Ito's colours, which colour-blind people can tell apart; the engines of a library have one colour and
# differ in line and marker, so that grey prints are read too.
_STYLES: dict[str, tuple[str, str, str]] = {
    "ours": ("#D55E00", "-", "o"),
    "ours-float": ("#D55E00", "-.", "D"),
    "ours-csr": ("#D55E00", "--", "s"),
    "ours-matrix": ("#D55E00", ":", "^"),
    "faiss": ("#0072B2", "-", "o"),
    "faiss-lists": ("#0072B2", "--", "s"),
    "torch-ivf": ("#009E73", "-", "o"),
    "ours-triton": ("#CC79A7", "-", "o"),
    "matmul": ("#000000", ":", "x"),
    "hnswlib": ("#777777", "-", "^"),
    "ours-float16": ("#D55E00", "--", "v"),
    "ours-sq8": ("#E69F00", "-", "D"),
    "ours-sq8-codes": ("#E69F00", "--", "d"),
    "ours-sq4": ("#E69F00", ":", "<"),
    "faiss-sq8": ("#56B4E9", "-", "D"),
    "faiss-sq4": ("#56B4E9", ":", "<"),
    "faiss-pq": ("#000000", "-", "X"),
    "faiss-pq-50": ("#000000", ":", "x"),
    "scann": ("#CC79A7", "-", "P"),
    "scann-50": ("#CC79A7", ":", "p"),
}
_LIBRARIES = {  # the names of engines in the chart of the READMEs
    "ours": "torch_ivf_module",
    "ours-float": "torch_ivf_module, codes=None",
    "ours-csr": "torch_ivf_module, no kernel",
    "faiss": "faiss-cpu",
}
_MISSED = (0.5, 0.2, 0.1, 0.05, 0.01, 1e-3, 1e-4)  # ticks of recall: 1 minus these


def _style(engine: str) -> dict[str, Any]:
    front = {"lw": 2.2, "zorder": 3} if engine in ("ours", "faiss") else {"lw": 1.3, "zorder": 2}
    return {**dict(zip(("color", "ls", "marker"), _STYLES[engine], strict=True)), "label": engine, "ms": 4, **front}


def svg(figure: Any, named: Any = None) -> str:
    """The file; to the right of all panels the names of one panel's lines, in the order in which they end there."""
    figure.tight_layout()
    if named is not None:
        lines = list(zip(*named.get_legend_handles_labels(), strict=True))
        lines.sort(key=lambda pair: -pair[0].get_ydata()[-1])
        place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "fontsize": 8, "frameon": False, "handlelength": 3}
        figure.legend(*zip(*lines, strict=True), **place)
    figure.savefig(file := io.StringIO(), format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _ticks(axis: Any, at: Any, text: Any = lambda value: f"{value:,.0f}" if value >= 1 else f"{value:g}") -> None:
    axis.set_major_locator(at)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def speed(task: TaskRun, title: str) -> str:
    """Queries/s against nq."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    _speed(axes, task, task.engines(), title)
    return svg(figure, axes)


def headline(tasks: list[TaskRun]) -> str:
    """Queries/s against nq, a panel for each data set, for the READMEs."""
    figure, panels = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 3.8), squeeze=False)
    for axes, task in zip(panels[0], tasks, strict=True):
        rows = "{nb:,} vectors, {nlist} lists, nprobe {nprobe}".format(**task.rows[0])
        engines = [name for name in task.engines() if name in _LIBRARIES]
        _speed(axes, task, engines, f"{DATA[task.case]}: {rows}", _LIBRARIES)
    facts = tasks[0].facts
    figure.suptitle(f"{facts['cpu']}, {facts['threads']} threads, {facts['date'][:10]}", fontsize=9)
    return svg(figure, panels[0, 0])


def _speed(axes: Any, task: TaskRun, engines: Iterable[str], title: str, words: Mapping[str, str] = {}) -> None:
    for engine in engines:
        rows = sorted(task.pick(engine=engine), key=lambda row: row["nq"])
        nqs = [row["nq"] for row in rows]
        axes.loglog(nqs, [row["qps"] for row in rows], **_style(engine) | {"label": words.get(engine, engine)})
        slow, fast = ([row["nq"] / row[name] for row in rows] for name in ("seconds_high", "seconds_low"))
        axes.fill_between(nqs, slow, fast, color=_STYLES[engine][0], alpha=0.15, lw=0)
    _ticks(axes.xaxis, FixedLocator(task.values("nq")))
    _ticks(axes.yaxis, LogLocator(10, (1, 2, 5)))
    axes.set(xlabel="queries in a batch", ylabel="queries/s (median; quartiles shaded)", title=title)


def recall(task: TaskRun, title: str) -> str:
    """Queries/s against recall, one panel per batch size, with bytes per vector in the names if they differ. Where
    recall exceeds 0.95 its scale is logarithmic in 1 - recall, to separate the last percents."""
    nqs, best = task.values("nq"), max(row["recall"] for row in task.rows)
    figure, panels = plt.subplots(1, len(nqs), figsize=(4.8 * len(nqs), 4.2), squeeze=False)
    for axes, nq in zip(panels[0], nqs, strict=True):
        for engine in task.engines():
            rows = sorted(task.pick(engine=engine, nq=nq), key=lambda row: row["recall"])
            if rows:
                size = {"label": f"{engine}, {rows[0]['bytes']:.0f} bytes"} if "bytes" in rows[0] else {}
                at = [max(1 - row["recall"], _MISSED[-1]) if best > 0.95 else row["recall"] for row in rows]
                axes.plot(at, [row["qps"] for row in rows], **_style(engine) | size)
        if best > 0.95:
            axes.set_xscale("log")
            axes.invert_xaxis()
            shown = [step for step in _MISSED if step >= (1 - best) / 1.5]
            _ticks(axes.xaxis, FixedLocator(shown), lambda value: f"{1 - value:g}")
        axes.set(xlabel=f"recall@{task.rows[0]['k']}", ylabel="queries/s", title=f"{title}, nq {nq:,}", yscale="log")
        _ticks(axes.yaxis, LogLocator(10, (1, 2, 5)))
    return svg(figure, panels[0, 0])


def plots(tasks: Tasks) -> dict[str, Callable[[], str]]:
    """The files in docs/img/ and what draws each."""
    kinds, drawn = {"speed": speed, "recall": recall}, {}
    for (case, name), task in tasks.items():
        if name in TABLES and TABLES[name].plot is not None and not case.startswith("growth-"):
            drawn[plot_file(task)] = partial(kinds[TABLES[name].plot], task, f"{case}, {name}")
    if ("headline", "search") in tasks:
        shown = [tasks[case, "search"] for case in DATA if (case, "search") in tasks]
        drawn["headline.svg"] = partial(headline, shown)
    return drawn
