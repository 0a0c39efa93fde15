"""The figures: each function draws stored rows and returns the SVG. The same rows give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from torch_ivf_module import plotting

from .readme import SHOWN
from .results import TaskRun
from .tables.searching import auto_ratios

__all__ = ["auto", "growth", "headline", "lists", "recall", "speed"]

# Element ids are hashed with a salt of their own, text stays text; a white ground, also on a dark page.
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "benchmarks",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "savefig.facecolor": "white",
    }
)
# Okabe and Ito's colours, which colour-blind people can tell apart; a family has one, its members differ in line and
# marker, so that grey prints are read too.
_OURS, _FAISS, _TORCH_IVF, _TSS = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
_STYLES: dict[str, tuple[str, str, str]] = {
    "ours": (_OURS, "-", "o"),
    "ours-csr": (_OURS, "--", "s"),
    "ours-matrix": (_OURS, ":", "^"),
    "ours-native": (_OURS, "-.", "D"),
    "faiss": (_FAISS, "-", "o"),
    "faiss-lists": (_FAISS, "--", "s"),
    "torch-ivf": (_TORCH_IVF, "-", "o"),
    "torch-ivf-matrix": (_TORCH_IVF, ":", "^"),
    "torch-similarity-search": (_TSS, "-", "v"),
    "sklearn": ("#666666", "-", "x"),
    "hnswlib": ("#E69F00", "-", "P"),
    "usearch": ("#56B4E9", "-", "X"),
}
_STEPS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7")  # of a sweep that has no engines
_MISSED = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4)  # ticks of recall: 1 less these
_COMMAS = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _style(engine: str) -> dict[str, Any]:
    colour, line, marker = _STYLES[engine]
    front = engine in ("ours", "faiss")
    return {
        "color": colour,
        "ls": line,
        "marker": marker,
        "lw": 2.2 if front else 1.3,
        "ms": 4,
        "zorder": 3 if front else 2,
    }


def _svg(figure: Any, named: Any = None, by_height: bool = True) -> str:
    """The file; to the right of all panels the names of one panel's lines, in the order in which they end there."""
    figure.tight_layout()
    if named is not None:
        handles, labels = named.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: -handles[i].get_ydata()[-1] if by_height else i)
        shown = [handles[i] for i in order], [labels[i] for i in order]
        figure.legend(*shown, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False, handlelength=3)
    file = io.StringIO()
    figure.savefig(file, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def _batches(axis: Any, values: Sequence[float]) -> None:
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_COMMAS)


def _speeds(axis: Any, labelled: Sequence[float] = (1, 2, 5)) -> None:
    """A logarithmic axis, labelled at so many times each power of ten."""
    axis.set_major_locator(LogLocator(10, labelled))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_COMMAS)


