"""Where the time of a search goes: its functions under torch.profiler, folded into a few phases.

The phases are put around the library's functions from here, so that a search which is not profiled pays nothing.
"""

from __future__ import annotations

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, record_function

from torch_ivf_module.native.strategy import NativeKernel

from ..context import Context
from ..engines import IVF, Variant
from ..measure import timed

__all__ = ["PHASES", "run"]

# The module whose name it is called by, the function, the phase. Inside a phase no other begins.
PHASES = (
    ("functional.search", "probed_lists", "probe"),
    ("functional.search", "cheapest", "choice of the scan"),
    ("functional.scan_lists", "tasks_of", "tasks"),
    ("functional.scan_lists", "group_maxima", "products"),
    ("functional.scan_lists", "survivors", "selection"),
    ("functional.scan_lists", "best_rows", "re-scoring"),
    ("functional.scan_queries", "candidate_rows", "tasks"),
    ("functional.scan_queries", "score_rows", "products"),
    ("functional.scan_queries", "best_positions", "selection"),
    ("functional.search", "rescore", "re-scoring"),
    ("functional.search", "_merge", "merge"),
    ("index.base", "lookup", "lookup"),
)
_ENGINES = ("ours", "ours-csr", "ours-matrix", "ours-native")
_KERNEL = "products and selection"  # of the native kernel, which does both at once
_WHOLE, _OTHER = "search", "other"
_BEFORE, _AFTER = ("probe", "choice of the scan", "tasks", "products"), ("selection", "re-scoring", "merge", "lookup")
_ORDER = (*_BEFORE, _KERNEL, *_AFTER, _OTHER)
_MARK = "phase: "  # so that no operator has the name of a phase
_OPERATORS = 3  # named beside each phase
_SLOWEST = 20.0  # seconds: a longer search has more events than anybody wants to wait for


def run(ctx: Context) -> None:
    for name, engine in ctx.build_paired(IVF, *_ENGINES).items():
        engine.set(ctx.case.nprobe)
        native = engine.native(ctx.data.queries)
        for nq in (nq for nq in ctx.case.profile_nqs if nq <= len(native)):
            ctx.note(f"{name}, nq {nq:,}")
            engine.search(native[:nq], ctx.case.k)
            alone = timed(lambda search=engine.search, x=native[:nq]: search(x, ctx.case.k))[0]
            if alone > _SLOWEST:
                ctx.skip(name, f"one call takes {alone:.0f} s", nq=nq)
                break
            for phase, seconds, operators in _folded(engine, native[:nq], ctx.case.k):
                found = {"phase": phase, "seconds": seconds, "operators": operators, "alone": alone}
                ctx.row(name, nq=nq, k=ctx.case.k, nprobe=ctx.case.nprobe, **found)


def _folded(engine: Variant, x: Any, k: int) -> Iterator[tuple[str, float, list[str]]]:
    """Each phase of one search, its seconds, and the operators that take most of it; the whole search comes last."""
    for _ in range(2):  # the first profile of a process also sets the profiler up
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile, _phases(), _record(_WHOLE):
            engine.search(x, k)
    seconds: Counter[str] = Counter()
    operators: dict[str, Counter[str]] = {}
    for event in profile.events():
        if event.name.startswith(_MARK):
            phase = event.name.removeprefix(_MARK)
            seconds[phase] += event.cpu_time_total / 1e6
            _add_operators(event, operators.setdefault(phase, Counter()))
    whole = seconds.pop(_WHOLE)
    seconds[_OTHER] = whole - sum(seconds.values())
    operators[_OTHER] = operators.pop(_WHOLE)
    for phase in _ORDER:
        if phase in seconds:
            yield phase, seconds[phase], [name for name, _ in operators[phase].most_common(_OPERATORS)]
    yield _WHOLE, whole, []


def _add_operators(event: Any, found: Counter[str]) -> None:
    """The own time of every operator below an event, those of its phases left out."""
    for child in event.cpu_children:
        if not child.name.startswith(_MARK):
            found[child.name.removeprefix("aten::")] += child.self_cpu_time_total
            _add_operators(child, found)


@contextmanager
def _phases() -> Iterator[None]:
    """While it lasts, every function of PHASES is recorded under the name of its phase."""
    inside: list[str] = []
    with ExitStack() as stack:
        for where, name, phase in PHASES:
            module = importlib.import_module(f"torch_ivf_module.{where}")
            stack.enter_context(patch.object(module, name, _recorded(getattr(module, name), phase, inside)))
        for name in ("scan", "bounds"):
            stack.enter_context(
                patch.object(NativeKernel, name, _recorded(getattr(NativeKernel, name), _KERNEL, inside))
            )
        yield


def _record(phase: str) -> AbstractContextManager[Any]:
    return record_function(_MARK + phase)


def _recorded(function: Callable[..., Any], phase: str, inside: list[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def recorded(*arguments: Any, **settings: Any) -> Any:
        if inside:
            return function(*arguments, **settings)
        inside.append(phase)
        try:
            with _record(phase):
                return function(*arguments, **settings)
        finally:
            inside.pop()

    return recorded
