"""``python -m tests.traffic``: what a sharded index holds and sends at 1, 2 and 4 processes, to set beside the formulas
of docs/distributed.md.

Traffic is what the kernel counts on the sockets of gloo (TCP_INFO, Linux), memory what it counts as resident.
"""

import argparse
import multiprocessing
import os
import socket
import struct
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.tensor  # so that the memory of the first save does not include that of its imports

from benchmarks import rss
from benchmarks.tables import grid
from torch_ivf_module import IndexIVFFlat, ShardedIndex

NITER = 10
STEPS = ("train", "add", "search", "save")


@dataclass(frozen=True)
class Setting:
    """W processes, N vectors in all, L lists, P probes, Q queries of each process."""

    processes: int
    vectors: int
    nlist: int = 1_024
    queries: int = 1_000
    shard: str = "rows"
    d: int = 128
    nprobe: int = 16
    k: int = 10


def sent() -> int:
    """Bytes that this process's TCP connections have delivered so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed since it was listed, or no TCP
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
                total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
    return total


def _process(rank: int, s: Setting, folder: str) -> dict[str, float]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(minutes=10), s.processes, rank)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(s.vectors // s.processes, s.d, generator=generator)
    queries = torch.randn(s.queries, s.d, generator=generator)
    index = ShardedIndex(IndexIVFFlat(s.d, nlist=s.nlist, nprobe=s.nprobe), shard=s.shard)
    used: dict[str, float] = {}

    def counted(name: str, call: Callable[[], Any]) -> None:
        dist.barrier()
        before = sent()
        call()
        dist.barrier()
        used[name] = sent() - before

    seeded = torch.Generator().manual_seed(0)
    counted("train", lambda: index.train(x, niter=NITER, max_points_per_centroid=64, generator=seeded))
    rss.trim()
    before = rss.now()
    counted("add", lambda: index.add(x))
    index.search(queries[:1], s.k)  # packs
    rss.trim()
    used["memory"] = rss.now() - before
    counted("search", lambda: index.search(queries, s.k))
    rss.trim()
    counted("save", lambda: used.update(peak=rss.growth(index.save, f"{folder}/saved")[0]))
    dist.destroy_process_group()
    return used


def measure(s: Setting) -> dict[str, float]:
    """What a process sends in each of STEPS, its memory, and what it needs to save: bytes, averaged over processes."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(s.processes, context) as pool:
        found = list(pool.map(partial(_process, s=s, folder=folder), range(s.processes)))
    return {name: sum(one[name] for one in found) / len(found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what an index over several processes holds and sends.")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    for name, value in (("vectors", 200_000), ("nlist", 1_024), ("queries", 1_000)):
        parser.add_argument(f"--{name}", type=int, default=value, help="default: %(default)s")
    options = parser.parse_args()
    data = f"{options.vectors:,} vectors, d 128, float32, {options.nlist:,} lists, nprobe 16, k 10"
    print(f"{data}, {options.queries:,} queries of each process; for one process\n")
    rows = []
    for processes, shard in product(options.processes, ("rows", "lists")):
        found = measure(Setting(processes, options.vectors, options.nlist, options.queries, shard))
        rows.append([str(processes), shard, *(f"{found[name] / 1e6:.3g} MB" for name in ("memory", "peak", *STEPS))])
    print(grid(["W", "shard", "memory", "to save", *STEPS], rows))


if __name__ == "__main__":
    main()
