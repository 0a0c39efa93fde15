"""``search``: the nearest vectors of a file of queries, printed or written.

Q queries, k results.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._files import check_target, replace
from ..checkpoint import AnyIndex
from ..index import IndexPreTransform
from ..params import SearchParams
from ..vector_files import Vectors, open_vectors, read_truth
from .common import VECTOR_FILES, Reporter, add_json, load_trained, positive, usable_device

__all__ = ["add_arguments", "run"]

_SHOWN = 10  # queries and results that a person is shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `search`."""
    option = parser.add_argument
    option("index", type=Path, help="a saved index: a file of this package, of torch-ivf or of faiss")
    option("queries", type=Path, help=f"the file of query vectors: {VECTOR_FILES}")
    option("-k", "--k", type=positive, default=10, help="results per query (default: %(default)s)")
    option("--key", help="name of the array, if the file has several (default: test, if there is one)")
    option(
        "--truth",
        type=Path,
        metavar="FILE",
        help="ids of the true neighbours of each query, nearest first, for the recall: .ivecs, .ibin, .npy, … "
        "(default: the array neighbors, if the file of queries is HDF5 and has one)",
    )
    option("--nprobe", type=positive, help="lists to probe per query (default: the index's own)")
    option("--max-codes", type=positive, help="maximum of rows that a query reads (default: the index's own)")
    option("--batch", type=positive, default=4_096, help="queries searched at a time (default: %(default)s)")
    option("--ids", type=Path, metavar="FILE.npy", help="write the ids here, int64 (queries, k)")
    option("--distances", type=Path, metavar="FILE.npy", help="write the distances here, float32 (queries, k)")
    option("--mmap", action="store_true", help="map the vectors of the index instead of reading them into memory")
    option("--device", type=usable_device, help="where to search (default: cpu)")
    add_json(parser)


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Search, and print or write what was found."""
    talk = Reporter(args)
    _check_targets(args)
    queries = open_vectors(args.queries, args.key, role="test")
    index = load_trained(args.index, device=args.device, mmap=args.mmap)
    _check_fit(args, index, queries)
    if args.truth is not None:
        truth, metric = read_truth(args.truth, queries.rows, args.k)
        queries = queries._replace(truth=truth, metric=metric)
    params = SearchParams(nprobe=args.nprobe, max_codes=args.max_codes)
    began = time.perf_counter()
    found = []
    batches = -(-queries.rows // args.batch)
    for batch in talk.progress(queries.batches(args.batch), "search", total=batches):
        D, I = index.search(batch.to(args.device or "cpu"), args.k, params=params)
        found.append((D.cpu(), I.cpu()))
    seconds = time.perf_counter() - began
    D = torch.cat([torch.empty(0, args.k, dtype=torch.float32, device="cpu"), *(part for part, _ in found)])
    I = torch.cat([torch.empty(0, args.k, dtype=torch.int64, device="cpu"), *(part for _, part in found)])
    talk.say("search", f"{queries.rows:,} queries among {index.ntotal:,} vectors, {index.metric}", seconds)
    facts: dict[str, Any] = {"queries": queries.rows, "k": args.k, "ntotal": index.ntotal, "metric": index.metric}
    facts["seconds"] = seconds
    if _comparable(args, index, queries):
        assert queries.truth is not None
        facts["recall"] = _recall(I, queries.truth[:, : args.k])
        source = args.truth or args.queries
        talk.say("recall", f"{facts['recall']:.4f} of the {args.k} nearest ids in {source.name}")
    if args.ids is None and args.distances is None:
        results = [{"ids": ids, "distances": row} for ids, row in zip(I.tolist(), _finite(D), strict=True)]
        talk.result({**facts, "results": results}, _table(D, I))
        return 0
    for path, array in ((args.ids, I), (args.distances, D)):
        if path is not None:
            replace(path, functools.partial(_write, array), ".npy")
            talk.say("wrote", f"{path}: {tuple(array.shape)} {str(array.dtype).removeprefix('torch.')}")
    talk.result(facts)
    return 0


def _check_targets(args: argparse.Namespace) -> None:
    for path, other in ((args.ids, args.distances), (args.distances, args.ids)):
        if path is None:
            continue
        if path.suffix != ".npy":
            raise ValueError(f"results are written as .npy: the file name must end in .npy, got {path}")
        check_target(path, args.index, args.queries, args.truth, other)


def _check_fit(args: argparse.Namespace, index: AnyIndex, queries: Vectors) -> None:
    if queries.d != index.d:
        raise ValueError(f"{queries.name} has vectors of {queries.d} dimensions, but {args.index} has {index.d}")
    lists = {"--nprobe": args.nprobe, "--max-codes": args.max_codes}
    if (index.index if isinstance(index, IndexPreTransform) else index).store.flat and any(lists.values()):
        given = " and ".join(name for name in lists if lists[name])
        raise ValueError(f"{args.index} is a flat index, which has no lists: leave out {given}")


def _comparable(args: argparse.Namespace, index: AnyIndex, queries: Vectors) -> bool:
    """Whether the file of queries knows the neighbours that the index was asked for."""
    if queries.truth is None or queries.truth.shape[1] < args.k:
        return False
    if queries.metric not in (None, index.metric):
        source = args.truth or args.queries
        told = f"the neighbours in {source} are by {queries.metric!r}, the index is by {index.metric!r}"
        print(f"warning: {told}: there is no recall to tell", file=sys.stderr)
        return False
    return True


def _write(array: Tensor, path: str) -> None:
    np.save(path, array.numpy())


def _recall(I: Tensor, truth: Tensor) -> float:
    """The share of the true neighbours (Q, k) that were found; -1 among them stands for none."""
    rows = zip(truth.numpy(), I.numpy(), strict=True)
    found = np.concatenate([np.zeros(0, bool), *(np.isin(true, ids)[true != -1] for true, ids in rows)])
    return float(found.mean()) if found.size else 1.0


def _finite(D: Tensor) -> list[list[float | None]]:
    """Distances as JSON can hold them: null where there is no result."""
    return [[value if abs(value) != float("inf") else None for value in row] for row in D.tolist()]


def _table(D: Tensor, I: Tensor) -> str:
    """Some results for a person: an id and its distance a column."""
    wide = min(D.shape[1], _SHOWN)
    cells = [["query", *(f"{rank + 1}." for rank in range(wide))]]
    for number in range(min(D.shape[0], _SHOWN)):
        pairs = zip(I[number, :wide].tolist(), D[number, :wide].tolist(), strict=True)
        cells.append([str(number), *(f"{id} ({distance:.4g})" if id != -1 else "-" for id, distance in pairs)])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    if D.shape[0] > _SHOWN or D.shape[1] > wide:
        lines.append(f"the first {min(D.shape[0], _SHOWN)} of {D.shape[0]:,} queries; --ids and --distances write all")
    return "\n".join(["an id and its distance (l2: squared) or score, best first:", *lines])
