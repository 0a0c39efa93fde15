"""What building an index takes of memory, and how much of a file of vectors fits.

N rows, S rows of the sample, d dim.
"""

from __future__ import annotations

import argparse
import math
from typing import NamedTuple

import torch

from .._optional import require
from ..functional.row_codes import width
from .advice import FEWEST_ROWS, nlist_for
from .common import shown_bytes
from .vectors import Vectors

__all__ = ["Plan", "plan"]

# How far the memory that is not of files grew (RssAnon): training took 3.1 to 3.2 times the sample as float32 (the
# sample, it about its origin, and the squares) by l2 and cosine; adding 2.4 to 2.6 times 98 MiB of finished vectors of
# 128 numbers (waiting, packed, new lists), of any dtype, flat or not, in batches of 8,192 and 65,536, and by the 93 to
# 143 bytes that rows of 8 numbers took, 60 a row for ids and numbers of lists; cosine two batches of float64 more.
_TRAINING, _ADDING, _READING = 3.25, 2.7, 3.0
_ROW = 64
_BESIDES = 32 << 20  # what the allocator keeps of freed blocks: 43 MiB at most, of limits of 100 to 260 MiB
_SPARE = 0.9  # of the free memory
_BATCH, _KEPT = 1 / 8, 1 / 4  # of memory: the most that a batch and what the allocator keeps are taken for


class Plan(NamedTuple):
    """How an index is built within memory."""

    rows: int  # of the file, from the first
    left_out: int  # of those asked for
    nlist: int  # 0 of a flat index
    sample: int  # rows to train on
    batch: int  # rows to read at a time
    warnings: list[str]  # of what is left out


def plan(args: argparse.Namespace, vectors: Vectors) -> Plan:
    """What fits of what the arguments of `build` ask for: a smaller sample goes before fewer rows."""
    memory = _memory(args)
    asked = min(vectors.rows, args.rows or vectors.rows)
    reading = _READING * vectors.d * vectors.read(0, 0).element_size()
    batch = max(1, int(min(args.batch, asked, memory * _BATCH / reading)))
    room = memory - min(_BESIDES, memory * _KEPT) - batch * reading
    rows = _fit(asked, room, _row_bytes(vectors.d, args.dtype, args.bits))
    if rows < 1 <= asked:
        raise ValueError(f"{shown_bytes(memory)} of memory are too little to index one vector of {vectors.d}")
    nlist = 0 if args.flat else args.nlist or nlist_for(rows)
    wanted = min(rows, args.train_rows or 256 * nlist)
    sample = _fit(wanted, room, _TRAINING * 4 * vectors.d + _ROW)
    may = "--max-memory allows" if args.max_memory else "memory is free for"
    warnings = [] if rows == asked else [_rows_left_out(args, vectors.d, asked, rows, room, may)]
    if sample < min(wanted, nlist):
        raise ValueError(f"{may} training on {sample:,} rows, and {nlist:,} lists need as many: take a smaller --nlist")
    if sample < min(wanted, FEWEST_ROWS * nlist):
        warnings.append(f"{may} training on {sample:,} rows of {wanted:,}, which is few for {nlist:,} lists")
    return Plan(rows, asked - rows, nlist, sample, batch, warnings)


def _memory(args: argparse.Namespace) -> float:
    if args.max_memory is not None:
        return float(args.max_memory)
    if args.device.type != "cpu":
        return math.inf
    return _SPARE * float(require("psutil", "cli").virtual_memory().available)


def _row_bytes(d: int, dtype: str, bits: int | None) -> float:
    """Memory that adding takes for each row, of floats of a dtype or codes of so many bits."""
    return _ADDING * (width(d, bits) if bits else d * getattr(torch, dtype).itemsize) + _ROW


def _fit(wanted: int, room: float, each: float) -> int:
    return int(max(0, min(wanted, room / each)))


def _rows_left_out(args: argparse.Namespace, d: int, asked: int, rows: int, room: float, may: str) -> str:
    more = shown_bytes(asked * _row_bytes(d, args.dtype, args.bits))
    text = f"an index of {asked:,} rows takes about {more} to build; {may} {rows:,}, and the index holds only those: "
    text += f"the first {rows / asked:.0%}."
    if args.dtype == "float32" and not args.bits:
        half, codes = (_fit(asked, room, _row_bytes(d, "float16", bits)) for bits in (None, 8))
        text += f" With --dtype float16 it would hold {half:,}, with --bits 8 {codes:,}."
    return text
