"""`python -m tests.larger_than_memory`: search an index in a file that is larger than the memory of the process.

It writes an index, and the answers that it gives in memory, without codes. A second process may then use no more than
codes, lists and a little take, beyond Python and torch with nothing loaded; it opens the file with
``load(path, mmap=True, codes=8)``, searches, and compares the answers. It prints what was limited: all of its memory,
the pages of the file included, where a cgroup can be made (Linux, as root), else what it allocates (RLIMIT_DATA).
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

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
    resident,
    store,
)
from tests.oracle import agree
from torch_ivf_module import IndexIVFFlat, SearchParams, load, native
from torch_ivf_module.functional.codec import panel_bytes

K = 10
ADDED = 1 << 16  # rows at a time
ROOT = Path(__file__).parent.parent


class Sizes(NamedTuple):
    """In bytes."""

    rows: int
    codes: int
    lists: int  # ids and centroids
    allowed: int  # for codes, lists and everything else that searches need


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parsed(arguments)
    if options.part:
        return {"build": build, "search": search}[options.part](options)
    native.build()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        numbers = [f"--{name}={value}" for name, value in vars(options).items() if type(value) in (int, float)]
        command = [sys.executable, "-m", "tests.larger_than_memory", *numbers, f"--folder={folder}"]
        built = subprocess.run([*command, "--part=build"], cwd=ROOT, check=False).returncode
        if built:
            return built
        with contextlib.nullcontext() if options.no_cgroup else memory_group() as group:
            limited = [f"--group={group}"] if group else []
            return subprocess.run([*command, "--part=search", *limited], cwd=ROOT, check=False).returncode


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = parser_of("tests.larger_than_memory", __doc__, "rows", ["build", "search"])
    parser.add_argument("--spare", type=int, default=128, help="MB allowed beside codes and lists (default 128)")
    return parser.parse_args(arguments)


# -- the index -----------------------------------------------------------------------------------------------


def count_of(options: argparse.Namespace) -> int:
    return int(options.gigabytes * 1e9 / (4 * options.d))


def nlist_of(options: argparse.Namespace) -> int:
    return min(1024, max(4, int(count_of(options) ** 0.5)))


def clustered(count: int, d: int, seed: int) -> Tensor:
    """Vectors (count, d) around 1000 points, whose spread decreases along the dimensions as that of embeddings does."""
    middles = torch.randn(1000, d, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(seed)
    around = middles[torch.randint(0, 1000, (count,), generator=generator)]
    return (around + torch.randn(count, d, generator=generator)) * (1 + torch.arange(d) / 16).rsqrt()


def build(options: argparse.Namespace) -> int:
    """Write the index, queries, and the answers in memory without codes."""
    n, d = count_of(options), options.d
    nlist = nlist_of(options)
    index = IndexIVFFlat(d, nlist=nlist, nprobe=16, codes=None)
    index.train(clustered(min(n, 64 * nlist), d, seed=2), niter=3)
    for first in tqdm(range(0, n, ADDED), desc="adding", unit=" parts", disable=None):
        index.add(clustered(min(ADDED, n - first), d, seed=3 + first))
    queries = clustered(2 * options.queries, d, seed=n)
    answers = index.search(queries, K)
    index.save(options.folder / "index.pt")
    torch.save((queries, *answers), options.folder / "answers.pt")
    return 0


def sizes_of(options: argparse.Namespace) -> Sizes:
    n, d, nlist = count_of(options), options.d, nlist_of(options)
    codes = (n // 32 + nlist) * (panel_bytes(d) + 8) + nlist * (4 * d + 20)
    lists = 8 * n + 4 * d * nlist
    return Sizes(4 * n * d, codes, lists, codes + lists + options.spare * 10**6)


# -- the search ----------------------------------------------------------------------------------------------


def search(options: argparse.Namespace) -> int:
    """Open the index under the limit, search it, print what it took, and check the answers."""
    path = options.folder / "index.pt"
    queries, *expected = torch.load(options.folder / "answers.pt")
    warm = IndexIVFFlat(4, nlist=1, codes=8)
    warm.train(torch.randn(64, 4)).add(torch.randn(64, 4))
    warm.search(torch.randn(64, 4), 1)  # imports, threads
    drop(path)
    sizes, before = sizes_of(options), memory()
    how = limit_all(options.group, sizes.allowed)
    index = load(path, mmap=True, codes=8)
    limit_allocations(sizes.allowed)
    print(
        f"rows {mb(sizes.rows)} ({index.ntotal:,} of {index.d} numbers), codes and lists"
        f" {mb(sizes.codes + sizes.lists)}; the process may use {mb(sizes.allowed)} beyond the {mb(before['RssAnon'])}"
        f" of Python and torch: {how}"
    )
    began, read = time.monotonic(), bytes_read()
    index.search(queries[:1], K)
    print(f"making codes {time.monotonic() - began:.1f} s, {mb(bytes_read() - read)} from the disk; {resident(before)}")
    half = options.queries
    rates: dict[str, float] = {}
    found = []
    for name, part, size in (("one query at a time", queries[:half], 1), ("all at once", queries[half:], half)):
        for state in ("cold", "warm"):
            answers, rates[f"{name}, {state}"], read_rows = measured(f"{name}, {state}", index, path, part, size)
            found.append(answers)
    print(resident(before) + peak(options.group))
    held = memory()["RssAnon"] - before["RssAnon"]
    facts = {"codes": sizes.codes, "lists": sizes.lists, "allowed": sizes.allowed, "resident": held}
    facts.update(d=index.d, n=index.ntotal, rows_read=read_rows)
    store(options.results, part="search", queries_per_second=rates, **facts)
    index.codes = None
    measured("without codes, one query at a time, cold", index, path, queries[:5], 1)
    for at, answer in zip((0, 0, half, half), found, strict=True):
        agree(answer, [part[at : at + half] for part in expected], rtol=1e-6)
    print(f"{4 * half:,} answers equal those of the index in memory without codes")
    grown = memory()["RssAnon"] - before["RssAnon"]
    assert grown <= sizes.allowed, f"{mb(grown)} resident, {mb(sizes.allowed)} allowed"
    return 0


def measured(name: str, index: Any, path: Path, queries: Tensor, size: int) -> tuple[Any, float, float]:
    """Search `size` queries at a time, from a cold cache if the name says so: answers, queries/s and rows in the probed
    lists of a query, which it prints."""
    if name.endswith("cold"):
        drop(path, index.packed_embeddings)
    answers, stats = [], {"rows_read": 0, "rows_scored": 0}
    read, began = bytes_read(), time.monotonic()
    for part in queries.split(size):
        answers.append(index.search(part, K, params=SearchParams(debug_stats=True)))
        for key in stats:
            stats[key] += index.last_search_stats[key] or 0
    spent, nq = time.monotonic() - began, len(queries)
    rows = f"{stats['rows_scored'] / nq:.0f}" if stats["rows_scored"] else "all"
    print(
        f"{name}: {nq / spent:,.0f} queries/s; of {stats['rows_read'] / nq:,.0f} rows in the probed lists {rows} are"
        f" read from the file, {(bytes_read() - read) / nq / 1e3:,.0f} kB from the disk, for a query"
    )
    return tuple(torch.cat(parts) for parts in zip(*answers, strict=True)), nq / spent, stats["rows_read"] / nq


if __name__ == "__main__":
    sys.exit(main())
