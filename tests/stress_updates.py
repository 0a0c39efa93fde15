"""`python -m tests.stress_updates`: threads search an index while others change it, and every answer is checked.

Writers replace, remove and add groups of rows in one call each, and add and remove filler, so that the lists are packed
again and again; see tests/updates.py for what a search must find. It prints how many versions, searches and changes
there were, how long the calls took (a search with the check of its answer), and the memory; the exit code is 1 after
the first wrong answer.
"""

from __future__ import annotations

import argparse
import random
import sys
import threading
import time
from collections import defaultdict

import torch

from benchmarks import rss
from benchmarks.tables import grid
from tests.updates import PARAMS, Until, Workload
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, IndexIVFScalarQuantizer, native

INDEXES = {
    "ivf": lambda nlist: IndexIVFFlat(D, nlist=nlist, nprobe=nlist),
    "ivf with codes": lambda nlist: IndexIVFFlat(D, nlist=nlist, nprobe=nlist, codes=8),
    "flat": lambda nlist: IndexFlatL2(D),
    "scalar quantizer": lambda nlist: IndexIVFScalarQuantizer(D, nlist=nlist, nprobe=nlist),
}
D = 64
CHANGES = ("add", "remove", "update")
CALLS = ("search", "search with a selector", *CHANGES)
PLACES = 1 << 16  # durations that are kept of each kind of call, a sample of all


class Durations:
    """A sample of the durations of some calls."""

    def __init__(self, seed: int) -> None:
        self.count, self._sample, self._chance = 0, [], random.Random(seed)
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.longest = max(self.longest, seconds)
        if len(self._sample) < PLACES:
            self._sample.append(seconds)
        elif (at := self._chance.randrange(self.count)) < PLACES:
            self._sample[at] = seconds

    def row(self, name: str) -> list[str]:
        """Name, count, p50, p99 and the longest, in milliseconds."""
        sample = sorted(self._sample)
        parts = [sample[int(share * (len(sample) - 1))] for share in (0.5, 0.99)]
        return [name, f"{self.count:,}", *(f"{1e3 * part:.2f}" for part in (*parts, self.longest))]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    text = (__doc__ or "").split("\n\n")[0]
    parser = argparse.ArgumentParser(prog="python -m tests.stress_updates", description=text)
    parser.add_argument("--minutes", type=float, default=10.0, help="of all kinds of index together (default 10)")
    parser.add_argument("--readers", type=int, default=3, help="threads that search (default 3)")
    parser.add_argument("--writers", type=int, default=2, help="threads that change the index (default 2)")
    parser.add_argument("--rows", type=int, default=100_000, help="of filler of each writer (default 100000)")
    parser.add_argument("--batch", type=int, default=500, help="rows of a change of the filler (default 500)")
    parser.add_argument("--nlist", type=int, default=256, help="lists (default 256)")
    parser.add_argument("--kind", choices=INDEXES, action="append", help="kinds of index (default: all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kinds = options.kind or list(INDEXES)
    setting = f"{options.readers} readers, {options.writers} writers, {options.rows:,} rows of {D} of each writer"
    print(f"{setting}; kernel: {native.available()}, Python {sys.version.split()[0]}, gil {gil()}\n")
    for kind in kinds:
        if error := stress(kind, options, 60 * options.minutes / len(kinds)):
            print(f"wrong: {error!r}")
            return 1
    print("no wrong answer")
    return 0


def gil() -> bool:
    """Whether this Python has a lock that lets one thread run at a time."""
    return getattr(sys, "_is_gil_enabled", lambda: True)()


def stress(kind: str, options: argparse.Namespace, seconds: float) -> BaseException | None:
    """Search and change an index for some seconds, and print what happened; the first error."""
    work = Workload(INDEXES[kind](options.nlist), options.writers, batch=options.batch, filler=options.rows)
    index, until, lock = work.index, Until(), threading.Lock()
    durations: dict[str, Durations] = defaultdict(lambda: Durations(0))

    def timed(name: str, began: float) -> None:
        spent = time.perf_counter() - began
        with lock:
            durations[name].add(spent)

    def write(writer: int) -> None:
        chance = random.Random(writer)
        while not until.ended.is_set():
            began = time.perf_counter()
            timed(work.write(writer, chance), began)

    def read(reader: int) -> None:
        chance, groups = random.Random(100 + reader), [group for own in work.groups for group in own]
        while not until.ended.is_set():
            group, params = chance.choice(groups), chance.choice(PARAMS)
            began = time.perf_counter()
            work.read(group, params)
            timed("search with a selector" if params and params.selector is not None else "search", began)

    for writer in range(options.writers):
        while len(work.filler[writer]) < work.most:
            work.fill(writer, random.Random(writer))
    index.search(torch.zeros(1, D), 1)
    rss.trim()
    before = peak = rss.now()
    threads = [until.start(write, number) for number in range(options.writers)]
    threads += [until.start(read, number) for number in range(options.readers)]
    end = time.monotonic() + seconds
    last, pause = time.monotonic(), 0.0
    while last < end and not until.ended.wait(0.05):
        peak, pause, last = max(peak, rss.now()), max(pause, time.monotonic() - last), time.monotonic()
    until.ended.set()
    for thread in threads:
        thread.join()
    if until.errors:
        return until.errors[0]
    changes = sum(durations[name].count for name in CHANGES)
    print(f"{kind}: {index.ntotal:,} rows, {changes:,} versions in {seconds:.0f} s\n")
    print(grid(["call", "calls", "p50, ms", "p99, ms", "longest, ms"], [durations[name].row(name) for name in CALLS]))
    own, vectors = index.memory_bytes(), index.store.packed.nbytes
    print(
        f"\nThe index takes {own / 1e6:.0f} MB, of which {vectors / 1e6:.0f} MB are rows. The process took up to"
        f" {(peak - before) / 1e6:.0f} MB more than at the start. A thread that only sleeps 50 ms at a time took up to"
        f" {1e3 * pause:.0f} ms.\n",
        flush=True,
    )
    return None


if __name__ == "__main__":
    sys.exit(main())
