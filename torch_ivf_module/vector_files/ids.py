"""Ids in files: those of the rows of an index, and those of the true neighbours of queries.

N rows, Q queries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .kinds import Array, BadData, Contents, checked, open_file
from .vectors import titled

__all__ = ["ids_file", "open_ids", "read_truth"]


def ids_file(source: str | None, vectors: Path) -> Path | None:
    """The file that `--ids-from` names, or None if that is an array of the file of vectors (or is not given)."""
    return None if source is None or source in open_file(vectors).arrays else Path(source)


def open_ids(source: str, vectors: Path, rows: int) -> Callable[[int, int], Tensor]:
    """What reads the ids of the rows start:end as int64: `source` is an array of the file of vectors, or another file.

    Raises FileNotFoundError for what is neither, BadData (a ValueError) for ids of a wrong number or kind; reading
    raises BadData for a wrong value.
    """
    contents = open_file(vectors)
    path, name = vectors, source
    if source not in contents.arrays:
        path = Path(source)
        if not path.is_file() and "" not in contents.arrays:
            names = ", ".join(map(repr, contents.arrays)) or "none"
            raise FileNotFoundError(f"--ids-from {source}: no such file, and no such array in {vectors}: {names}")
        contents = open_file(path, "int64", ndmin=1)
        name = contents.choose(path, _ids, _only(contents), ["ids", "id"], "integers of shape (n,)")
    title = titled(path, name)
    array = checked(title, contents.arrays[name])
    if not _whole(array):
        raise BadData(f"{title} must hold integers, got {_told(array)}")
    if not _ids(array) or max(array.shape) != rows:
        raise BadData(f"{title} must hold one id for each of the {rows:,} rows, got shape {array.shape}")
    if array.shape[0] == rows:
        return lambda start, end: _checked(title, start, np.asarray(array.read(start, end)).reshape(-1))
    return lambda start, end: _checked(title, start, _numbers(array).reshape(-1)[start:end])  # (1, N)


def read_truth(path: Path, queries: int, k: int) -> tuple[Tensor, str | None]:
    """The ids of the true neighbours of each query, (Q, k) int64, nearest first, and the metric that the file names.

    BadData (a ValueError) for a file that does not have as many rows as there are queries, of at least k ids.
    """
    contents = open_file(path, "int64")
    what = "integers of shape (queries, neighbours)"
    name = contents.choose(path, _neighbours, _only(contents), ["neighbors", "neighbours", "ids"], what)
    title = titled(path, name)
    array = checked(title, contents.arrays[name])
    if not _neighbours(array):
        raise BadData(f"{title} must hold {what}, got {_told(array)}")
    if array.shape[0] != queries:
        raise BadData(f"{title} holds the neighbours of {array.shape[0]:,} queries, but there are {queries:,}")
    if array.shape[1] < k:
        held = array.shape[1]
        raise BadData(f"{title} holds {held} neighbours of each query, but k is {k}: search with -k {held} or fewer")
    return torch.from_numpy(_numbers(array)[:, :k].astype(np.int64)), contents.metric


def _only(contents: Contents) -> str | None:
    """The name of the array of a file of one, whatever its shape; columns of text beside it do not count."""
    numbers = [name for name, array in contents.arrays.items() if array.kind != "?"] or list(contents.arrays)
    return numbers[0] if len(numbers) == 1 else None


def _whole(array: Array) -> bool:
    return array.kind in "iu"


def _ids(array: Array) -> bool:
    """Whether these can be the ids of rows: integers (N,), (N, 1) or (1, N)."""
    return _whole(array) and 1 <= len(array.shape) <= 2 and (len(array.shape) == 1 or 1 in array.shape)


def _neighbours(array: Array) -> bool:
    return _whole(array) and len(array.shape) == 2


def _told(array: Array) -> str:
    kinds = {"f": "floats", "i": "integers", "u": "integers"}
    return f"{kinds.get(array.kind, 'other values')} of shape {array.shape}"


def _numbers(array: Array) -> Any:
    return np.asarray(array.read(0, array.shape[0]))


def _checked(title: str, first: int, ids: Any) -> Tensor:
    wide = ids.astype(np.int64)  # in the machine's order of bytes
    refused = np.flatnonzero((wide == -1) | ((wide < 0) != (ids < 0)))
    if refused.size:
        raise BadData(f"{title} may hold any int64 but -1, got {ids[refused[0]]} for row {first + refused[0]}")
    return torch.from_numpy(wide)
