"""A checkpoint of a sharded index, built by all processes of its group from their parts of the vectors.

W processes, N rows in all, n rows of one process, L lists, d dim.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
from .plan import Plan
from .spool import Drained, Spool, as_bytes
from .steps import Sample, Source, draw, fitted, shown, spooled

__all__ = ["build_sharded"]

STEP = "build_file"
T = TypeVar("T")


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
        return (source, made), [len(source.rows)]

    settings = (index.config(), train_rows, niter, seed, ids is None)
    (source, made), said = exchange.agree(STEP, device, prepare, lambda: settings)
    before, total = int(said[: exchange.rank, 0].sum()), int(said[:, 0].sum())
    planned, _ = exchange.agree(STEP, device, lambda: (planned_for(made, total, train_rows, batch, max_memory), []))
    with _common(exchange, folder, device) as place:
        build = _Build(exchange, made, source, planned, place, before, total, verbose and exchange.rank == 0)
        if planned.sample:
            with timed(seconds, "train"):
                build.train(seed, niter)
        with timed(seconds, "assign"):
            next_id = build.assign()
        with timed(seconds, "write"):
            save(exchange, build.state(next_id), folder)
    size = sum(file.stat().st_size for file in newest(folder).iterdir())
    return Built(made, total, planned.sample, size, seconds)


class _Build(NamedTuple):
    """The steps on one process. `agree` lets no process wait for one that has failed."""

    exchange: Exchange
    index: IndexBase
    source: Source
    planned: Plan
    place: Path  # a folder for all processes
    before: int  # rows of the processes before this one
    total: int
    verbose: bool

    def agree(self, work: Callable[[], tuple[T, list[int]]]) -> tuple[T, Tensor]:
        """The result of `work` once it is done on all processes, and up to two numbers of each of them (W, 2)."""
        return self.exchange.agree(STEP, self.index.device, work)

    def own(self, kind: str, rank: int | None = None) -> Path:
        """A file or folder of this or another process."""
        return self.place / f"{kind}-{self.exchange.rank if rank is None else rank}"

    def train(self, seed: int, niter: int) -> None:
        """Fit the centroids to a sample of the rows of all processes."""
        kept, batch = self.own("sample"), self.planned.batch

        def drawn() -> tuple[Sample, list[int]]:
            where: dict[str, Any] = dict(before=self.before, total=self.total, batch=batch, verbose=self.verbose)
            return draw(self.index, self.source, kept, sample=self.planned.sample, seed=seed, **where), []

        sample, _ = self.agree(drawn)
        add = functools.partial(self.exchange.all_reduce, STEP)
        centroids = fitted(self.index, sample, niter, self.verbose, add)
        training.move_to(self.index.store, self.exchange.broadcast(STEP, centroids))
        kept.unlink()

    def assign(self) -> int:
        """Assign the rows of this process, and return the `next_id` after those of all."""
        number = self.index.store.next_id + self.before

        def spool() -> tuple[None, list[int]]:
            size, folder = self.planned.batch, self.own("spool")
            return None, [spooled(self.index, self.source, size, folder, number, self.verbose)]

        return int(self.agree(spool)[1][:, 0].max())

    def state(self, next_id: int) -> dict[str, Tensor]:
        """The state_dict of the sharded index of all rows, of which those of this process are in mapped files."""
        store, device = self.index.store, self.index.device

        def merged() -> tuple[tuple[Tensor, list[Tensor]], list[int]]:
            folders = [self.own("spool", rank) for rank in range(self.exchange.size)]
            spool = Spool(folders, store.nlist, store.packed.cpu())
            return (spool.offsets, [self._part(spool, column) for column in ("rows", "ids")]), []

        (offsets, part), _ = self.agree(merged)
        return {
            "centroids": store.buffers["centroids"],
            **row_tensors(self.exchange, self.total, self.index, *part),
            "list_offsets": offsets.to(device),
            schema.NEXT_ID: torch.tensor(next_id, device=device),
        }

    def _part(self, spool: Spool, column: str) -> Tensor:
        """The rows or ids of the part of the global index that this process has, consecutive ones of all."""
        chunk = rows_per_process(self.total, self.exchange.size)
        start, end = (min(self.total, (self.exchange.rank + more) * chunk) for more in (0, 1))
        path, like = self.own(column), spool.like[column]
        with Drained(path, "w") as file:
            pieces = spool.read(column, self.planned.merged, start, end)
            for piece in shown(pieces, "write", end - start, self.verbose and column == "rows"):
                file.write(as_bytes(piece))
        shape = torch.Size((end - start, *like.shape[1:]))
        if end == start:
            return like.new_empty(shape).to(self.index.device)
        held = torch.from_file(str(path), shared=True, size=shape.numel(), dtype=like.dtype)
        return held.view(shape).to(self.index.device)


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
