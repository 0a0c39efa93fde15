"""``convert``: an index in one kind of file into another."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch

from .. import faiss_bridge
from .._files import replace
from .._optional import require
from ..checkpoint import load
from .common import Talk, add_json, shown_bytes

__all__ = ["add_arguments", "run"]

FAISS = (".faiss", ".faissindex", ".index")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `convert`."""
    option = parser.add_argument
    option("source", type=Path, help="an index of this library, of torch-ivf, or of faiss (extra faiss)")
    option("target", type=Path, help=f".pt or .safetensors; {' or '.join(FAISS)} for faiss")
    option("--dtype", choices=("float32", "float16", "bfloat16"), help="of the stored vectors (default: as they are)")
    add_json(parser)


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    talk = Talk(args)
    index = load(args.source)
    if args.dtype is not None:
        inner = getattr(index, "index", index)
        inner.to(getattr(torch, args.dtype))
    if args.target.suffix in FAISS:
        faiss = require("faiss", "faiss")
        replace(args.target, functools.partial(faiss.write_index, faiss_bridge.to_faiss(index)))
    else:
        index.save(args.target)
    size = args.target.stat().st_size
    talk.say("read", f"{args.source}: {type(index).__name__} of {index.ntotal:,} vectors, {index.metric}")
    talk.say("wrote", f"{args.target}: {shown_bytes(size)}")
    facts: dict[str, Any] = {"source": str(args.source), "target": str(args.target), "class": type(index).__name__}
    talk.result({**facts, "ntotal": index.ntotal, "bytes": size})
    return 0
