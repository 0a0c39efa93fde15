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
    """Build an index in a file from vectors in a file. Both may be larger than memory.

    The file is the one that ``index.train(x).add(x)`` and ``index.save(path)`` would write, with the same centroids,
    rows and checksums. ``load(path, mmap=True, codes=8)`` opens it for searching.

    Parameters
    ----------
    vectors : a file of vectors (docs/files.md lists the formats), or a tensor or array (n, d), which may be mapped.
    path : the file to write. The suffix .safetensors selects this format; any other name gives a file of torch.save.
    index : an empty index with the settings: flat or inverted file, alone or in an `IndexPreTransform`. The default is
        ``IndexIVFFlat(d, nlist=4 * sqrt(n))`` with the metric of the HDF5 file, if it has one. A trained index keeps
        its centroids. The argument is not changed. A `ShardedIndex` is built by all processes of its group: each passes
        its own vectors, or its `rows` of a common file; `path` is a folder that all can read, for `restore`.
    key : the name of the array, if the file has several.
    ids : int64 ids, one for each row: a tensor or an array, the name of an array in the file of vectors, or a file. By
        default rows are numbered from `next_id` on.
    rows : the number of rows to use (the first ones), or a range with step 1; by default all.
    train_rows : number of rows that are sampled for training; by default 256 per list, as in `fit`.
    niter, seed : as in `fit`.
    batch : rows that are read at a time; by default as many as `max_memory` allows.
    max_memory : bytes to use in addition to Python and PyTorch, and to pages of files, which the system may free. If
        the sample does not fit, fewer rows are sampled.
    verbose : show progress bars (extra `progress`).

    Vectors are read twice: first a sample, then all. Sorted rows are kept in a temporary file, as large as the index,
    in the same folder. The file gets its name when it is complete and synced. Temporary files of a killed process are
    removed by the next call that writes this name.

    Raises TypeError or ValueError for a wrong argument, a row that is not finite, a wrong number of ids, an index that
    is not empty, too little memory, or a `path` that is an input too; OSError for files that cannot be read or written.

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
