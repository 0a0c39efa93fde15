"""The figures, as SVG; each function draws stored rows and returns whether there was anything to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .engines import LIBRARIES
from .results import TaskRun
from .tables import auto_ratios

__all__ = ["auto", "growth", "recall", "speed"]

# The same figure from the same rows is the same file.
matplotlib.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 9})
_COLOURS = {name: plt.get_cmap("tab20")(2 * i % 20 + i // 10) for i, name in enumerate(LIBRARIES)}
_COMMAS = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _style(engine: str) -> dict[str, Any]:
    ours = engine == "ours"
    dashes = "-" if engine in ("ours", "faiss") else "--"
    return {"color": _COLOURS[engine], "lw": 2.2 if ours else 1.3, "ls": dashes, "marker": "o", "ms": 3.5}


def _save(figure: Any, path: Path, named: Any) -> None:
    """Write the file, with the names of one panel's lines to the right of all panels."""
    figure.tight_layout()
    figure.legend(
        *named.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _log_axis(axis: Any, values: Sequence[float]) -> None:
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(_COMMAS)


def speed(task: TaskRun, title: str, path: Path) -> None:
    """Queries/s against nq."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    for engine in task.engines():
        rows = sorted(task.pick(engine=engine), key=lambda row: row["nq"])
        nqs = [row["nq"] for row in rows]
        axes.loglog(nqs, [row["qps"] for row in rows], label=engine, **_style(engine))
        slow, fast = ([row["nq"] / row[name] for row in rows] for name in ("seconds_high", "seconds_low"))
        axes.fill_between(nqs, slow, fast, color=_COLOURS[engine], alpha=0.15, lw=0)
    _log_axis(axes.xaxis, task.values("nq"))
    axes.yaxis.set_major_formatter(_COMMAS)
    axes.set(xlabel="queries in a batch", ylabel="queries/s (median, quartiles shaded)", title=title)
    axes.grid(alpha=0.3)
    _save(figure, path, axes)


def recall(task: TaskRun, title: str, path: Path) -> None:
    """Queries/s against recall, one panel a batch size."""
    nqs = task.values("nq")
    figure, panels = plt.subplots(1, len(nqs), figsize=(4.8 * len(nqs), 4.0), squeeze=False)
    for axes, nq in zip(panels[0], nqs, strict=True):
        for engine in task.engines():
            rows = sorted(task.pick(engine=engine, nq=nq), key=lambda row: row["recall"])
            axes.semilogy(
                [r["recall"] for r in rows], [r["qps"] for r in rows], label=engine, **_style(engine)
            )
        axes.yaxis.set_major_formatter(_COMMAS)
        axes.set(xlabel=f"recall@{task.rows[0]['k']}", ylabel="queries/s", title=f"{title}, nq {nq:,}")
        axes.grid(alpha=0.3)
    _save(figure, path, panels[0][0])


def growth(tasks: Sequence[TaskRun], title: str, path: Path) -> None:
    """Time per query against the number of base rows, one panel a batch size."""
    nqs = sorted({nq for task in tasks for nq in task.values("nq")})
    nbs = sorted({task.rows[0]["nb"] for task in tasks})
    figure, panels = plt.subplots(1, len(nqs), figsize=(3.6 * len(nqs), 3.8), squeeze=False)
    for axes, nq in zip(panels[0], nqs, strict=True):
        rows = [row for task in tasks for row in task.pick(nq=nq)]
        for engine in dict.fromkeys(row["engine"] for row in rows):
            mine = sorted((row["nb"], 1e6 * row["seconds"] / nq) for row in rows if row["engine"] == engine)
            axes.loglog(*zip(*mine, strict=True), label=engine, **_style(engine))
        _log_axis(axes.xaxis, nbs)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:,.0f}k"))
        axes.yaxis.set_major_formatter(_COMMAS)
        axes.set(xlabel="base rows", ylabel="µs a query", title=f"{title}, nq {nq:,}")
        axes.grid(alpha=0.3)
    _save(figure, path, panels[0][0])


def auto(tasks: Sequence[TaskRun], path: Path) -> None:
    """Time of auto over that of the best fixed mode, against nq; one panel a case, one line an nprobe."""
    figure, panels = plt.subplots(1, len(tasks), figsize=(3.6 * len(tasks), 3.6), squeeze=False, sharey=True)
    for axes, task in zip(panels[0], tasks, strict=True):
        ratios = auto_ratios(task)
        for nprobe in task.values("nprobe"):
            line = [(nq, ratio) for visited, nq, ratio, _ in ratios if visited == nprobe]
            if line:
                axes.semilogx(*zip(*line, strict=True), marker="o", ms=3.5, lw=1.3, label=f"nprobe {nprobe}")
        axes.axhline(1.0, color="black", lw=0.8)
        axes.axhline(1.15, color="black", lw=0.8, ls=":")
        _log_axis(axes.xaxis, task.values("nq"))
        axes.set(xlabel="queries in a batch", title=task.case)
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("time of auto / best fixed mode")
    _save(figure, path, panels[0][0])
