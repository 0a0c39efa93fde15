"""HDF5 files, and ann-benchmarks' layout of them: train, test, neighbors of the latter, and a distance."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .._optional import require
from .arrays import Array, Contents

__all__ = ["hdf5"]

_METRICS = {"euclidean": "l2", "angular": "cosine", "ip": "ip", "dot": "ip"}  # ann-benchmarks' distances


def hdf5(path: Path) -> Contents:
    """The datasets of a file (extra `hdf5`), those within groups as ``group/dataset``."""
    library = require("h5py", "hdf5")
    file = library.File(path, "r")
    arrays = {name: _array(dataset) for name, dataset in _datasets(file, library, "", {file})}
    distance = file.attrs.get("distance")
    distance = distance.decode() if isinstance(distance, bytes) else distance
    return Contents(arrays, _METRICS.get(distance, distance) if isinstance(distance, str) else None)


def _array(dataset: Any) -> Array:
    return Array(tuple(dataset.shape or ()), dataset.dtype.kind, lambda start, end: dataset[start:end])


def _datasets(group: Any, library: Any, prefix: str, seen: set[Any]) -> Iterator[tuple[str, Any]]:
    """Names and datasets, at any depth; a group that links lead to again is `seen`, a link to nothing is left out."""
    for name in group:
        item = group.get(name)
        if isinstance(item, library.Dataset):
            yield prefix + name, item
        elif isinstance(item, library.Group) and item not in seen:
            seen.add(item)
            yield from _datasets(item, library, f"{prefix}{name}/", seen)
