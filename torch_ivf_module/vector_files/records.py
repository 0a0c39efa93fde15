"""Plain binary files of vectors: those of TEXMEX (``.fvecs`` and the like) and of big-ann-benchmarks (``.fbin``).

n rows, d dim.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import Array, BadData, Contents

__all__ = ["matrix", "vecs"]


def vecs(item: str) -> Callable[[Path], Contents]:
    """A reader of TEXMEX files: for each vector its dimension as int32, then its numbers of type `item`."""
    number = np.dtype(item)

    def open_vecs(path: Path) -> Contents:
        size = path.stat().st_size
        if size < 4:
            raise BadData(f"{path} is empty")
        d = int(np.fromfile(path, np.dtype("<i4"), 1)[0])
        if d < 1 or size % (4 + d * number.itemsize):
            raise BadData(f"{path} is damaged: {size:,} bytes are no whole number of vectors of {d}")
        held = np.memmap(path, np.dtype([("d", "<i4"), ("x", item, (d,))]), mode="r")

        def read(start: int, end: int) -> Any:
            part = held[start:end]
            wrong = np.flatnonzero(part["d"] != d)
            if wrong.size:
                raise BadData(f"{path} is damaged: row {start + wrong[0]} does not have {d} numbers, as row 0 has")
            return part["x"]

        return Contents({"": Array((held.shape[0], d), number.kind, read)})

    return open_vecs


def matrix(item: str, *, distances: bool = False) -> Callable[[Path], Contents]:
    """A reader of big-ann-benchmarks' files: n and d as uint32, then n * d numbers of type `item`.

    In a file of neighbours as many float32 `distances` may follow; they are left alone.
    """
    number = np.dtype(item)

    def open_matrix(path: Path) -> Contents:
        size = path.stat().st_size
        if size < 8:
            raise BadData(f"{path} is damaged: {size} bytes are too few for the header, n and d as uint32")
        n, d = (int(value) for value in np.fromfile(path, np.dtype("<u4"), 2))
        expected = 8 + n * d * number.itemsize
        if d < 1 or size not in (expected, expected + 4 * n * d * distances):
            told = f"its header says {n:,} rows of {d}, which take {expected:,} bytes, but it has {size:,}"
            raise BadData(f"{path} is damaged: {told}")
        held = np.memmap(path, number, "r", 8, (n, d)) if n else np.empty((0, d), number)
        return Contents({"": Array((n, d), number.kind, lambda start, end: held[start:end])})

    return open_matrix
