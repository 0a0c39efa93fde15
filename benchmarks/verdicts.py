"""Each target beside what was measured; a target without a measurement stays open."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from .cells import grid, middle
from .machine import bfloat16_units
from .results import TaskRun
from .tables.searching import auto_ratios
from .targets import TARGETS, Target

__all__ = ["figure", "table"]


def figure(target: Target, task: TaskRun) -> float | None:
    """The number that `target` speaks of, out of the rows of its task."""
    if target.task in ("search", "flat"):
        ratios = [task.ratio("qps", engine, nq=target.nq) for engine in _engines(target, task)]
        return max((ratio for ratio in ratios if ratio is not None), default=None)
    if target.task in ("train", "add"):
        return _ratio(task, target.kind or "seconds", ("ours", {}), ("faiss", {}))
    if target.task == "maintenance" and target.kind == "batches":
        return _ratio(task, "seconds", ("ours", {"what": "batches"}), ("ours", {"what": "one add"}))
    if target.task == "maintenance":
        return _ratio(task, "seconds", ("ours", {"what": "turns"}), ("faiss", {"what": "turns"}))
    if target.task == "auto":
        return max((ratio for _, _, ratio, _ in auto_ratios(task)), default=None)
    if target.task == "budgets":
        return _budgets(task, target.kind)
    if target.task == "memory":
        return _worst_scratch(task)
    shares = [row["agreement"] for row in task.rows if row["engine"].startswith("ours")]
    return min(shares, default=None)


def _engines(target: Target, task: TaskRun) -> tuple[str, ...]:
    """Whose speed counts. Beside the kernel `auto` may choose it: PyTorch's own is then the better of the two scans."""
    if target.native:
        return ("ours-native",)
    return ("ours-csr", "ours-matrix") if task.pick(engine="ours-native") else ("ours",)


def _ratio(
    task: TaskRun, name: str, mine: tuple[str, Mapping[str, str]], theirs: tuple[str, Mapping[str, str]]
) -> float | None:
    over, under = (middle(task.pick(engine=engine, **wanted), name) for engine, wanted in (mine, theirs))
    return over / under if over is not None and under else None


def _budgets(task: TaskRun, name: str | None) -> float | None:
    """At the largest batch: the recall of one budget, or the worst ratio of speed to the next larger one's."""
    rows = task.pick(nq=max(task.values("nq"), default=0))
    if name is not None:
        return next((row["recall"] for row in rows if row["engine"] == name), None)
    speeds = [row["qps"] for row in rows if row["engine"].startswith("budget ")]
    return min((one / next_one for one, next_one in pairwise(speeds)), default=None)


def _worst_scratch(task: TaskRun) -> float | None:
    ours = [row for row in task.rows if row["max_bytes"]]
    return max(((r["scratch_bytes"] - r["result_bytes"]) / r["max_bytes"] for r in ours), default=None)


def table(tasks: Mapping[tuple[str, str], TaskRun]) -> str:
    rows = []
    for target in TARGETS:
        task = tasks.get((target.case, target.task))
        if None not in (task, target.bfloat16) and bfloat16_units(task.facts["simd"]) != target.bfloat16:
            continue
        measured = figure(target, task) if task is not None else None
        bound = f"{'≥' if target.at_least else '≤'} {target.value:g}"
        rows.append([f"{target.case}: {target.what}", bound, *_verdict(target, measured)])
    return grid(["figure", "wanted", "measured", "verdict"], rows)


def _verdict(target: Target, measured: float | None) -> tuple[str, str]:
    if measured is None:
        return "–", "not measured"
    met = measured >= target.value if target.at_least else measured <= target.value
    missed_by = abs(measured / target.value - 1)
    return f"{measured:.4g}", "met" if met else f"missed by {missed_by:.1%}"
