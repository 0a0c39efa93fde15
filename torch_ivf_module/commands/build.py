"""``build``: a file of vectors becomes a saved index, read in batches."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._optional import require
from ..functional.metric import METRICS
from ..index import IndexFlat, IndexFlatIP, IndexFlatL2, IndexIVFFlat
from ..index.base import IndexBase
from .advice import nlist_for
from .common import Talk, add_json, positive, read_bytes, shown_bytes, usable_device
from .vectors import Vectors, open_vectors

__all__ = ["add_arguments", "run"]

# Times the finished size that building takes at its peak, when waiting rows, packed rows and the new lists are all
# there: the process grew by 2.4 to 2.7 times 400 MB of vectors, flat or not, float32 or float16, in any batches.
_PEAK = 2.8
_SPARE = 0.9  # of the free memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `build`."""
    option = parser.add_argument
    option("vectors", type=Path, help=".npy, .npz, .pt, .safetensors, .fvecs, .bvecs or .hdf5")
    option("index", type=Path, help="the index to write; .safetensors by suffix")
    option("--key", help="the array of a file that holds several")
    option("--metric", choices=METRICS, default="l2", help="default: %(default)s")
    option("--flat", action="store_true", help="exhaustive search instead of an inverted file")
    option("--nlist", type=positive, help="lists (default: 4 * sqrt(rows))")
    option("--nprobe", type=positive, help="lists that a query reads (default: 8)")
    option("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")
    option("--ids", type=Path, metavar="FILE.npy", help="an int64 id for each row (default: 0, 1, 2, …)")
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
    talk = Talk(args)
    if not args.index.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {args.index.parent}")
    vectors = open_vectors(args.vectors, args.key)
    asked = min(vectors.rows, args.rows or vectors.rows)
    ids = _read_ids(args.ids, vectors.rows)
    rows = _rows_that_fit(args, vectors, asked)
    talk.say("read", f"{vectors.name}: {vectors.rows:,} vectors of {vectors.d}")
    if rows < asked:
        print(f"warning: {_does_not_fit(args, vectors, asked, rows)}", file=sys.stderr)
    index = _empty(args, vectors.d, rows)
    seconds = {}
    if isinstance(index, IndexIVFFlat):
        seconds["train"] = _train(args, talk, index, vectors, rows)
    seconds["add"] = _add(args, talk, index, vectors, rows, ids)
    began = time.perf_counter()
    index.save(args.index)
    seconds["save"] = time.perf_counter() - began
    size = args.index.stat().st_size
    talk.say("wrote", f"{args.index}: {shown_bytes(size)}", seconds["save"])
    facts = {"path": str(args.index), "class": type(index).__name__, **index.config(), "ntotal": index.ntotal}
    talk.result({**facts, "left_out": asked - rows, "bytes": size, "seconds": seconds})
    return 0


def _read_ids(path: Path | None, rows: int) -> Tensor | None:
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    ids = torch.from_numpy(np.load(path, allow_pickle=False))
    if ids.shape != (rows,):
        raise ValueError(f"{path} must hold one id for each of the {rows:,} rows, got shape {tuple(ids.shape)}")
    return ids


def _row_bytes(args: argparse.Namespace, d: int) -> float:
    """Memory that building takes for each row."""
    return _PEAK * (d * getattr(torch, args.dtype).itemsize + 8)


def _rows_that_fit(args: argparse.Namespace, vectors: Vectors, rows: int) -> int:
    memory = args.max_memory
    if memory is None:
        if args.device.type != "cpu":
            return rows
        memory = int(_SPARE * require("psutil", "cli").virtual_memory().available)
    fit = int(memory / _row_bytes(args, vectors.d))
    if fit < 1 <= rows:
        raise ValueError(f"{shown_bytes(memory)} of memory hold not one vector of {vectors.d}")
    return min(rows, fit)


def _does_not_fit(args: argparse.Namespace, vectors: Vectors, asked: int, rows: int) -> str:
    needed = shown_bytes(asked * _row_bytes(args, vectors.d))
    which = "--max-memory allows" if args.max_memory else "memory is free for"
    return (
        f"building an index of {asked:,} rows takes about {needed}; {which} {rows:,}, and the index holds only those: "
        f"the first {rows / asked:.0%}. Half as much is needed with --dtype float16."
    )


def _empty(args: argparse.Namespace, d: int, rows: int) -> IndexBase:
    where: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    if args.flat:
        kinds = {"l2": IndexFlatL2, "ip": IndexFlatIP}
        return kinds[args.metric](d, **where) if args.metric in kinds else IndexFlat(d, args.metric, **where)
    return IndexIVFFlat(d, nlist=args.nlist or nlist_for(rows), nprobe=args.nprobe, metric=args.metric, **where)


def _train(args: argparse.Namespace, talk: Talk, index: IndexIVFFlat, vectors: Vectors, rows: int) -> float:
    began = time.perf_counter()
    wanted = min(rows, args.train_rows or 256 * index.nlist)
    sample = vectors.sample(wanted, rows, args.batch, args.seed, lambda parts: talk.progress(parts, "sample"))
    index.fit(sample.to(args.device), niter=args.niter, seed=args.seed, verbose=True)
    seconds = time.perf_counter() - began
    talk.say("train", f"{index.nlist:,} lists on {sample.shape[0]:,} rows, metric {index.metric}", seconds)
    return seconds


def _add(
    args: argparse.Namespace, talk: Talk, index: IndexBase, vectors: Vectors, rows: int, ids: Tensor | None
) -> float:
    began = time.perf_counter()
    start = 0
    batches = -(-rows // args.batch)
    for batch in talk.progress(vectors.batches(args.batch, rows), "add", total=batches):
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
