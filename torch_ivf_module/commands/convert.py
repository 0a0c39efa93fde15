"""``convert``: an index in one kind of file into another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from .._files import check_target
from ..checkpoint import load
from ..index import IndexPreTransform
from .common import INDEX_FILES, Reporter, add_json, index_writer, shown_bytes

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `convert`."""
    option = parser.add_argument
    option("source", type=Path, help="a file of this package, of torch-ivf, or of faiss (extra faiss)")
    option("target", type=Path, help=f"the file to write: {INDEX_FILES}")
    option("--dtype", choices=("float32", "float16", "bfloat16"), help="dtype of the vectors (default: unchanged)")
    add_json(parser)


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    talk = Reporter(args)
    check_target(args.target, args.source)
    write = index_writer(args.target)
    index = load(args.source)
    if args.dtype is not None:
        inner = index.index if isinstance(index, IndexPreTransform) else index
        if not inner.store.packed.is_floating_point():
            raise ValueError(f"{args.source} contains {inner.store.format.kind}, not floats: leave out --dtype")
        inner.to(getattr(torch, args.dtype))
    write(index)
    size = args.target.stat().st_size
    talk.say("read", f"{args.source}: {type(index).__name__} of {index.ntotal:,} vectors, {index.metric}")
    talk.say("wrote", f"{args.target}: {shown_bytes(size)}")
    facts: dict[str, Any] = {"source": str(args.source), "target": str(args.target), "class": type(index).__name__}
    talk.result({**facts, "ntotal": index.ntotal, "bytes": size})
    return 0
