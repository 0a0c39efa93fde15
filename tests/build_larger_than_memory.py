"""`python -m tests.build_larger_than_memory`: build an index from a file of vectors that is larger than the memory.

One process writes a file of vectors and queries. A second one, whose memory is limited, builds the index in a file by
`build_file`; with ``--processes 2`` torchrun starts two, which build a folder for `ShardedIndex` together. A third one
builds the same index in memory, by `train` and `add`, and compares every tensor. Then the file is searched as
`tests.larger_than_memory` does. What is limited is printed: all memory of the build, pages of files included, where a
cgroup can be made (Linux, as root), else what each process allocates (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks import machine
from tests import larger_than_memory
from tests.larger_than_memory import ADDED, ROOT, clustered, count_of, nlist_of
from tests.limits import (
    bytes_read,
    drop,
    limit_all,
    limit_allocations,
    mb,
    memory,
    memory_group,
    parser_of,
    peak,
    store,
)
from torch_ivf_module import IndexIVFFlat, ShardedIndex, build_file, load, native
from torch_ivf_module.dcp import IndexLoadPlanner
from torch_ivf_module.sharded import newest

NITER = 3
DISTRIBUTED = 40 * 10**6  # bytes that sending and the writer of checkpoints take besides


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parsed(arguments)
    if options.part:
        return {"write": write, "build": build, "compare": compare}[options.part](options)
    native.build()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        numbers = {name: value for name, value in vars(options).items() if type(value) in (int, float)}
        words = [f"--{name}={value}" for name, value in numbers.items()] + [f"--folder={folder}"]
        words += [f"--results={options.results.absolute()}"] if options.results else []
        own = [sys.executable, "-m", "tests.build_larger_than_memory", *words]
        run([*own, "--part=write"])
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={options.processes}", "-m", "--"]
        built = [*own, "--part=build"] if options.processes == 1 else [*launcher, *own[2:], "--part=build"]
        with contextlib.nullcontext() if options.no_cgroup else memory_group() as group:
            run(built + ([f"--group={group}"] if group else []))
        run([*own, "--part=compare"])
        if options.processes == 1:
            search(words, options)
    return 0


def search(words: list[str], options: argparse.Namespace) -> None:
    """Search the file as `tests.larger_than_memory` does, whose options are some of ours."""
    names = ("--gigabytes", "--d", "--queries", "--spare", "--folder", "--results")
    known = [word for word in words if word.split("=")[0] in names]
    with contextlib.nullcontext() if options.no_cgroup else memory_group() as group:
        limited = [f"--group={group}"] if group else []
        run([sys.executable, "-m", "tests.larger_than_memory", *known, "--part=search", *limited])


def run(command: list[str]) -> None:
    if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(code)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("tests.build_larger_than_memory", __doc__, "vectors", ["write", "build", "compare"])
    parser.add_argument("--memory", type=int, default=512, help="max_memory of each process in MB (default 512)")
    parser.add_argument("--spare", type=int, default=128, help="MB allowed beside that, and to search (default 128)")
    parser.add_argument("--processes", type=int, default=1, help="that build together (default 1)")
    return parser.parse_args(arguments)


def write(options: argparse.Namespace) -> int:
    """Write the vectors and the queries."""
    n, d = count_of(options), options.d
    with (options.folder / "vectors.npy").open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (n, d)}
        np.lib.format.write_array_header_1_0(file, header)  # type: ignore[arg-type]
        for first in range(0, n, ADDED):
            clustered(min(ADDED, n - first), d, seed=3 + first).numpy().tofile(file)
    torch.save(clustered(2 * options.queries, d, seed=n), options.folder / "queries.pt")
    return 0


def empty(options: argparse.Namespace) -> IndexIVFFlat:
    return IndexIVFFlat(options.d, nlist=nlist_of(options), nprobe=16, codes=None)


@contextlib.contextmanager
def largest() -> Iterator[dict[str, int]]:
    """The most memory that is not of files (RssAnon) while the block runs, in bytes."""
    most, ended = {"RssAnon": 0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.005):
            most["RssAnon"] = max(most["RssAnon"], memory()["RssAnon"])

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield most
    ended.set()
    watcher.join()


def build(options: argparse.Namespace) -> int:
    """Build the index under the limit, and print what it took."""
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    index: Any = empty(options)
    vectors, target = options.folder / "vectors.npy", options.folder / "index.pt"
    if size > 1:
        dist.init_process_group("gloo")
        index, target = ShardedIndex(index), options.folder / "checkpoint"
    warm = np.random.default_rng(0).standard_normal((size * 64, 4), dtype=np.float32)
    small: Any = IndexIVFFlat(4, nlist=1)
    build_file(warm[rank::size], options.folder / "warm.pt", ShardedIndex(small) if size > 1 else small)
    if rank == 0:
        drop(vectors)
    n, allowed, before = count_of(options), size * (options.memory + options.spare) * 10**6, memory()
    rows = range(n * rank // size, n * (rank + 1) // size)
    how = limit_all(options.group, allowed)
    limit_allocations(allowed // size)
    read, began = bytes_read(), time.monotonic()
    with largest() as most:
        built = build_file(vectors, target, index, rows=rows, niter=NITER, max_memory=options.memory * 10**6)
    spent, grown = time.monotonic() - began, most["RssAnon"] - before["RssAnon"]
    told = {step: round(seconds, 1) for step, seconds in built.seconds.items()}
    if rank == 0:
        print(
            f"vectors {mb(4 * n * options.d)}; {size} process(es) may use {mb(allowed)} beyond the"
            f" {mb(before['RssAnon'])} of Python and torch each: {how}\n"
            f"built {mb(built.bytes)} of {built.ntotal:,} vectors, trained on {built.trained_on:,}, in {spent:.1f} s"
            f" ({4e-6 * n * options.d / spent:.0f} MB/s): {json.dumps(told)}"
        )
        where = machine.describe(torch.get_num_threads(), "")
        store(
            options.results, part="build", d=options.d, n=n, nlist=nlist_of(options), niter=NITER, processes=size,
            trained_on=built.trained_on, seconds=built.seconds, total=spent, bytes=built.bytes, allowed=allowed,
            resident=grown, **{name: where[name] for name in ("cpu", "cores", "threads", "date", "commit")},
        )  # fmt: skip
    print(
        f"process {rank}: RssAnon at most {mb(grown)} more than before, {mb(bytes_read() - read)} from the disk"
        + peak(options.group),
        flush=True,
    )
    most_allowed = options.memory * 10**6 + (DISTRIBUTED if size > 1 else 0)
    assert grown <= most_allowed, f"{mb(grown)} resident, {mb(most_allowed)} allowed"
    return 0


def compare(options: argparse.Namespace) -> int:
    """Build the index in memory, compare all tensors, and write answers for the search."""
    x = np.load(options.folder / "vectors.npy", mmap_mode="r")
    index = empty(options)
    index.train(x, niter=NITER)
    if options.processes > 1:
        found: Any = empty(options)
        folder = newest(options.folder / "checkpoint")
        dcp.load({"index": found}, checkpoint_id=folder, planner=IndexLoadPlanner(), no_dist=True)
    else:
        found = load(options.folder / "index.pt", mmap=True)
    index.add(x)
    tensors = index.state_dict()
    same = {name: torch.equal(tensor, tensors[name]) for name, tensor in found.state_dict().items()}
    print(f"tensors equal to those of the index built in memory: {json.dumps(same)}")
    queries = torch.load(options.folder / "queries.pt")
    answers = index.search(queries, larger_than_memory.K)
    torch.save((queries, *answers), options.folder / "answers.pt")
    if options.processes > 1:  # centroids differ by the rounding of sums
        overlap = (found.search(queries, larger_than_memory.K)[1][:, :, None] == answers[1][:, None]).any(1)
        print(f"{overlap.float().mean():.2%} of the neighbours are those of the index built in memory")
        return 0
    assert all(same.values())
    return 0


if __name__ == "__main__":
    sys.exit(main())
