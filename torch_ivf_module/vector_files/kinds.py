"""Files of arrays: what is in them, by their suffix; a module for each family of formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .._files import check_source
from . import hdf5, npy, parquet, records, tensors
from .arrays import Array, BadData, Contents, checked, reading

__all__ = ["KINDS", "Array", "BadData", "Contents", "checked", "open_file", "reading"]

KINDS: dict[str, Callable[[Path], Contents]] = {
    ".npy": npy.npy,
    ".npz": npy.npz,
    ".pt": tensors.pt,
    ".pth": tensors.pt,
    ".safetensors": tensors.safetensors,
    ".fvecs": records.vecs("<f4"),
    ".bvecs": records.vecs("u1"),
    ".ivecs": records.vecs("<i4"),
    ".fbin": records.matrix("<f4"),
    ".u8bin": records.matrix("u1"),
    ".i8bin": records.matrix("i1"),
    ".ibin": records.matrix("<i4", distances=True),
    ".hdf5": hdf5.hdf5,
    ".h5": hdf5.hdf5,
    ".parquet": parquet.parquet,
}
_TEXT = {".csv": ", delimiter=','", ".tsv": ", delimiter='\\t'", ".txt": ""}  # as np.loadtxt is told of them


def open_file(path: Path, dtype: str = "float32", ndmin: int = 2) -> Contents:
    """The arrays in a file, of the kind that its suffix says (one of KINDS); nothing in it is executed.

    Raises FileNotFoundError, BadData (a ValueError) for a file of another kind or one that cannot be read, ImportError
    naming a missing extra. `dtype` and `ndmin` are those of the numbers that are wanted, for the conversion of a text
    file.
    """
    check_source(path)
    kind = path.suffix.lower()
    if kind in _TEXT:
        numbers = f"np.loadtxt({str(path)!r}{_TEXT[kind]}, dtype=np.{dtype}, ndmin={ndmin})"
        written = f"np.save({str(path.with_suffix('.npy'))!r}, {numbers})"
        raise BadData(f"{path} is text, which is not read; convert it once: import numpy as np; {written}")
    if kind not in KINDS:
        raise BadData(f"{path} must end in one of {', '.join(KINDS)}")
    return reading(str(path), lambda: KINDS[kind](path))
