"""Timing: interleaved repetitions, medians, and a limit on what one figure may cost."""

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Timing = dict[str, float]  # seconds per call (median), its quartiles seconds_low and seconds_high, number of calls


@dataclass(frozen=True)
class Effort:
    """How long to measure. A turn is one engine's consecutive calls before the next engine's turn."""

    rounds: int = 7  # turns of each engine
    fewest_rounds: int = 3  # where a round is slow
    turn_seconds: float = 0.02  # the fastest engine's turn lasts about so long …
    most_calls: int = 32  # … or so many calls
    cell_seconds: float = 12.0  # what all engines together may take for one figure
    call_seconds: float = 30.0  # an engine expected to need longer for one call is skipped
    pause_seconds: float = 0.02  # between turns, for the threads of the library before to stop spinning

    @classmethod
    def quick(cls) -> "Effort":
        """To compare before and after a change: fewer repetitions, and nothing is skipped."""
        return cls(rounds=5, fewest_rounds=2, most_calls=16, cell_seconds=8.0, call_seconds=math.inf)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    answer = call()
    return time.perf_counter() - start, answer


def interleave(calls: Mapping[str, Callable[[int], Any]], effort: Effort) -> dict[str, Timing]:
    """Time `calls` in turns, A B A B …; repetition i of every engine is `call(i)` with the same i."""
    cost = {name: _warm_up(call) for name, call in calls.items()}
    calls_per_turn = _calls_per_turn(cost, effort)
    one_round = sum(cost.values()) * (calls_per_turn + 1)
    rounds = max(effort.fewest_rounds, min(effort.rounds, int(effort.cell_seconds / max(one_round, 1e-9))))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    gc.collect()
    for first in range(0, rounds * calls_per_turn, calls_per_turn):
        for name, call in calls.items():
            time.sleep(effort.pause_seconds)
            if cost[name] < 0.5:
                call(first)  # not timed: wakes the threads and fills the caches
            for i in range(first, first + calls_per_turn):
                start = time.perf_counter()
                call(i)
                samples[name].append(time.perf_counter() - start)
    return {name: _summary(values) for name, values in samples.items()}


def _warm_up(call: Callable[[int], Any]) -> float:
    """Two calls, the first to fill caches and compile; the second says what a call costs."""
    first, _ = timed(lambda: call(0))
    return first if first > 5 else timed(lambda: call(1))[0]


def _calls_per_turn(cost: Mapping[str, float], effort: Effort) -> int:
    if not cost:
        return 1
    wanted = min(effort.most_calls, math.ceil(effort.turn_seconds / max(min(cost.values()), 1e-9)))
    affordable = int(effort.cell_seconds / effort.fewest_rounds / max(sum(cost.values()), 1e-9))
    return max(1, min(wanted, affordable))


def _summary(values: list[float]) -> Timing:
    low, median, high = np.percentile(values, (25, 50, 75)).tolist()
    return {"seconds": median, "seconds_low": low, "seconds_high": high, "calls": len(values)}


def rotation(rows: Any, nq: int, most: int = 256) -> list[Any]:
    """Consecutive slices of `nq` rows to search in turn, so that the rows differ from call to call."""
    return [rows[start : start + nq] for start in range(0, min(rows.shape[0] - nq, most * nq) + 1, nq)]
