"""``build``: a file of vectors becomes a saved index, read in batches."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..functional.metric import METRICS
from ..functional.row_codes import BITS
from ..index import (
    IndexFlat,
    IndexFlatIP,
    IndexFlatL2,
    IndexIVF,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexScalarQuantizer,
)
from ..index.base import IndexBase
from .common import (
    INDEX_FILES,
    VECTOR_FILES,
    Reporter,
    add_json,
    check_target,
    index_writer,
    positive,
    read_bytes,
    shown_bytes,
    usable_device,
)
from .ids import ids_file, read_ids
from .memory import Plan, plan
from .vectors import Vectors, open_vectors

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `build`."""
    option = parser.add_argument
    option("vectors", type=Path, help=VECTOR_FILES)
    option("index", type=Path, help=f"the index to write: {INDEX_FILES}")
    option("--key", help="the array of a file that holds several: a name, group/dataset in HDF5, a column in Parquet")
    option("--metric", choices=METRICS, help="default: the one that an HDF5 file names, or l2")
    option("--flat", action="store_true", help="exhaustive search instead of an inverted file")
    option("--nlist", type=positive, help="lists (default: 4 * sqrt(rows))")
    option("--nprobe", type=positive, help="lists that a query reads (default: 8)")
    option("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")
    option("--bits", type=int, choices=BITS, help="store codes of so many bits instead of floats")
    option(
        "--ids-from",
        "--ids",
        metavar="NAME|FILE",
        help="an integer id for each row: an array or column of the file of vectors, or else a file (.npy, .ivecs, "
        "or any other kind that vectors come in) that holds one such array, or one called ids (default: 0, 1, 2, …)",
    )
    option("--rows", type=positive, help="take the first so many rows (default: all that fit)")
    option("--train-rows", type=positive, help="rows, chosen at random, to train on (default: 256 a list)")
    option("--niter", type=positive, default=10, help="iterations of k-means (default: %(default)s)")
    option("--seed", type=int, default=1234, help="of the sample and of training (default: %(default)s)")
    option("--batch", type=positive, default=65_536, help="rows read at a time (default: %(default)s)")
    option("--max-memory", type=read_bytes, metavar="SIZE", help="such as 8G (default: nine tenths of what is free)")
    option("--device", type=usable_device, default="cpu", help="where to build (default: cpu)")
    add_json(parser)


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Build, save, and say what was built."""
    talk = Reporter(args)
    check_target(args.index, args.vectors, ids_file(args.ids_from, args.vectors))
    write = index_writer(args.index)
    _check_flags(args)
    vectors = open_vectors(args.vectors, args.key)
    metric = _metric(args, vectors)
    ids = None if args.ids_from is None else read_ids(args.ids_from, args.vectors, vectors.rows)
    fits = plan(args, vectors)
    talk.say("read", f"{vectors.name}: {vectors.rows:,} vectors of {vectors.d}")
    for warning in fits.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    index = _empty(args, vectors.d, metric, fits.nlist)
    seconds = {}
    if isinstance(index, IndexIVF):
        seconds["train"] = _train(args, talk, index, vectors, fits)
    seconds["add"] = _add(args, talk, index, vectors, fits, ids)
    began = time.perf_counter()
    write(index)
    seconds["save"] = time.perf_counter() - began
    size = args.index.stat().st_size
    talk.say("wrote", f"{args.index}: {shown_bytes(size)}", seconds["save"])
    facts = {"path": str(args.index), "class": type(index).__name__, **index.config(), "ntotal": index.ntotal}
    talk.result({**facts, "left_out": fits.left_out, "bytes": size, "seconds": seconds})
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    lists = {"--nlist": args.nlist, "--nprobe": args.nprobe, "--train-rows": args.train_rows}
    if args.bits and args.dtype != "float32":
        raise ValueError(f"--bits {args.bits} stores codes, which have no --dtype {args.dtype}: leave one of them out")
    if args.flat and any(lists.values()):
        raise ValueError(f"--flat has no lists: leave out {', '.join(name for name in lists if lists[name])}")


def _metric(args: argparse.Namespace, vectors: Vectors) -> str:
    metric: str = args.metric or vectors.metric or "l2"
    if metric not in METRICS:
        raise ValueError(f"{args.vectors} is of vectors by {metric!r}, which there is not: choose a --metric")
    return metric


def _empty(args: argparse.Namespace, d: int, metric: str, nlist: int) -> IndexBase:
    where: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    if args.bits and args.flat:
        return IndexScalarQuantizer(d, args.bits, metric, **where)
    if args.bits:
        return IndexIVFScalarQuantizer(d, nlist, args.nprobe, metric, bits=args.bits, **where)
    if args.flat:
        kinds = {"l2": IndexFlatL2, "ip": IndexFlatIP}
        return kinds[metric](d, **where) if metric in kinds else IndexFlat(d, metric, **where)
    return IndexIVFFlat(d, nlist=nlist, nprobe=args.nprobe, metric=metric, **where)


def _train(args: argparse.Namespace, talk: Reporter, index: IndexIVF, vectors: Vectors, fits: Plan) -> float:
    began = time.perf_counter()
    sample = vectors.sample(fits.sample, fits.rows, fits.batch, args.seed, lambda parts: talk.progress(parts, "sample"))
    index.fit(sample.to(args.device), niter=args.niter, seed=args.seed, verbose=sys.stderr.isatty())
    seconds = time.perf_counter() - began
    talk.say("train", f"{index.nlist:,} lists on {sample.shape[0]:,} rows, metric {index.metric}", seconds)
    return seconds


def _add(
    args: argparse.Namespace, talk: Reporter, index: IndexBase, vectors: Vectors, fits: Plan, ids: Tensor | None
) -> float:
    began = time.perf_counter()
    start = 0
    batches = -(-fits.rows // fits.batch)
    for batch in talk.progress(vectors.batches(fits.batch, fits.rows), "add", total=batches):
        end = start + batch.shape[0]
        try:
            if ids is None:
                index.add(batch.to(args.device))
            else:
                index.add_with_ids(batch.to(args.device), ids[start:end].to(args.device))
        except (TypeError, ValueError) as error:
            raise ValueError(f"rows {start:,} to {end - 1:,} of {vectors.name}: {error}") from error
        start = end
    seconds = time.perf_counter() - began
    talk.say("add", f"{index.ntotal:,} vectors", seconds)
    return seconds