def speed(task: TaskRun, title: str, engines: Sequence[str] | None = None) -> str:
    """Queries/s against nq, of the engines named or of all."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for engine in (engine for engine in task.engines() if engines is None or engine in engines):
        rows = sorted(task.pick(engine=engine), key=lambda row: row["nq"])
        nqs = [row["nq"] for row in rows]
        axes.loglog(nqs, [row["qps"] for row in rows], label=engine, **_style(engine))
        slow, fast = ([row["nq"] / row[name] for row in rows] for name in ("seconds_high", "seconds_low"))
        axes.fill_between(nqs, slow, fast, color=_STYLES[engine][0], alpha=0.15, lw=0)
    _batches(axes.xaxis, task.values("nq"))
    _speeds(axes.yaxis)
    axes.set(xlabel="queries in a batch", ylabel="queries/s (median; quartiles shaded)", title=title)
    axes.grid(alpha=0.3)
    return _svg(figure, axes)


def headline(task: TaskRun) -> str:
    """The chart of the READMEs: the engines that their table has."""
    row, threads = task.rows[0], task.facts["threads"]
    title = f"{row['nb']:,} vectors, {row['nlist']} lists, nprobe {row['nprobe']}, {threads} threads"
    return speed(task, title, SHOWN)


def recall(task: TaskRun, title: str) -> str:
    """Queries/s against recall, one panel a batch size; exhaustive engines are a level line.

    Where recall passes 0.95 its scale is logarithmic in what is missed, for the last percents are what costs.
    """
    nqs = task.values("nq")
    figure, panels = plt.subplots(1, len(nqs), figsize=(4.8 * len(nqs), 4.2), squeeze=False)
    best = max((row["recall"] for row in task.rows if row["knob"]), default=0.0)
    for axes, nq in zip(panels[0], nqs, strict=True):
        for engine in task.engines():
            rows = sorted(task.pick(engine=engine, nq=nq), key=lambda row: row["recall"])
            if not rows:
                continue
            if not rows[0]["knob"]:
                axes.axhline(rows[0]["qps"], label=f"{engine} (exact)", **_style(engine) | {"ls": "--", "marker": ""})
                continue
            at = [max(1 - row["recall"], _MISSED[-1]) if best > 0.95 else row["recall"] for row in rows]
            axes.plot(at, [row["qps"] for row in rows], label=engine, **_style(engine))
        if best > 0.95:
            axes.set_xscale("log")
            axes.invert_xaxis()
            axes.xaxis.set_major_locator(FixedLocator([step for step in _MISSED if step >= (1 - best) / 1.5]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{1 - value:g}"))
        axes.set(xlabel=f"recall@{task.rows[0]['k']}", ylabel="queries/s", title=f"{title}, nq {nq:,}", yscale="log")
        _speeds(axes.yaxis)
        axes.grid(alpha=0.3)
    return _svg(figure, panels[0][0])


def growth(tasks: Sequence[TaskRun], title: str) -> str:
    """Time per query against the number of base rows, one panel a batch size."""
    nqs = sorted({nq for task in tasks for nq in task.values("nq")})
    nbs = sorted({task.rows[0]["nb"] for task in tasks})
    figure, panels = plt.subplots(1, len(nqs), figsize=(3.6 * len(nqs), 3.8), squeeze=False)
    for axes, nq in zip(panels[0], nqs, strict=True):
        rows = [row for task in tasks for row in task.pick(nq=nq)]
        for engine in dict.fromkeys(row["engine"] for row in rows):
            mine = sorted((row["nb"], 1e6 * row["seconds"] / nq) for row in rows if row["engine"] == engine)
            axes.loglog(*zip(*mine, strict=True), label=engine, **_style(engine))
        _batches(axes.xaxis, nbs)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:,.0f}k"))
        _speeds(axes.yaxis, (1, 1.5, 2, 3, 5, 7))
        axes.set(xlabel="base rows", ylabel="µs a query", title=f"{title}, nq {nq:,}")
        axes.grid(alpha=0.3)
    return _svg(figure, panels[0][0])


def auto(tasks: Sequence[TaskRun]) -> str:
    """Time of auto over that of the best fixed mode, against nq; one panel a case, one line an nprobe."""
    figure, panels = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.6), squeeze=False, sharey=True)
    for axes, task in zip(panels[0], tasks, strict=True):
        ratios = auto_ratios(task)
        for step, nprobe in enumerate(task.values("nprobe")):
            line = [(nq, ratio) for visited, nq, ratio, _ in ratios if visited == nprobe]
            style = {"color": _STEPS[step % len(_STEPS)], "marker": "os^Dv"[step % 5], "ms": 4, "lw": 1.3}
            if line:
                axes.semilogx(*zip(*line, strict=True), label=f"nprobe {nprobe}", **style)
        axes.axhline(1.0, color="black", lw=0.8)
        axes.axhline(1.15, color="black", lw=0.8, ls=":")
        _batches(axes.xaxis, task.values("nq"))
        axes.set(xlabel="queries in a batch", title=task.case)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("time of auto / best fixed mode")
    return _svg(figure, panels[0][0], by_height=False)


def lists(task: TaskRun, title: str) -> str:
    """How long the lists are."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    plotting.plot_list_sizes(torch.tensor(task.rows[0]["sizes"]), axes)
    axes.set_title(title)
    return _svg(figure)
