"""The steps of building an index from a file, for the rows of one process: train, assign and sort, name the tensors.

N rows, L lists, S rows of the sample, d dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._arrays import as_tensor
from .._optional import require
from ..checkpoint import AnyIndex
from ..functional.kmeans import RowShard, sampled
from ..index import IndexIVF, IndexPreTransform, building, schema, searching, training, validation
from ..index.base import IndexBase
from ..vector_files import Vectors
from .archive import Entry, of_tensor
from .spool import Drained, Spool, SpoolWriter, as_bytes, trim

__all__ = ["Sample", "Source", "draw", "entries", "fitted", "plain", "shown", "spooled"]


class Source(NamedTuple):
    """The rows that one process adds."""

    vectors: Vectors
    rows: range  # of the vectors
    ids: Callable[[int, int], Tensor] | None  # of the rows start:end of the vectors; None numbers them

    def take(self, numbers: Tensor, size: int) -> Iterator[Tensor]:
        """The rows with ascending numbers (n,), counted from the first of `rows`; see `Vectors.take`."""
        return self.vectors.take(numbers + self.rows.start, size)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All rows, `size` at a time."""
        for start in range(self.rows.start, self.rows.stop, size):
            yield self.vectors.read(start, min(start + size, self.rows.stop))


def plain(index: AnyIndex) -> IndexBase:
    """The index that holds the vectors."""
    return index.index if isinstance(index, IndexPreTransform) else index


def transformed(index: AnyIndex, x: Tensor) -> Tensor:
    """Vectors x (n, index.d) as `plain` takes them."""
    x = x.to(index.device)
    return index.apply_transform(x) if isinstance(index, IndexPreTransform) else x


def shown(pieces: Iterable[Tensor], title: str, total: int, verbose: bool) -> Iterator[Tensor]:
    """`pieces` of `total` rows with a bar, which says how much time is left (extra `progress`), if `verbose`."""
    settings = dict(total=total, desc=title, unit=" rows", unit_scale=True, leave=False)
    with require("tqdm", "progress").tqdm(**settings) if verbose else contextlib.nullcontext() as bar:
        for piece in pieces:
            yield piece
            if bar is not None:
                bar.update(piece.shape[0])
            trim()


class Sample(NamedTuple):
    """The rows to train on that one process has."""

    x: Tensor  # (n, d), as the metric compares them, in a mapped file
    first: int  # the number of the first of them in the sample of all processes
    total: int  # of all processes
    generator: torch.Generator  # after the sample was drawn


def draw(
    index: AnyIndex, source: Source, path: Path, *, sample: int, batch: int, seed: int, verbose: bool,
    before: int = 0, total: int | None = None,
) -> Sample:  # fmt: skip
    """The rows that `fit` would train on, kept in a file: `sample` of the `total` rows of all processes, of which
    `before` are those of the processes before this one."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    numbers = sampled(len(source.rows) if total is None else total, sample, generator)
    mine = torch.tensor([before, before + len(source.rows)], device="cpu")
    first, end = torch.searchsorted(numbers, mine).tolist()
    inner = plain(index)
    with Drained(path, "w") as file:
        for part in shown(source.take(numbers[first:end] - before, batch), "sample", end - first, verbose):
            file.write(as_bytes(searching.prepared(inner, transformed(index, part)).cpu().contiguous()))
    x = as_tensor(_mapped(path, inner.d), "x").to(inner.device)
    return Sample(x, first, numbers.shape[0], generator)


def fitted(
    index: AnyIndex, sample: Sample, niter: int, verbose: bool, add: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> Tensor:
    """The centroids (L, d) of a sample; `add` is as in `RowShard`."""
    inner = plain(index)
    assert isinstance(inner, IndexIVF)
    return training.clustered(
        inner,
        inner.nlist,
        sample.x,
        RowShard(sample.first, sample.total, add),
        max_points_per_centroid=-(-sample.total // inner.nlist),  # the sample is not sampled again
        niter=niter,
        generator=sample.generator,
        verbose=verbose,
    )


def _mapped(path: Path, d: int) -> np.ndarray:
    """The float32 numbers of a file (n, d)."""
    if not path.stat().st_size:
        return np.empty((0, d), dtype=np.float32)
    return np.memmap(path, np.float32, "r").reshape(-1, d)


def spooled(index: AnyIndex, source: Source, size: int, folder: Path, number: int, verbose: bool) -> int:
    """Assign all rows to lists, write them into a spool, and return the `next_id` after them.

    Rows without ids are numbered from `number` on. ValueError names the rows of the file that are refused.
    """
    store = plain(index).store
    writer = SpoolWriter(folder, store.nlist)
    next_id = number if source.ids else validation.numbering(number, len(source.rows))
    end = source.rows.start
    try:
        for x in shown(source.batches(size), "assign", len(source.rows), verbose):
            start, end = end, end + x.shape[0]
            try:
                rows, assigned = building.assign(store, transformed(index, x))
            except (TypeError, ValueError) as error:
                raise ValueError(f"rows {start:,} to {end - 1:,} of {source.vectors.name}: {error}") from error
            if source.ids:
                ids = source.ids(start, end)
                next_id = max(next_id, schema.next_id_after(ids))
            else:
                ids = torch.arange(start, end, device="cpu") + (number - source.rows.start)
            writer.push(rows, ids.to(rows.device), assigned)
    finally:
        writer.close()
    return next_id


def entries(index: AnyIndex, spool: Spool, merged: int, next_id: int, verbose: bool) -> dict[str, Entry]:
    """The tensors of the state_dict of `index` with the rows of a spool, `merged` of which are sorted at a time."""
    store = plain(index).store
    n, width = int(spool.offsets[-1]), store.packed.shape[1]
    rows = shown(spool.read("rows", merged), "write", n, verbose)
    filled = {
        store.format.name: Entry(store.packed.dtype, (n, width), rows),
        "list_offsets": of_tensor(spool.offsets),
        "list_ids": Entry(torch.int64, (n,), spool.read("ids", merged)),
        schema.NEXT_ID: of_tensor(torch.tensor(next_id, device="cpu")),
    }
    prefix = "index." if isinstance(index, IndexPreTransform) else ""
    whole = {name: of_tensor(tensor) for name, tensor in index.state_dict().items()}
    return {**whole, **{prefix + name: entry for name, entry in filled.items()}}
