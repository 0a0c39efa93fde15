"""What a sharded index holds and sends: formulas, measured at 1, 2 and 4 processes, and worked out for a large one.

    python -m benchmarks sharded                   # the tables of docs/distributed.md
    python -m benchmarks sharded --processes 2     # fewer, or smaller with --vectors, --nlist, --queries

Traffic is what the kernel counts on the sockets of gloo (TCP_INFO, Linux), memory what it counts as resident.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import struct
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.tensor  # so that the memory of the first save is not that of its imports

from torch_ivf_module import IndexIVFFlat, ShardedIndex

from . import rss
from .cells import grid

__all__ = ["Setting", "add_arguments", "measure", "memory", "run", "to_save", "traffic"]

NITER = 10
_ID = 8  # bytes
_ORIGIN_ROWS = 256  # to 511, from which k-means takes its origin


@dataclass(frozen=True)
class Setting:
    """W processes, N vectors in all, L lists, P probes, Q queries of each process."""

    processes: int
    vectors: int
    d: int = 128
    nlist: int = 1_024
    nprobe: int = 16
    k: int = 10
    queries: int = 1_000
    itemsize: int = 4
    shard: str = "rows"


def memory(s: Setting) -> int:
    """Bytes that a process holds: its vectors, ids and l2 terms, and every centroid twice (as saved, and centred)."""
    return s.vectors // s.processes * (s.d * s.itemsize + _ID + 4) + s.nlist * (2 * 4 * s.d + 3 * _ID)


def to_save(s: Setting) -> int:
    """Bytes that a process needs for a moment to save: what arrives, and that in order."""
    return 2 * (s.vectors // s.processes) * (s.d * s.itemsize + _ID)


def traffic(s: Setting) -> dict[str, float]:
    """Bytes that a process sends in each step, on average, where all bring equally many rows and queries."""
    others = s.processes - 1
    reduced = 2 * others / s.processes  # of each byte that is summed over all
    row = s.d * s.itemsize + 2 * _ID  # a vector, its id, and its list or its place
    question = 4 * s.d + 4 * s.nprobe
    moved = s.vectors / s.processes * others / s.processes
    return {
        "train": reduced * (NITER * s.nlist * (4 * s.d + _ID) + (s.nlist + _ORIGIN_ROWS) * 4 * s.d)
        + others / s.processes * s.nlist * 4 * s.d,
        "add": moved * row,
        "search": s.queries * asked(s) * (question + s.k * (4 + _ID)),
        "save": moved * row,
    }


def asked(s: Setting) -> float:
    """Other processes that a query goes to: all of them, or the owners of its lists, as if those were drawn."""
    others = s.processes - 1
    return others if s.shard == "rows" else others * (1 - (1 - 1 / s.processes) ** s.nprobe)


# --- measuring ----------------------------------------------------------------------------------------------


def sent() -> int:
    """Bytes that this process's TCP connections have delivered so far."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        except OSError:  # closed since it was listed, or no TCP
            continue
        total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
    return total


def _process(rank: int, s: Setting, folder: str, results: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=s.processes)
    draw = torch.Generator().manual_seed(rank)
    each = s.vectors // s.processes
    x = torch.randn(each, s.d, generator=draw)
    queries = torch.randn(s.queries, s.d, generator=draw)
    warm = torch.Generator().manual_seed(0)
    index = ShardedIndex(IndexIVFFlat(s.d, nlist=s.nlist, nprobe=s.nprobe), shard=s.shard)
    used: dict[str, float] = {}

    def counted(name: str, call: Callable[[], Any]) -> None:
        dist.barrier()
        before = sent()
        call()
        dist.barrier()
        used[name] = sent() - before

    counted("train", lambda: index.train(x, niter=NITER, max_points_per_centroid=64, generator=warm))
    rss.trim()
    before = rss.now()
    counted("add", lambda: index.add(x))
    counted("search", lambda: index.search(queries[:1], s.k))  # packs; measured again below
    rss.trim()
    grown = rss.now() - before
    counted("search", lambda: index.search(queries, s.k))
    rss.trim()
    counted("save", lambda: used.update(peak=rss.growth(lambda: index.save(f"{folder}/saved"))[0]))
    held = sum(buffer.nbytes for buffer in index.index.buffers())
    results.put({"rank": rank, "resident": grown, "buffers": held, **used})
    dist.destroy_process_group()


def measure(s: Setting, timeout: float = 600) -> dict[str, float]:
    """The average over the processes of what each sends in a step and holds, in bytes."""
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_process, args=(r, s, folder, results)) for r in range(s.processes)]
        try:
            for process in processes:
                process.start()
            found = [results.get(timeout=timeout) for _ in processes]
            for process in processes:
                process.join(timeout)
        finally:
            for process in processes:
                process.kill()
    return {name: sum(one[name] for one in found) / len(found) for name in found[0] if name != "rank"}


# --- the page -----------------------------------------------------------------------------------------------


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1_000 or unit == "GB":
            return f"{count:.3g} {unit}" if count < 1_000 else f"{count:,.0f} {unit}"
        count /= 1_000
    raise AssertionError


def compare(options: argparse.Namespace) -> None:
    rows = []
    for processes in options.processes:
        for shard in ("rows", "lists"):
            s = Setting(processes, options.vectors, nlist=options.nlist, queries=options.queries, shard=shard)
            found, formula = measure(s), {"resident": memory(s), "peak": to_save(s), **traffic(s)}
            cells = [f"{size(found[name])} / {size(formula[name])}" for name in formula]
            rows.append([str(processes), shard, *cells])
    print(grid(["W", "shard", "memory", "to save", "train", "add", "search", "save"], rows), end="\n\n")


def large() -> None:
    rows = []
    for shard in ("rows", "lists"):
        for nprobe in (8, 64):
            s = Setting(64, 10**9, nlist=65_536, nprobe=nprobe, itemsize=2, shard=shard)
            formula = traffic(s)
            read = s.vectors / s.nlist * nprobe / s.processes
            cells = [size(memory(s)), size(formula["search"] / s.queries), f"{asked(s):.0f}", f"{read:,.0f}"]
            rows.append([shard, str(nprobe), *cells, *(size(formula[name]) for name in ("train", "add", "save"))])
    heads = ["shard", "nprobe", "memory", "a query", "asks", "rows read"]
    print(grid([*heads, "train", "add", "save"], rows), end="\n\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--vectors", type=int, default=200_000)
    parser.add_argument("--nlist", type=int, default=1_024)
    parser.add_argument("--queries", type=int, default=1_000, help="of each process")


def run(options: argparse.Namespace) -> int:
    about = f"{options.vectors:,} vectors, d 128, float32, {options.nlist:,} lists, nprobe 16, k 10"
    print(f"{about}, {options.queries:,} queries of each process; measured / formula, for one process\n")
    compare(options)
    print("A billion vectors, d 128, float16, 65,536 lists, k 10, 64 processes; by the formulas\n")
    large()
    return 0
