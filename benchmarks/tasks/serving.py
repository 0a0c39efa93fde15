"""An index behind several request threads, and beside processes that keep the processors busy."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..context import Context
from ..measure import timed

_ENGINES = ("ours", "faiss")
_CLIENTS = (1, 2, 4, 8)  # request threads
_BUSY = (0, 1, 2)  # processes that do nothing but compute
_NQS = (1, 512)  # of the searches beside them


def serving(ctx: Context) -> None:
    """Single queries that several threads ask one index, each its next when it has the answer to its last."""
    engines = ctx.build_paired(*_ENGINES)
    calls = {name: ctx.caller(engine, engine.convert(ctx.checked), 1) for name, engine in engines.items()}
    for clients in _CLIENTS:
        latencies: dict[str, list[float]] = {name: [] for name in engines}
        total = dict.fromkeys(engines, 0.0)
        with ThreadPoolExecutor(clients) as pool:
            for turn in range(ctx.effort.rounds):
                ctx.note(f"{clients} threads, {turn + 1} of {ctx.effort.rounds}")
                for name, call in calls.items():
                    time.sleep(ctx.effort.pause_seconds)
                    seconds, parts = timed(serve, pool, clients, call, ctx.effort.serve_seconds)
                    total[name] += seconds
                    latencies[name] += [latency for part in parts for latency in part]
        for name, seconds in latencies.items():
            p50, p99 = np.percentile(seconds, (50, 99)).tolist()
            qps, fields = len(seconds) / total[name], {"nprobe": ctx.case.nprobe, "k": ctx.case.k}
            ctx.row(name, clients=clients, qps=qps, p50=p50, p99=p99, requests=len(seconds), **fields)


def serve(pool: ThreadPoolExecutor, clients: int, call: Callable[[int], Any], seconds: float) -> list[list[float]]:
    """The latencies that each client sees (seconds), all of them asking for so many seconds."""
    end = time.perf_counter() + seconds

    def client(number: int) -> list[float]:
        latencies = [timed(call, 31 * number)[0]]  # clients ask different queries
        while time.perf_counter() < end:
            latencies.append(timed(call, 31 * number + len(latencies))[0])
        return latencies

    return list(pool.map(client, range(clients)))


def contention(ctx: Context) -> None:
    """Searches beside busy processes, with all threads and with one."""
    engines = ctx.build_paired(*_ENGINES)
    rows = {name: engine.convert(ctx.data.queries) for name, engine in engines.items()}
    try:
        for busy in _BUSY:
            with busy_processes(busy):
                for threads in dict.fromkeys((ctx.threads, 1)):
                    _use(threads)
                    for nq in (nq for nq in _NQS if nq <= len(ctx.data.queries)):
                        ctx.note(f"{busy} busy processes, {threads} threads, nq {nq}")
                        calls = {name: ctx.caller(engine, rows[name], nq) for name, engine in engines.items()}
                        ctx.time(calls, nq, busy=busy, threads=threads, nprobe=ctx.case.nprobe)
    finally:
        _use(ctx.threads)


@contextmanager
def busy_processes(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Within it, so many processes each keep a processor busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield busy
    finally:
        for process in busy:
            process.kill()
            process.wait()


def _use(threads: int) -> None:
    torch.set_num_threads(threads)
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)
