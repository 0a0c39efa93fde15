"""`build_file`: an index in a file, built from a file of vectors without either of them in memory.

N rows, L lists, d dim.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._files import replace
from ..advice import nlist_for
from ..checkpoint import AnyIndex, description, header
from ..index import IndexIVF, IndexIVFFlat, IndexPreTransform, training, validation
from ..index.base import IndexBase
from ..params import positive
from ..vector_files import Vectors, open_ids, open_vectors
from ..vector_files.vectors import vectors_of
from . import archive
from .plan import DEFAULT_MEMORY, Plan, plan
from .spool import Spool
from .steps import Source, entries, plain, spooled, train

__all__ = ["Built", "build_file"]


class Built(NamedTuple):
    """What `build_file` has done."""

    index: Any  # an AnyIndex without its vectors: settings and centroids
    ntotal: int
    trained_on: int  # rows, 0 if it was not trained
    bytes: int  # of the file
    seconds: dict[str, float]  # of the steps train, assign, write


@torch.no_grad()
def build_file(
    vectors: object,
    path: str | os.PathLike[str],
    index: AnyIndex | None = None,
    *,
    key: str | None = None,
    ids: object = None,
    rows: int | range | None = None,
    train_rows: int | None = None,
    niter: int = 10,
    seed: int = 1234,
    batch: int | None = None,
    max_memory: int = DEFAULT_MEMORY,
    verbose: bool = False,
) -> Built:
    """Build an index in a file from vectors in a file, both of which may be larger than memory.

    The file is what ``index.train(x).add(x)`` and ``index.save(path)`` would write, with the same centroids, rows and
    checksums. It is searched with ``load(path, mmap=True, codes=8)``.

    Parameters
    ----------
    vectors : a file of any kind that the commands read (docs/files.md), or a tensor or an array (n, d), which may be
        mapped.
    path : the file to write, for safetensors ending in .safetensors, else as torch.save does.
    index : an empty index with the settings: a flat or inverted-file index, alone or in an `IndexPreTransform`; by
        default ``IndexIVFFlat(d, nlist=4 * sqrt(n))`` with the metric that an HDF5 file names. A trained one keeps its
        centroids. It is not changed.
    key : the array of a file that holds several.
    ids : int64 ids, one for each row of the vectors: a tensor or an array, an array in the file of vectors by name, or
        a file. By default the rows are numbered from `next_id` on.
    rows : how many of the first rows are taken, or which, as a range of step 1; by default all.
    train_rows : how many of them are sampled for training; by default 256 a list, as `fit` does.
    niter, seed : as in `fit`.
    batch : how many rows are read at a time; by default as many as `max_memory` allows.
    max_memory : bytes that are used beside what Python and PyTorch take, and pages of files that the system may free.
        Fewer than are asked for are sampled if they do not fit.
    verbose : whether bars show each step and the time that is left (extra `progress`).

    Vectors are read twice, the sample of them and all; in between rows are kept sorted beside the file, which takes as
    much of the disk as the index. The file has its name when it is complete and synced; what a killed process has left
    behind is removed by the next that writes a file of this name.

    Raises TypeError or ValueError for a wrong argument, a row that is not finite, ids of another number, an index that
    is not empty or too little memory; OSError for files that cannot be read or written.

    >>> import tempfile, numpy as np
    >>> from torch_ivf_module import IndexIVFFlat, build_file, load
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.save(f"{folder}/x.npy", np.random.default_rng(0).standard_normal((2000, 16), dtype=np.float32))
    ...     built = build_file(f"{folder}/x.npy", f"{folder}/index.pt", IndexIVFFlat(16, nlist=32))
    ...     index = load(f"{folder}/index.pt", mmap=True)
    ...     print(built.ntotal, index.search(np.load(f"{folder}/x.npy")[:2], 1)[1].flatten())
    2000 tensor([0, 1])
    """
    path, seconds = Path(path), dict[str, float]()
    source = opened(vectors, key, ids, rows)
    made = template(index, source)
    planned = planned_for(made, len(source.rows), train_rows, batch, max_memory)
    inner = plain(made)

    def write(name: str) -> None:
        part = Path(name)
        if planned.sample:
            with timed(seconds, "train"):
                settings: dict[str, Any] = dict(batch=planned.batch, seed=seed, niter=niter, verbose=verbose)
                centroids = train(made, source, planned.sample, part.with_name("sample"), **settings)
                training.move_to(inner.store, centroids)
        with timed(seconds, "assign"):
            folder = part.with_name("spool")
            next_id = spooled(made, source, planned.batch, folder, inner.store.next_id, verbose)
        with timed(seconds, "write"):
            spool = Spool([folder], inner.store.nlist, inner.store.packed.cpu())
            found = entries(made, spool, planned.merged, next_id, verbose)
            archive.write(part, found, lambda digests: header(made, digests))

    replace(path, write)
    return Built(made, len(source.rows), planned.sample, path.stat().st_size, seconds)


# -- arguments, also of a sharded index ----------------------------------------------------------------------


def opened(vectors: object, key: str | None, ids: object, rows: int | range | None) -> Source:
    """The arguments of `build_file` that say which rows are added."""
    if isinstance(vectors, (str, os.PathLike)):
        held = open_vectors(vectors, key)
    elif key is None:
        held = vectors_of(vectors)
    else:
        raise ValueError(f"key names an array of a file, but vectors are a {type(vectors).__name__}: leave key out")
    chosen = range(held.rows if rows is None else min(positive(rows, "rows"), held.rows)) if not isinstance(
        rows, range) else rows  # fmt: skip
    if chosen.step != 1 or not 0 <= chosen.start <= chosen.stop <= held.rows:
        raise ValueError(f"rows must be a number or a range of step 1 within 0 to {held.rows:,}, got {rows}")
    return Source(held, chosen, _ids(ids, vectors, held))


def _ids(ids: object, vectors: object, held: Vectors) -> Callable[[int, int], Tensor] | None:
    if ids is None:
        return None
    if isinstance(ids, (str, os.PathLike)):
        if not isinstance(vectors, (str, os.PathLike)):
            raise TypeError("ids must be a tensor or an array where vectors are, not a file")
        return open_ids(os.fspath(ids), Path(vectors), held.rows)
    given = validation.ids(ids, "ids", held.rows, torch.device("cpu"))
    return lambda start, end: given[start:end]


def template(index: AnyIndex | None, source: Source) -> AnyIndex:
    """A copy of an empty index that can be saved, or the usual one; without an order of its rows."""
    vectors = source.vectors
    if index is None:
        index = IndexIVFFlat(vectors.d, nlist=nlist_for(len(source.rows)), metric=vectors.metric or "l2")
    if not isinstance(index, (IndexBase, IndexPreTransform)):
        raise TypeError(f"index must be an index of this package or None, got {type(index).__name__}")
    description(index)
    if index.ntotal:
        raise ValueError(f"index must be empty, got one of {index.ntotal:,} vectors: call reset()")
    if index.d != vectors.d:
        raise ValueError(f"index must be of d = {vectors.d}, as {vectors.name}, got d = {index.d}")
    made = copy.deepcopy(index)
    plain(made).store.ordering = "none"
    return made


def planned_for(
    index: AnyIndex, rows: int, train_rows: int | None, batch: int | None, max_memory: int
) -> Plan:
    """The plan for `rows` rows of all processes."""
    inner = plain(index)
    wanted = 0
    if isinstance(inner, IndexIVF) and not inner.is_trained:
        wanted = min(rows, 256 * inner.nlist if train_rows is None else positive(train_rows, "train_rows"))
        if wanted < inner.nlist:
            raise ValueError(f"vectors must have a row for each of {inner.nlist:,} lists to train on, got {wanted:,}")
    elif train_rows is not None:
        raise ValueError("train_rows is for an index that has to be trained: leave it out")
    size = None if batch is None else positive(batch, "batch")
    return plan(inner, rows, wanted, size, positive(max_memory, "max_memory"))


@contextmanager
def timed(seconds: dict[str, float], step: str) -> Iterator[None]:
    """Measure a step."""
    began = time.perf_counter()
    yield
    seconds[step] = time.perf_counter() - began
