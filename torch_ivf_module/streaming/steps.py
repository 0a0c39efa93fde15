"""The steps of building an index from a file, for the rows of one process: train, assign and sort, name the tensors.

N rows, L lists, S rows of the sample, d dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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
from .spool import Drained, Spool, SpoolWriter, as_bytes

__all__ = ["Source", "entries", "plain", "shown", "spooled", "train"]


class Source(NamedTuple):
    """The rows that one process adds."""

    vectors: Vectors
    rows: range  # of the vectors
    ids: Callable[[int, int], Tensor] | None  # of the rows start:end of the vectors; None numbers them

    def take(self, numbers: Tensor, size: int) -> Iterator[Tensor]:
        """The rows with ascending numbers (n,), counted from the first of `rows`; see `Vectors.take`."""
        return self.vectors.take(numbers + self.rows.start, size)

    def batches(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """All rows, `size` at a time: the number of the first among the vectors, and the rows."""
        for start in range(self.rows.start, self.rows.stop, size):
            yield start, self.vectors.read(start, min(start + size, self.rows.stop))


def plain(index: AnyIndex) -> IndexBase:
    """The index that holds the vectors."""
    return index.index if isinstance(index, IndexPreTransform) else index


def transformed(index: AnyIndex, x: Tensor) -> Tensor:
    """Vectors x (n, index.d) as `plain` takes them."""
    x = x.to(index.device)
    return index.apply_transform(x) if isinstance(index, IndexPreTransform) else x


def shown(pieces: Iterable[Tensor], title: str, total: int, verbose: bool) -> Iterator[Tensor]:
    """`pieces` of `total` rows with a bar, which says how much time is left (extra `progress`), if `verbose`."""
    if not verbose:
        yield from pieces
        return
    with require("tqdm", "progress").tqdm(total=total, desc=title, unit=" rows", unit_scale=True, leave=False) as bar:
        for piece in pieces:
            yield piece
            bar.update(piece.shape[0])


def train(
    index: AnyIndex,
    source: Source,
    sample: int,
    path: Path,
    *,
    batch: int,
    seed: int,
    niter: int,
    verbose: bool,
    first: int = 0,
    total: int | None = None,
    add: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> Tensor:
    """The centroids (L, d) that `fit` would find for all rows with the same sample; its rows are kept in a file.

    `total` rows are those of all processes, of which those of this one begin at `first`; `add` is as in `RowShard`.
    """
    inner = plain(index)
    assert isinstance(inner, IndexIVF)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    numbers = sampled(len(source.rows) if total is None else total, sample, generator)
    start, end = torch.searchsorted(numbers, torch.tensor([first, first + len(source.rows)])).tolist()
    with Drained(path, "w") as file:
        for part in shown(source.take(numbers[start:end] - first, batch), "sample", end - start, verbose):
            file.write(as_bytes(searching.prepared(inner, transformed(index, part)).cpu().contiguous()))
    x = as_tensor(_mapped(path, inner.d), "x").to(inner.device)
    settings: dict[str, Any] = dict(niter=niter, generator=generator, verbose=verbose)
    most = -(-numbers.shape[0] // inner.nlist)  # of a list: the sample is not sampled again
    centroids = training.clustered(
        inner, inner.nlist, x, RowShard(start, numbers.shape[0], add), max_points_per_centroid=most, **settings
    )
    path.unlink()
    return centroids


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
    starts = iter(range(source.rows.start, source.rows.stop, size))
    try:
        for x in shown((x for _, x in source.batches(size)), "assign", len(source.rows), verbose):
            start = next(starts)
            end = start + x.shape[0]
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
