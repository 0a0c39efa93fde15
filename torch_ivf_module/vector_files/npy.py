"""NumPy's files: ``.npy`` by its map, ``.npz`` as its members are unpacked."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from .arrays import Array, BadData, Contents

__all__ = ["npy", "npz"]


def npy(path: Path) -> Contents:
    """The array of a ``.npy`` file."""
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return Contents({"": Array(array.shape, array.dtype.kind, lambda start, end: array[start:end])})


def npz(path: Path) -> Contents:
    """The arrays of an archive; compressed ones too are read as they are unpacked, never as a whole."""
    archive = zipfile.ZipFile(path)
    return Contents({name.removesuffix(".npy"): _member(archive, name) for name in archive.namelist()})


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as file:
        major = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0 if major == (1, 0) else np.lib.format.read_array_header_2_0
        shape, by_column, dtype = header(file)
        begin = file.tell()
    opened: list[IO[bytes]] = []

    def read(start: int, end: int) -> Any:
        if not opened:
            opened.append(archive.open(name))
        width = int(np.prod(shape[1:])) * dtype.itemsize
        opened[0].seek(begin + start * width)
        part = opened[0].read((end - start) * width)
        if len(part) != (end - start) * width:
            raise BadData(f"{archive.filename}, {name.removesuffix('.npy')!r} ends before row {end}")
        return np.frombuffer(part, dtype).reshape(end - start, *shape[1:])

    by_column = by_column and len(shape) > 1
    problem = "is stored by columns; save np.ascontiguousarray of it" if by_column else ""
    return Array(shape, dtype.kind, read, problem)
