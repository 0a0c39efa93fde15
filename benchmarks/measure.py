"""The stopwatch: interleaved repetitions, medians, and a cap on what one figure may cost."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Effort", "Timing", "interleave", "rotation", "timed"]


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
    def quick(cls) -> Effort:
        """For a before-and-after: fewer repetitions, and nothing is skipped."""
        return cls(rounds=5, fewest_rounds=2, most_calls=16, cell_seconds=8.0, call_seconds=math.inf)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median, the quartiles, and how many calls they come from."""

    seconds: float
    low: float
    high: float
    calls: int

    def fields(self) -> dict[str, float | int]:
        return {
            "seconds": self.seconds,
            "seconds_low": self.low,
            "seconds_high": self.high,
            "calls": self.calls,
        }


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
    for turn in range(rounds):
        first = turn * calls_per_turn
        for name, call in calls.items():
            time.sleep(effort.pause_seconds)
            if cost[name] < 0.5:
                call(first)  # untimed: threads awake, caches this engine's own
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
    wanted = min(effort.most_calls, math.ceil(effort.turn_seconds / max(min(cost.values()), 1e-9)))
    affordable = int(effort.cell_seconds / effort.fewest_rounds / max(sum(cost.values()), 1e-9))
    return max(1, min(wanted, affordable))


def _summary(values: list[float]) -> Timing:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return Timing(float(middle), float(low), float(high), len(values))


def rotation(native: Any, nq: int, most: int = 256) -> list[Any]:
    """Consecutive slices of `nq` rows to search in turn, so that the rows differ from call to call."""
    total = native.shape[0]
    return [native[start : start + nq] for start in range(0, min(total - nq, most * nq) + 1, nq)]
