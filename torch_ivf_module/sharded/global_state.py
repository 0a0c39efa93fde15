"""The global state of a sharded index: the buffers of one plain index of all rows, as processes save and load them.

W processes, L lists, N vectors in all, n of them on one process, d dim.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..index import row_format, schema
from ..index.base import IndexBase
from .collectives import Exchange
from .placement import positions, rows_per_process


class LocalRows(NamedTuple):
    """The rows of the global index that one process has, and their positions in it."""

    packed: Tensor  # (n, ...)
    ids: Tensor  # (n,)
    assigned: Tensor  # (n,) the list of each row
    positions: Tensor  # (n,)


def local_rows(exchange: Exchange, step: str, index: IndexBase) -> tuple[LocalRows, Tensor]:
    """The rows of this process, and the rows (W, L) of each process in each list."""
    packed, offsets, ids = index.store.packed_lists()
    sizes = exchange.all_gather(step, offsets.diff())
    numbers = torch.arange(sizes.shape[1], device=packed.device)
    assigned = torch.repeat_interleave(numbers, sizes[exchange.rank])
    return LocalRows(packed, ids, assigned, positions(sizes, exchange.rank)), sizes


def global_buffers(exchange: Exchange, step: str, index: IndexBase) -> dict[str, Tensor]:
    """The buffers of the global index: vectors and ids as DTensors sharded along the rows, the others in full.

    Rows are sent to the processes that have them in the DTensors, which takes twice the memory of the local rows.
    """
    buffers = {name: index.store.buffers[name] for name in ("centroids", schema.NEXT_ID)}
    if not index.is_trained:
        return {**buffers, **row_tensors(exchange, 0, index), "list_offsets": index.store.buffers["list_offsets"]}
    rows, sizes = local_rows(exchange, step, index)
    ends = sizes.sum(0).cumsum(0)
    total = int(ends[-1])
    target = rows.positions // rows_per_process(total, exchange.size)  # ascends, so the rows are sorted by target
    counts = torch.bincount(target, minlength=exchange.size)
    (packed, ids, arrived), _ = exchange.all_to_all(step, counts, rows.packed, rows.ids, rows.positions)
    order = arrived.argsort()
    sharded = row_tensors(exchange, total, index, packed[order], ids[order])
    return {**buffers, **sharded, "list_offsets": torch.cat([ends.new_zeros(1), ends])}


def empty_buffers(exchange: Exchange, index: IndexBase) -> dict[str, Tensor]:
    """`global_buffers` of an empty index, which `IndexLoadPlanner` replaces by those of a checkpoint."""
    old = index.store.buffers
    full = {name: torch.empty_like(old[name][:0]) for name in ("centroids", "list_offsets")}
    return {**full, **row_tensors(exchange, 0, index), schema.NEXT_ID: torch.zeros_like(old[schema.NEXT_ID])}


def row_tensors(
    exchange: Exchange, total: int, index: IndexBase, packed: Tensor | None = None, ids: Tensor | None = None
) -> dict[str, Tensor]:
    """Vectors and ids as DTensors of `total` rows; `packed` and `ids` are the local rows, None for no rows."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(exchange.group, index.device.type)
    packed = index.store.packed[:0] if packed is None else packed
    ids = index.store.buffers["list_ids"][:0] if ids is None else ids
    width = packed.shape[1]
    settings: dict[str, Any] = dict(device_mesh=mesh, placements=[Shard(0)], run_check=False)
    return {
        index.store.format.name: DTensor.from_local(
            packed, shape=torch.Size((total, width)), stride=(width, 1), **settings
        ),
        "list_ids": DTensor.from_local(ids, shape=torch.Size((total,)), stride=(1,), **settings),
    }


def packed_of(given: Mapping[str, Tensor]) -> Tensor:
    """The rows of a global state, of whichever format."""
    return next(given[name] for name in row_format.NAMES if name in given)


def rows_of(exchange: Exchange, given: Mapping[str, Tensor]) -> tuple[LocalRows, bool]:
    """The local rows of a global state, and whether they are all of its rows: of full tensors, not of DTensors."""
    if schema.GROUPS in given:
        raise ValueError("a ShardedIndex has no groups, but the state has list_groups: load it into a plain index")
    packed, ids, offsets = packed_of(given), given["list_ids"], given["list_offsets"]
    full, first = not hasattr(packed, "to_local"), 0
    if not full:
        first = min(packed.shape[0], exchange.rank * rows_per_process(packed.shape[0], exchange.size))
        packed, ids = packed.to_local(), ids.to_local()  # type: ignore[attr-defined]
    rows = torch.arange(first, first + packed.shape[0], device=packed.device)
    assigned = torch.searchsorted(offsets.to(packed.device), rows, right=True) - 1
    return LocalRows(packed, ids, assigned, rows), full


def digest_of(tensor: Tensor) -> tuple[object, ...]:
    """dtype, shape and checksum of a tensor."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # numpy has no bfloat16
    return tensor.dtype, tuple(tensor.shape), zlib.crc32(values.numpy().data)
