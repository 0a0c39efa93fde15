"""``build``: a file of vectors becomes a saved index, read in batches."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from .._files import beside, check_target
from ..advice import nlist_for
from ..checkpoint import load
from ..functional.metric import METRICS
from ..functional.row_codes import BITS
from ..index import (
    IndexFlat,
    IndexFlatIP,
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexScalarQuantizer,
)
from ..index.base import IndexBase
from ..streaming import DEFAULT_MEMORY, Built, build_file
from ..vector_files import Vectors, ids_file, open_vectors
from .common import (
    FAISS,
    INDEX_FILES,
    VECTOR_FILES,
    Reporter,
    add_json,
    index_writer,
    positive,
    read_bytes,
    shown_bytes,
    usable_device,
)

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `build`."""
    option = parser.add_argument
    option("vectors", type=Path, help=f"the file of vectors: {VECTOR_FILES}")
    option("index", type=Path, help=f"the file to write: {INDEX_FILES}")
    option("--key", help="name of the array, if the file has several; in HDF5 group/dataset, in Parquet a column")
    option("--metric", choices=METRICS, help="default: that of the HDF5 file, or l2")
    option("--flat", action="store_true", help="build a flat index (exhaustive search) instead of an inverted file")
    option("--nlist", type=positive, help="number of lists (default: 4 * sqrt(rows))")
    option("--nprobe", type=positive, help="lists to probe per query, saved with the index (default: 8)")
    dtypes = ("float32", "float16", "bfloat16")
    option("--dtype", choices=dtypes, default="float32", help="dtype of the stored vectors (default: %(default)s)")
    option("--bits", type=int, choices=BITS, help="store codes with this many bits per number instead of floats")
    option(
        "--ids-from",
        "--ids",
        metavar="NAME|FILE",
        help="integer ids of the rows: the name of an array or column in the file of vectors, or another file (.npy, "
        ".ivecs, or any format of vectors) with one array, or with one called ids (default: 0, 1, 2, …)",
    )
    option("--rows", type=positive, help="use only the first ROWS rows (default: all)")
    option("--train-rows", type=positive, help="number of random rows for training (default: 256 per list)")
    option("--niter", type=positive, default=10, help="iterations of k-means (default: %(default)s)")
    option("--seed", type=int, default=1234, help="seed of the random sample and of training (default: %(default)s)")
    option("--batch", type=positive, help="rows read at a time (default: as many as memory allows)")
    option(
        "--max-memory",
        type=read_bytes,
        metavar="SIZE",
        default=DEFAULT_MEMORY,
        help=f"memory to use beyond that of Python and PyTorch, such as 8G (default: {shown_bytes(DEFAULT_MEMORY)})",
    )
    option("--device", type=usable_device, default="cpu", help="device for training and assigning (default: cpu)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Build, and say what was built."""
    talk = Reporter(args)
    check_target(args.index, args.vectors, ids_file(args.ids_from, args.vectors))
    write = index_writer(args.index)
    _check_flags(args)
    vectors = open_vectors(args.vectors, args.key)
    index = _empty(args, vectors)
    talk.say("read", f"{vectors.name}: {vectors.rows:,} vectors of {vectors.d}")
    if args.index.suffix.lower() in FAISS:  # which writes an index that is in memory
        with beside(args.index) as folder:
            built = _built(args, index, folder / "index.pt")
            write(load(folder / "index.pt", mmap=True))
    else:
        built = _built(args, index, args.index)
    size, seconds = args.index.stat().st_size, built.seconds
    config = built.index.config()
    if built.trained_on:
        text = f"{config['nlist']:,} lists on {built.trained_on:,} rows, metric {index.metric}"
        talk.say("train", text, seconds["train"])
    talk.say("assign", f"{built.ntotal:,} vectors", seconds["assign"])
    talk.say("wrote", f"{args.index}: {shown_bytes(size)}", seconds["write"])
    facts = {"path": str(args.index), "class": type(index).__name__, **config, "ntotal": built.ntotal}
    talk.result({**facts, "bytes": size, "seconds": seconds})
    return 0


def _built(args: argparse.Namespace, index: IndexBase, path: Path) -> Built:
    return build_file(
        args.vectors,
        path,
        index,
        key=args.key,
        ids=args.ids_from,
        rows=args.rows,
        train_rows=args.train_rows,
        niter=args.niter,
        seed=args.seed,
        batch=args.batch,
        max_memory=args.max_memory,
        verbose=sys.stderr.isatty(),
    )


def _check_flags(args: argparse.Namespace) -> None:
    lists = {"--nlist": args.nlist, "--nprobe": args.nprobe, "--train-rows": args.train_rows}
    if args.bits and args.dtype != "float32":
        raise ValueError(f"--bits {args.bits} and --dtype {args.dtype} exclude each other: leave one of them out")
    if args.flat and any(lists.values()):
        raise ValueError(f"a --flat index has no lists: leave out {', '.join(name for name in lists if lists[name])}")


def _metric(args: argparse.Namespace, vectors: Vectors) -> str:
    metric: str = args.metric or vectors.metric or "l2"
    if metric not in METRICS:
        raise ValueError(f"{args.vectors} has the metric {metric!r}, which is not supported: pass --metric")
    return metric


def _empty(args: argparse.Namespace, vectors: Vectors) -> IndexBase:
    where: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    d, metric = vectors.d, _metric(args, vectors)
    nlist = args.nlist or nlist_for(min(vectors.rows, args.rows or vectors.rows))
    if args.bits and args.flat:
        return IndexScalarQuantizer(d, args.bits, metric, **where)
    if args.bits:
        return IndexIVFScalarQuantizer(d, nlist, args.nprobe, metric, bits=args.bits, **where)
    if args.flat:
        kinds = {"l2": IndexFlatL2, "ip": IndexFlatIP}
        return kinds[metric](d, **where) if metric in kinds else IndexFlat(d, metric, **where)
    return IndexIVFFlat(d, nlist=nlist, nprobe=args.nprobe, metric=metric, **where)
