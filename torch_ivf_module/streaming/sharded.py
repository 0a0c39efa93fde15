"""A checkpoint of a sharded index, built by all processes of its group from their parts of the vectors.

W processes, N rows in all, n rows of one process, L lists, d dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import beside
from ..index import schema, training
from ..index.base import IndexBase
from ..sharded import ShardedIndex, newest
from ..sharded.checkpoint_files import save
from ..sharded.collectives import Exchange
from ..sharded.global_state import row_tensors
from ..sharded.placement import rows_per_process
from .arguments import Built, opened, planned_for, template, timed
from .spool import Drained, Spool, as_bytes
from .steps import Sample, Source, draw, fitted, shown, spooled

__all__ = ["build_sharded"]

STEP = "build_file"


def build_sharded(
    vectors: object,
    folder: Path,
    index: ShardedIndex,
    *,
    key: str | None,
    ids: object,
    rows: int | range | None,
    train_rows: int | None,
    niter: int,
    seed: int,
    batch: int | None,
    max_memory: int,
    verbose: bool,
) -> Built:
    """`build_file` for the rows of this process; all processes of the group call it, and must see the same folder."""
    exchange, device = index.exchange, index.device
    seconds = dict[str, float]()

    def prepare() -> tuple[tuple[Source, IndexBase], list[int]]:
        source = opened(vectors, key, ids, rows)
        made = template(index.index, source)
        assert isinstance(made, IndexBase)
        return (source, made), [len(source.rows), ids is not None]

    settings = (index.config(), train_rows, niter, seed)
    (source, made), said = exchange.agree(STEP, device, prepare, lambda: settings)
    before, total = int(said[: exchange.rank, 0].sum()), int(said[:, 0].sum())
    shared = exchange.agree(STEP, device, lambda: (planned_for(made, total, train_rows, batch, max_memory), []))
    planned, store, verbose = shared[0], made.store, verbose and exchange.rank == 0
    with _common(exchange, folder, device) as place:
        if planned.sample:
            with timed(seconds, "train"):
                kept = place / f"sample-{exchange.rank}"
                wanted: dict[str, Any] = dict(sample=planned.sample, batch=planned.batch, before=before, total=total)

                def drawn() -> tuple[Sample, list[int]]:
                    return draw(made, source, kept, seed=seed, verbose=verbose, **wanted), []

                sample, _ = exchange.agree(STEP, device, drawn)
                centroids = fitted(made, sample, niter, verbose, lambda tensor: exchange.all_reduce(STEP, tensor))
                training.move_to(store, exchange.broadcast(STEP, centroids))
                kept.unlink()
        with timed(seconds, "assign"):
            number = store.next_id + before

            def spool_own() -> tuple[None, list[int]]:
                own = place / f"spool-{exchange.rank}"
                return None, [spooled(made, source, planned.batch, own, number, verbose)]

            _, said = exchange.agree(STEP, device, spool_own)
        with timed(seconds, "write"):
            folders = [place / f"spool-{rank}" for rank in range(exchange.size)]

            def merge() -> tuple[tuple[Tensor, list[Tensor]], list[int]]:
                spool = Spool(folders, store.nlist, store.packed.cpu())
                own = place / f"part-{exchange.rank}"
                return (spool.offsets, _own_part(exchange, spool, own, store.packed, planned.merged, verbose)), []

            (offsets, part), _ = exchange.agree(STEP, device, merge)
            state = {
                "centroids": store.buffers["centroids"],
                **row_tensors(exchange, total, made, *part),
                "list_offsets": offsets.to(device),
                schema.NEXT_ID: torch.tensor(int(said[:, 0].max()), device=device),
            }
            save(exchange, state, folder)
    size = sum(file.stat().st_size for file in newest(folder).iterdir())
    return Built(made, total, planned.sample, size, seconds)


@contextlib.contextmanager
def _common(exchange: Exchange, folder: Path, device: torch.device) -> Iterator[Path]:
    """A folder within `folder` for what the processes leave to each other, removed at the end."""

    def opened_by_first() -> tuple[str, list[int]]:
        if exchange.rank:
            return "", []
        folder.mkdir(parents=True, exist_ok=True)
        return str(stack.enter_context(beside(folder / "build"))), []

    with contextlib.ExitStack() as stack:
        name, _ = exchange.agree(STEP, device, opened_by_first)
        place = Path(exchange.broadcast_text(STEP, name, device))
        yield place
        exchange.agree(STEP, device, lambda: (None, []))  # none reads it any more


def _own_part(
    exchange: Exchange, spool: Spool, path: Path, row: Tensor, merged: int, verbose: bool
) -> list[Tensor]:
    """Rows and ids of this process's part of the global index, consecutive rows of all, in mapped files."""
    total = int(spool.offsets[-1])
    chunk = rows_per_process(total, exchange.size)
    start, end = (min(total, (exchange.rank + more) * chunk) for more in (0, 1))
    found = []
    for column, like in (("rows", row), ("ids", torch.empty(0, dtype=torch.int64, device="cpu"))):
        pieces = spool.read(column, merged, start, end)
        name = path.with_name(f"{path.name}-{column}")
        with Drained(name, "w") as file:
            for piece in shown(pieces, "write", end - start, verbose and column == "rows"):
                file.write(as_bytes(piece))
        shape = (end - start, *like.shape[1:])
        held = torch.empty(0, dtype=like.dtype, device="cpu")
        if end > start:
            held = torch.from_file(str(name), shared=True, size=torch.Size(shape).numel(), dtype=like.dtype)
        found.append(held.reshape(shape).to(row.device))
    return found
