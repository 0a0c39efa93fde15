"""`build_file`: an index in a file, built from a file of vectors without either of them in memory.

N rows, L lists, d dim.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .._files import check_target, replace
from ..checkpoint import AnyIndex, header
from ..index import training
from ..sharded import ShardedIndex
from . import archive
from .arguments import Built, opened, planned_for, template, timed
from .plan import DEFAULT_MEMORY
from .sharded import build_sharded
from .spool import Spool
from .steps import draw, entries, fitted, plain, spooled

__all__ = ["build_file"]


@torch.no_grad()
def build_file(
    vectors: object,
    path: str | os.PathLike[str],
    index: AnyIndex | ShardedIndex | None = None,
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
        centroids. It is not changed. A `ShardedIndex` is built by all processes of its group: each passes its own
        vectors, or `rows` of a common file, and `path` is a folder that all see, for `ShardedIndex.restore`.
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
    if isinstance(index, ShardedIndex):
        settings: dict[str, Any] = dict(train_rows=train_rows, niter=niter, seed=seed, batch=batch)
        return build_sharded(
            vectors, path, index, key=key, ids=ids, rows=rows, max_memory=max_memory, verbose=verbose, **settings
        )
    check_target(path, *(Path(file) for file in (vectors, ids) if isinstance(file, (str, os.PathLike))))
    source = opened(vectors, key, ids, rows)
    made = template(index, source)
    planned = planned_for(made, len(source.rows), train_rows, batch, max_memory)
    inner = plain(made)

    def write(name: str) -> None:
        part = Path(name)
        if planned.sample:
            with timed(seconds, "train"):
                kept, settings = part.with_name("sample"), dict(sample=planned.sample, batch=planned.batch)
                sample = draw(made, source, kept, seed=seed, verbose=verbose, **settings)
                training.move_to(inner.store, fitted(made, sample, niter, verbose))
                kept.unlink()
        with timed(seconds, "assign"):
            folder = part.with_name("spool")
            next_id = spooled(made, source, planned.batch, folder, inner.store.next_id, verbose)
        with timed(seconds, "write"):
            spool = Spool([folder], inner.store.nlist, inner.store.packed.cpu())
            found = entries(made, spool, planned.merged, next_id, verbose)
            archive.write(part, found, lambda digests: header(made, digests))

    replace(path, write)
    return Built(made, len(source.rows), planned.sample, path.stat().st_size, seconds)
