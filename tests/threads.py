"""Several threads that start at the same time, for the tests of concurrent calls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

THREADS = 4


def together(work: Callable[[int], Any]) -> list[Any]:
    """Run `work(number)` in threads that start at the same time; return their results in order."""
    barrier = Barrier(THREADS)

    def start(number: int) -> Any:
        barrier.wait(timeout=60)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(start, number) for number in range(THREADS)]
        return [future.result(timeout=120) for future in futures]
