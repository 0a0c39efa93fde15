"""Timing: interleaved repetitions, medians, and a limit on what one figure may cost."""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import device

# Seconds per call (median), its quartiles seconds_low and seconds_high, its 95th percentile, and the number of calls.
Timing = dict[str, float]


@dataclass(frozen=True)
class Effort:
    """How long to measure. A turn is one engine's consecutive calls before the next engine's turn."""

    rounds: int = 7  # turns of each engine
    fewest_rounds: int = 3  # where a round is slow
    turn_seconds: float = 0.02  # the fastest engine's turn lasts about so long …
    most_calls: int = 32  # … or so many calls
    cell_seconds: float = 12.0  # what all engines together may take for one figure
    call_seconds: float = 30.0  # an engine expected to need longer for one call is skipped
    serve_seconds: float = 1.0  # request threads ask one engine for so long in a turn
    pause_seconds: float = 0.02  # between turns, for the threads of the library before to stop spinning


# To compare before and after a change: fewer repetitions, and nothing is skipped.
QUICK = Effort(rounds=5, fewest_rounds=2, most_calls=16, cell_seconds=8.0, serve_seconds=0.2, call_seconds=math.inf)


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    answer = call(*arguments)
    device.finish()
    return time.perf_counter() - start, answer


def interleave(calls: Mapping[str, Callable[[int], Any]], effort: Effort) -> dict[str, Timing]:
    """Time `calls` in turns, A B A B …; repetition i of every engine is `call(i)` with the same i."""
    # The first call fills caches and compiles; a second says what a call costs.
    cost = {name: first if (first := timed(call, 0)[0]) > 5 else timed(call, 1)[0] for name, call in calls.items()}
    total, fastest = max(sum(cost.values()), 1e-9), max(min(cost.values(), default=1.0), 1e-9)
    wanted, most = math.ceil(effort.turn_seconds / fastest), int(effort.cell_seconds / effort.fewest_rounds / total)
    turn = max(1, min(wanted, most, effort.most_calls))
    rounds = max(effort.fewest_rounds, min(effort.rounds, int(effort.cell_seconds / (total * (turn + 1)))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for first in range(0, rounds * turn, turn):
        for name, call in calls.items():
            time.sleep(effort.pause_seconds)
            if cost[name] < 0.5:
                call(first)  # not timed: wakes the threads and fills the caches
            samples[name] += [timed(call, i)[0] for i in range(first, first + turn)]
    quartiles = {name: np.percentile(values, (50, 25, 75, 95)).tolist() for name, values in samples.items()}
    names = ("seconds", "seconds_low", "seconds_high", "seconds_p95", "calls")
    return {name: dict(zip(names, [*values, rounds * turn], strict=True)) for name, values in quartiles.items()}


def rotation(rows: Any, nq: int, most: int = 256) -> list[Any]:
    """Consecutive slices of `nq` rows to search in turn, so that the rows differ from call to call."""
    return [rows[start : start + nq] for start in range(0, min(rows.shape[0] - nq, most * nq) + 1, nq)]
