"""Indexes in files and arrays of bytes: this library's format, which `torch_ivf_module.load` opens, or faiss's."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy

from .. import checkpoint
from .._optional import require
from ..faiss_bridge import is_file
from ..faiss_export import to_faiss
from .arrays import Unsupported, faiss_errors
from .base import Index
from .extract import try_extract_index_ivf
from .in_place import installed
from .vectors import Vector, vector_to_array
from .wrapping import class_names, wrap

# faiss's flags; those that are not about mapping have no effect.
IO_FLAG_READ_ONLY, IO_FLAG_ONDISK_SAME_DIR, IO_FLAG_SKIP_PRECOMPUTE_TABLE = 2, 4, 16
IO_FLAG_MMAP, IO_FLAG_MMAP_IFC = 0x646F0008, 512
_OURS, _FAISS = "torch_ivf_module", "faiss"


class PyCallbackIOWriter:
    """Writes an index by calling a function with bytes, as ``file.write``; the size of the parts has no effect."""

    def __init__(self, callback: Callable[[bytes], Any], bs: int = 0) -> None:
        self.write = callback


class PyCallbackIOReader:
    """Reads an index by calling a function with a number of bytes, as ``file.read``."""

    def __init__(self, callback: Callable[[int], bytes], bs: int = 1 << 20) -> None:
        self._callback, self._most = callback, bs

    def read(self) -> bytes:
        """All remaining bytes."""
        return b"".join(iter(lambda: self._callback(self._most), b""))


class VectorIOWriter:
    """Writes an index into `data`, an array of uint8."""

    def __init__(self) -> None:
        self.data: Any = numpy.zeros(0, "uint8")

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self.data = numpy.concatenate([self.data, numpy.frombuffer(data, "uint8")])


class VectorIOReader:
    """Reads an index from `data`, an array of uint8, which `copy_array_to_vector` sets too."""

    def __init__(self) -> None:
        self.data = Vector(numpy.zeros(0, "uint8"), self._take)

    def read(self) -> bytes:
        """All remaining bytes."""
        return vector_to_array(self.data).tobytes()

    def _take(self, data: Any) -> None:
        self.data = Vector(data, self._take)


def BufferedIOWriter(writer: Any, bsz: int = 0) -> Any:
    """The writer itself: an index is written at once."""
    return writer


def BufferedIOReader(reader: Any, bsz: int = 0) -> Any:
    """The reader itself: an index is read at once."""
    return reader


def write_index(index: Index, target: Any, io_flags: int = 0, *, format: str = _OURS) -> None:
    """Write an index to a path, or to a writer such as `PyCallbackIOWriter`.

    `format` is "torch_ivf_module", for `torch_ivf_module.load`, or "faiss" (extra `faiss`), for `read_index` of faiss.
    Raises RuntimeError for an index with untrained transforms or a path that cannot be written.
    """
    if hasattr(target, "write"):
        target.write(serialize_index(index, format=format).tobytes())
        return
    with faiss_errors():
        module = index.module
    path = os.fspath(target)
    try:
        if format == _FAISS:
            ivf = try_extract_index_ivf(index)
            if ivf is not None and ivf.quantizer.metric_type != ivf.metric_type:
                raise Unsupported("format='faiss' needs an inverted file whose quantizer has the same metric")
            _real_faiss().write_index(to_faiss(module), path)
        elif format == _OURS:
            checkpoint.save(module, path, {"faiss_compat": class_names(index)})
        else:
            raise ValueError(f"format must be {_OURS!r} or {_FAISS!r}, got {format!r}")
    except OSError as error:
        raise RuntimeError(f"{path} cannot be written: {error}") from error


def read_index(source: Any, io_flags: int = 0) -> Index:
    """Read an index from a file of this library or (extra `faiss`) of faiss, or from a reader.

    With the flag IO_FLAG_MMAP or IO_FLAG_MMAP_IFC, the vectors of a file of this library are mapped. Raises
    RuntimeError if there is no such file, or if it is not an index.
    """
    if hasattr(source, "read"):
        return deserialize_index(numpy.frombuffer(source.read(), "uint8"))
    path = os.fspath(source)
    try:
        if is_file(path):
            _real_faiss()
        mapped = io_flags & IO_FLAG_MMAP == IO_FLAG_MMAP or bool(io_flags & IO_FLAG_MMAP_IFC)
        module = checkpoint.load(path, mmap=mapped and not is_file(path))
        return wrap(module, checkpoint.notes_in(path).get("faiss_compat", ()))
    except (OSError, checkpoint.BadFile) as error:
        raise RuntimeError(f"{path} cannot be read: {error}") from error


def serialize_index(index: Index, io_flags: int = 0, *, format: str = _OURS) -> Any:
    """The bytes of a file of an index: an array (n,) of uint8. See `write_index`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.bin")
        write_index(index, path, io_flags, format=format)
        return numpy.fromfile(path, "uint8")


def deserialize_index(data: Any, io_flags: int = 0) -> Index:
    """The index in an array (n,) of uint8. See `read_index`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "index.bin")
        numpy.asarray(data, "uint8").tofile(path)
        return read_index(path)


def clone_index(index: Index) -> Index:
    """A copy of an index that shares nothing with it."""
    return copy.deepcopy(index)


def _real_faiss() -> Any:
    """faiss itself. RuntimeError while this package has its name."""
    if installed():
        raise RuntimeError("files of faiss need faiss, which install() has replaced: call uninstall() first")
    return require("faiss", "faiss")
