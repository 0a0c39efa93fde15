"""Vectors in files, read a piece at a time, so that a file larger than memory can be read at all.

N rows, d dim.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._arrays import floats
from .kinds import Array, BadData, Contents, checked, open_file

__all__ = ["Vectors", "open_vectors", "titled", "vectors_of"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # as an index takes them


class Vectors(NamedTuple):
    """The vectors in a file."""

    name: str  # of the file, and of the array where the file holds several
    rows: int
    d: int
    read: Callable[[int, int], Tensor]  # rows start:end as floats (end - start, d), of the caller's own
    truth: Tensor | None = None  # the ids of the true neighbours of each row, where the file knows them
    metric: str | None = None  # that these are true by, where the file says; a name of its own if it is not one of ours

    def batches(self, size: int, rows: int | None = None) -> Iterator[Tensor]:
        """The first `rows` rows, or all of them, `size` at a time."""
        rows = self.rows if rows is None else rows
        for start in range(0, rows, size):
            yield self.read(start, min(start + size, rows))

    def take(self, numbers: Tensor, size: int) -> Iterator[Tensor]:
        """The rows with ascending numbers (n,), as many at a time as there are among `size` rows of the file.

        BadData names a row that float32 does not hold as finite numbers by its number in the file.
        """
        ends = torch.searchsorted(numbers, torch.arange(size, self.rows + size, size, device="cpu")).tolist()
        for first, last in zip([0, *ends], ends, strict=False):
            mine = numbers[first:last]
            if mine.shape[0]:
                start, end = int(mine[0]), int(mine[-1]) + 1
                part = self.read(start, end)[mine - start]
                bad = mine[~torch.isfinite(part.float()).all(1)]
                if bad.shape[0]:
                    raise BadData(f"{self.name} cannot be trained on: row {bad[0]} holds NaN, inf or beyond float32")
                yield part


def vectors_of(x: object) -> Vectors:
    """The rows of a tensor or an array (n, d), which is called `vectors` in messages.

    >>> vectors_of(np.eye(3, dtype=np.float32)).read(1, 2)
    tensor([[0., 1., 0.]])
    """
    held = floats(x, "vectors")
    if held.dim() != 2 or held.shape[1] < 1:
        raise ValueError(f"vectors must have shape (n, d), got {tuple(held.shape)}")
    return Vectors("vectors", held.shape[0], held.shape[1], lambda start, end: held[start:end].detach().cpu().clone())


def open_vectors(path: str | os.PathLike[str], key: str | None = None, *, role: str = "train") -> Vectors:
    """The vectors in a file, of the kind that its suffix says (one of formats.KINDS); nothing in it is executed.

    `key` names the array in a file that holds several, ``group/dataset`` in HDF5, a column in Parquet. Without it that
    is the one called `role` ("train" or "test", as in the HDF5 files of ann-benchmarks), or the only two-dimensional
    one. Raises FileNotFoundError, BadData (a ValueError) for a file that cannot be read as vectors or an array that
    is not there, ImportError naming a missing extra.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/vectors.npy", np.eye(3, dtype=np.float32))
    ...     open_vectors(f"{folder}/vectors.npy").read(1, 2)
    tensor([[0., 1., 0.]])
    """
    path = Path(path)
    contents = open_file(path)
    if key is None and "" in contents.arrays:
        key = ""
    name = contents.choose(path, _plane, key, [role], "an array of shape (n, d), alone or by a name")
    title = titled(path, name)
    array = checked(title, contents.arrays[name])
    if array.kind not in "fiu":
        raise BadData(f"{title} must hold floats or integers")
    if not _plane(array) or array.shape[1] < 1:
        raise BadData(f"{title} must have shape (n, d), got {array.shape}")
    read = checked(title, array._replace(read=lambda start, end: _floats(array.read(start, end)))).read
    rows, d = array.shape
    return Vectors(title, rows, d, read, _truth(contents, name), contents.metric)


def titled(path: Path, name: str) -> str:
    """What an array is called in messages."""
    return f"{path}, {name!r}" if name else str(path)


def _plane(array: Array) -> bool:
    return len(array.shape) == 2


def _truth(contents: Contents, name: str) -> Tensor | None:
    """The neighbours of the vectors called `test`, or ``group/test``, in ann-benchmarks' layout."""
    place, slash, last = name.rpartition("/")
    truth = contents.arrays.get(f"{place}{slash}neighbors")
    if last != "test" or truth is None or truth.kind not in "iu" or truth.shape[:1] != contents.arrays[name].shape[:1]:
        return None
    return torch.from_numpy(np.asarray(truth.read(0, truth.shape[0])).astype(np.int64))


def _floats(part: Any) -> Tensor:
    """An array or tensor as a tensor of floats of its own: of its own precision where an index takes it, or the nearest
    that it does; float32 for integers."""
    if isinstance(part, Tensor):
        return part.clone() if part.dtype in _FLOATS else part.float()
    array = np.asarray(part)
    if array.dtype.kind != "f":
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(array.astype(f"=f{min(array.dtype.itemsize, 8)}"))
