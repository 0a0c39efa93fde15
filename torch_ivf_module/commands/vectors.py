"""Files of vectors, read a piece at a time, so that one larger than memory can be read at all.

N rows, d dim.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._optional import require
from .common import check_source

__all__ = ["KINDS", "Vectors", "open_vectors"]


Found = TypeVar("Found")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # as an index takes them
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
_DISTANCES = {"euclidean": "l2", "angular": "cosine", "ip": "ip", "dot": "ip"}  # of ann-benchmarks, as metrics


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

    def sample(self, count: int, rows: int, size: int, seed: int, progress: Callable[[Any], Any] = iter) -> Tensor:
        """`count` of the first `rows` rows as float32, chosen at random and in their order; read `size` at a time.

        BadVectors names a row that is not finite by its number in the file.
        """
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(rows, generator=generator)[:count].sort().values
        found, filled = torch.empty(chosen.shape[0], self.d), 0
        for start in progress(range(0, rows, size)):
            mine = chosen[(chosen >= start) & (chosen < start + size)]
            if mine.shape[0]:
                part = found[filled : filled + mine.shape[0]]
                part.copy_(self.read(start, min(start + size, rows))[mine - start])
                bad = mine[~torch.isfinite(part).all(1)]
                if bad.shape[0]:
                    raise BadVectors(f"{self.name} cannot be trained on: row {bad[0]} holds NaN, inf or beyond float32")
                filled += mine.shape[0]
        return found


def open_vectors(path: str | os.PathLike[str], key: str | None = None, *, role: str = "train") -> Vectors:
    """The vectors in a file, of the kind that its suffix says (one of KINDS); nothing in it is executed.

    `key` names the array in a file that holds several. Without it that is the only two-dimensional one, or the one
    called `role` ("train" or "test", as in the HDF5 files of ann-benchmarks). Raises FileNotFoundError, ValueError
    for a file that cannot be read as vectors or an array that is not there, ImportError naming a missing extra.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/vectors.npy", np.eye(3, dtype=np.float32))
    ...     open_vectors(f"{folder}/vectors.npy").read(1, 2)
    tensor([[0., 1., 0.]])
    """
    path = Path(path)
    check_source(path)
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{path} must end in one of {', '.join(KINDS)}")
    return _reading(str(path), lambda: KINDS[kind](path, key, role))


class BadVectors(ValueError):
    """A file that holds no vectors, or not those that were asked for; the text says why."""


def _reading(name: str, read: Callable[[], Found]) -> Found:
    """The result of `read`, whose errors become BadVectors."""
    try:
        return read()
    except (BadVectors, ImportError, MemoryError):
        raise
    except Exception as error:  # the readers raise a dozen kinds for damage, all of them meaning the same here
        raise BadVectors(f"{name} cannot be read as vectors: {error}") from error


def _checked(name: str, shape: Iterable[int], kind: str, read: Callable[[int, int], Any], **more: Any) -> Vectors:
    """Vectors of an array of this shape and kind of numbers (as numpy has them), if it is one of vectors."""
    shape = tuple(shape)
    if len(shape) != 2 or shape[1] < 1:
        raise BadVectors(f"{name} must have shape (n, d), got {shape}")
    if kind not in "fiu":
        raise BadVectors(f"{name} must hold floats or integers")

    def floats(start: int, end: int) -> Tensor:
        return _reading(name, lambda: _floats(read(start, end)))

    return Vectors(name, shape[0], shape[1], floats, **more)


def _floats(part: Any) -> Tensor:
    """An array or tensor as a tensor of floats of its own: of its own precision where an index takes it, or the nearest
    that it does; float32 for integers."""
    if isinstance(part, Tensor):
        return part.clone() if part.dtype in _FLOATS else part.float()
    array = np.asarray(part)
    if array.dtype.kind != "f":
        return torch.from_numpy(array.astype(np.float32))
    return torch.from_numpy(array.astype(f"=f{min(array.dtype.itemsize, 8)}"))


def _npy(path: Path, key: str | None, role: str) -> Vectors:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return _checked(str(path), array.shape, array.dtype.kind, lambda start, end: array[start:end])


def _npz(path: Path, key: str | None, role: str) -> Vectors:
    """An array of an archive; compressed ones too are read as they are unpacked, never as a whole."""
    archive = zipfile.ZipFile(path)
    headers = {}
    for name in archive.namelist():
        with archive.open(name) as file:
            major = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if major == (1, 0) else np.lib.format.read_array_header_2_0
            headers[name.removesuffix(".npy")] = (name, *header(file), file.tell())
    name = _chosen(path, {name: shape for name, (_, shape, *_) in headers.items()}, key, role)
    member, shape, by_column, dtype, begin = headers[name]
    if by_column:
        raise BadVectors(f"{path}, {name!r} is stored by columns; save np.ascontiguousarray of it")
    stream = archive.open(member)

    def read(start: int, end: int) -> Any:
        width = shape[1] * dtype.itemsize
        stream.seek(begin + start * width)
        part = stream.read((end - start) * width)
        if len(part) != (end - start) * width:
            raise BadVectors(f"{path}, {name!r} ends before row {end}")
        return np.frombuffer(part, dtype).reshape(end - start, shape[1])

    return _checked(f"{path}, {name!r}", shape, dtype.kind, read)


def _pt(path: Path, key: str | None, role: str) -> Vectors:
    with warnings.catch_warnings():
        # torch 2.14 says that it checks sparse tensors, which are refused below.
        warnings.filterwarnings("ignore", message="Validating sparse tensor", category=UserWarning)
        # What torch wrote before 1.6 is no archive, and cannot be mapped.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    if isinstance(held, Tensor):
        held = {"": held}
    if not isinstance(held, dict):
        raise BadVectors(f"{path} must hold a tensor or a dict of tensors, got {type(held).__name__}")
    tensors = {name: value for name, value in held.items() if isinstance(name, str) and isinstance(value, Tensor)}
    name = _chosen(path, {name: tensor.shape for name, tensor in tensors.items()}, key, role)
    tensor = tensors[name]
    if tensor.layout != torch.strided:
        raise BadVectors(f"{_title(path, name)} is sparse; save its to_dense()")
    return _checked(_title(path, name), tensor.shape, _kind(tensor.dtype), lambda start, end: tensor[start:end])


def _kind(dtype: torch.dtype) -> str:
    """The kind of numbers, as numpy has them."""
    return "f" if dtype in _FLOATS or str(dtype).startswith("torch.float8") else "i" if dtype in _WHOLE else "?"


def _safetensors(path: Path, key: str | None, role: str) -> Vectors:
    file = require("safetensors", "safetensors").safe_open(path, framework="pt")
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    name = _chosen(path, {name: part.get_shape() for name, part in slices.items()}, key, role)
    shape, part = slices[name].get_shape(), slices[name]
    kind = _kind(part[:0].dtype) if len(shape) == 2 else "f"
    return _checked(_title(path, name), shape, kind, lambda start, end: part[start:end])


def _records(item: Any) -> Callable[[Path, str | None, str], Vectors]:
    """A reader of TEXMEX files: for each vector its dimension as int32, then its numbers of type `item`."""

    def open_records(path: Path, key: str | None, role: str) -> Vectors:
        size = path.stat().st_size
        if size < 4:
            raise BadVectors(f"{path} is empty")
        d = int(np.fromfile(path, np.dtype("<i4"), 1)[0])
        record = 4 + d * np.dtype(item).itemsize
        if d < 1 or size % record:
            raise BadVectors(f"{path} is damaged: {size:,} bytes are no whole number of vectors of {d}")
        held = np.memmap(path, np.dtype([("d", "<i4"), ("x", item, (d,))]), mode="r")

        def read(start: int, end: int) -> Any:
            part = held[start:end]
            wrong = np.flatnonzero(part["d"] != d)
            if wrong.size:
                raise BadVectors(f"{path} is damaged: row {start + wrong[0]} is not of {d} numbers as row 0 is")
            return part["x"]

        return _checked(str(path), (held.shape[0], d), np.dtype(item).kind, read)

    return open_records


def _hdf5(path: Path, key: str | None, role: str) -> Vectors:
    """A dataset of an HDF5 file, in ann-benchmarks' layout: train, test, and neighbors of the latter."""
    library = require("h5py", "hdf5")
    file = library.File(path, "r")
    arrays = {name: item for name, item in file.items() if isinstance(item, library.Dataset)}
    name = _chosen(path, {name: array.shape for name, array in arrays.items()}, key, role)
    array, truth = arrays[name], None
    if name == "test" and "neighbors" in arrays and arrays["neighbors"].shape[:1] == array.shape[:1]:
        truth = torch.from_numpy(arrays["neighbors"][:].astype(np.int64))
    said = file.attrs.get("distance")
    said = said.decode() if isinstance(said, bytes) else said
    metric = _DISTANCES.get(said, said) if isinstance(said, str) else None

    def read(start: int, end: int) -> Any:
        return array[start:end]

    return _checked(_title(path, name), array.shape, array.dtype.kind, read, truth=truth, metric=metric)


def _chosen(path: Path, shapes: Mapping[str, Iterable[int]], key: str | None, role: str) -> str:
    """The name of the array that is meant."""
    plane = [name for name, shape in shapes.items() if len(tuple(shape)) == 2]
    if key is None:
        key = role if role in plane else plane[0] if len(plane) == 1 else None
    if key is None and not plane:
        raise BadVectors(f"{path} must hold an array of shape (n, d), alone or by a name, got {_listed(shapes)}")
    if key is None:
        raise BadVectors(f"{path} holds {_listed(plane)}: say which with --key")
    if key not in shapes:
        raise BadVectors(f"{path} holds no {key!r}, but {_listed(shapes)}")
    return key


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "no array"


def _title(path: Path, name: str) -> str:
    return f"{path}, {name!r}" if name else str(path)


KINDS: dict[str, Callable[[Path, str | None, str], Vectors]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".pt": _pt,
    ".pth": _pt,
    ".safetensors": _safetensors,
    ".fvecs": _records("<f4"),
    ".bvecs": _records("u1"),
    ".hdf5": _hdf5,
    ".h5": _hdf5,
}
