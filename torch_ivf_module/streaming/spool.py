"""Rows on their way from a file of vectors to a file of an index: sorted by list a batch at a time, then merged.

N rows, L lists, R batches, n rows of one batch, W entries of a stored row.
"""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..functional.lists import pack

__all__ = ["Drained", "Spool", "SpoolWriter", "as_bytes", "trim"]

_DIRTY = 16 << 20  # bytes written until the system is told to write them to the disk
_LIBRARY = ctypes.CDLL(None) if os.name == "posix" else None
COLUMNS = ("rows", "ids", "offsets")


class Drained(io.FileIO):
    """A file whose pages leave memory as it is written: a control group counts them as memory of the process, and
    unwritten ones cannot be freed when it is full."""

    _dirty = 0

    def write(self, data: object) -> int:
        """Write all of `data`."""
        left = memoryview(data).cast("B")  # type: ignore[arg-type]
        size = left.nbytes
        while left.nbytes:
            left = left[super().write(left) :]
        self._dirty += size
        if self._dirty >= _DIRTY:
            self._dirty = 0
            if hasattr(os, "posix_fadvise"):  # begins to write what is not written, and frees what is
                os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return size


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor."""
    return tensor.flatten().view(torch.uint8).numpy().data


def trim() -> None:
    """Give freed memory back to the system: glibc keeps blocks of up to 32 MiB where smaller ones lie behind them."""
    release = getattr(_LIBRARY, "malloc_trim", None)
    if release is not None:
        release(0)


class SpoolWriter:
    """Appends batches of rows to the files of a spool in a folder: each batch sorted by list, and where its lists are.
    """

    def __init__(self, folder: Path, nlist: int) -> None:
        folder.mkdir()
        self._nlist, self._rows = nlist, 0
        self._files = {name: Drained(folder / name, "w") for name in COLUMNS}

    def push(self, rows: Tensor, ids: Tensor, assigned: Tensor) -> None:
        """Append rows (n, W) with ids (n,) of the lists `assigned` (n,)."""
        packed, offsets, ids = pack(rows, ids, assigned, self._nlist)
        for name, tensor in zip(COLUMNS, (packed, ids, offsets + self._rows), strict=True):
            self._files[name].write(as_bytes(tensor.cpu()))
        self._rows += rows.shape[0]

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class _Batch(NamedTuple):
    """A batch in a spool."""

    folder: Path
    offsets: np.memmap  # (L + 1,): where each of its lists begins among the rows of the spool


class Spool:
    """The rows in one or several closed spools, one after another, in the order of their lists.

    As in an index the rows of a list are in the order in which they were written. `row` is a row of the index, an empty
    tensor (0, W).
    """

    def __init__(self, folders: list[Path], nlist: int, row: Tensor) -> None:
        # An empty tensor of each column, on the CPU.
        self.like = {"rows": row, "ids": torch.empty(0, dtype=torch.int64, device="cpu")}
        self._batches = [_Batch(folder, offsets) for folder in folders for offsets in _tables(folder, nlist)]
        sizes = np.zeros(nlist, dtype=np.int64)
        for batch in self._batches:
            sizes += np.diff(batch.offsets)
        self._offsets = np.concatenate([[0], sizes.cumsum()])

    @property
    def offsets(self) -> Tensor:
        """Where each list begins (L + 1,)."""
        return torch.from_numpy(self._offsets)

    def read(self, column: str, most: int, start: int = 0, end: int | None = None) -> Iterator[Tensor]:
        """The rows or ids, as `column` says, at the positions start:end of all, about `most` at a time."""
        at, end = start, int(self._offsets[-1]) if end is None else end
        while at < end:
            first = int(np.searchsorted(self._offsets, at, side="right")) - 1
            begin = int(self._offsets[first])
            last = max(first + 1, int(np.searchsorted(self._offsets, begin + most, side="right")) - 1)
            skipped = at - begin
            for piece in self._of_lists(column, first, last, most):
                wanted = piece[skipped : skipped + end - at]
                skipped -= min(skipped, piece.shape[0])
                at += wanted.shape[0]
                if wanted.shape[0]:
                    yield wanted
                if at == end:
                    return

    def _of_lists(self, column: str, first: int, last: int, most: int) -> Iterator[Tensor]:
        """The rows of the lists first:last, whole, or of one list in parts."""
        offsets = np.stack([batch.offsets[first : last + 1] for batch in self._batches])  # (R, lists + 1)
        ranges = list(zip(self._batches, offsets[:, 0].tolist(), offsets[:, -1].tolist(), strict=True))
        if last - first == 1:
            for batch, start, end in ranges:
                for part in range(start, end, most):
                    yield self._filled(column, [(batch, part, min(part + most, end))])
            return
        found = self._filled(column, ranges)
        lists = torch.from_numpy(np.tile(np.arange(last - first), len(ranges)))
        assigned = torch.repeat_interleave(lists, torch.from_numpy(np.diff(offsets).reshape(-1)))
        yield found.index_select(0, torch.sort(assigned.int(), stable=True).indices)

    def _filled(self, column: str, ranges: list[tuple[_Batch, int, int]]) -> Tensor:
        """The rows of these ranges of spools."""
        like = self.like[column]
        found = like.new_empty(sum(end - start for _, start, end in ranges), *like.shape[1:])
        left, width = as_bytes(found), like.element_size() * like.shape[1:].numel()
        files: dict[Path, io.FileIO] = {}
        try:
            for batch, start, end in ranges:
                if batch.folder not in files:
                    files[batch.folder] = io.FileIO(batch.folder / column)
                file, size = files[batch.folder], (end - start) * width
                file.seek(start * width)
                done = 0
                while done < size:
                    done += file.readinto(left[done:size]) or _cut(batch.folder)
                left = left[size:]
        finally:
            for file in files.values():
                file.close()
        return found


def _tables(folder: Path, nlist: int) -> np.ndarray:
    """The offsets of the batches in a folder (R, L + 1), mapped."""
    path = folder / "offsets"
    if not path.stat().st_size:
        return np.empty((0, nlist + 1), dtype=np.int64)
    return np.memmap(path, np.int64, "r").reshape(-1, nlist + 1)


def _cut(folder: Path) -> int:
    raise OSError(f"{folder} became shorter while an index was built from it")
