"""The whole index as its processes save and load it: the buffers of one plain index, cut into runs of rows.

W processes, L lists, N vectors in all, n of them on one process, d dim.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..index import schema
from ..index.base import IndexBase
from .collectives import Exchange
from .placement import block, positions


class Run(NamedTuple):
    """Rows that this process has of a whole index, and where they stand in it."""

    packed: Tensor  # (n, d)
    ids: Tensor  # (n,)
    assigned: Tensor  # (n,) list of each
    positions: Tensor  # (n,)


def held(exchange: Exchange, step: str, index: IndexBase) -> tuple[Run, Tensor]:
    """The rows of this process, and the rows (W, L) of each process in each list."""
    packed, offsets, ids = index.store.packed_lists()
    sizes = exchange.gather(step, offsets.diff())
    numbers = torch.arange(sizes.shape[1], device=packed.device)
    assigned = torch.repeat_interleave(numbers, sizes[exchange.rank])
    return Run(packed, ids, assigned, positions(sizes, exchange.rank)), sizes


def whole(exchange: Exchange, step: str, index: IndexBase) -> dict[str, Tensor]:
    """The buffers of the plain index of all rows: vectors and ids as DTensors cut along the rows, the rest in full.

    Every process sends its rows to where they belong, so this takes the memory of its share twice more.
    """
    buffers = {name: index.store.buffers[name] for name in ("centroids", schema.NEXT_ID)}
    if not index.is_trained:
        return {**buffers, **_cut(exchange, 0, index), "list_offsets": index.store.buffers["list_offsets"]}
    run, sizes = held(exchange, step, index)
    ends = sizes.sum(0).cumsum(0)
    total = int(ends[-1])
    target = run.positions // block(total, exchange.size)  # rises, so that the rows are in order
    counts = torch.bincount(target, minlength=exchange.size)
    (packed, ids, places), _ = exchange.swap(step, counts, run.packed, run.ids, run.positions)
    order = places.argsort()
    parts = _cut(exchange, total, index, packed[order], ids[order])
    return {**buffers, **parts, "list_offsets": torch.cat([ends.new_zeros(1), ends])}


def blank(exchange: Exchange, index: IndexBase) -> dict[str, Tensor]:
    """The buffers of an empty index, cut in the same way: what `IndexLoadPlanner` puts saved ones in the place of."""
    full = {name: torch.empty_like(index.store.buffers[name][:0]) for name in ("centroids", "list_offsets")}
    return {**full, **_cut(exchange, 0, index), schema.NEXT_ID: torch.zeros_like(index.store.buffers[schema.NEXT_ID])}


def _cut(
    exchange: Exchange, total: int, index: IndexBase, packed: Tensor | None = None, ids: Tensor | None = None
) -> dict[str, Tensor]:
    """Vectors and ids of `total` rows in all as DTensors, of this process's run or of nothing."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(exchange.group, index.device.type)
    packed = index.store.buffers["packed_embeddings"][:0] if packed is None else packed
    ids = index.store.buffers["list_ids"][:0] if ids is None else ids
    d = packed.shape[1]
    cut: dict[str, Any] = dict(device_mesh=mesh, placements=[Shard(0)], run_check=False)
    return {
        "packed_embeddings": DTensor.from_local(packed, shape=torch.Size((total, d)), stride=(d, 1), **cut),
        "list_ids": DTensor.from_local(ids, shape=torch.Size((total,)), stride=(1,), **cut),
    }


def run_of(exchange: Exchange, given: Mapping[str, Tensor]) -> tuple[Run, bool]:
    """The rows of a whole index that this process was given, and whether those are all: no DTensors, but full ones."""
    packed, ids, offsets = given["packed_embeddings"], given["list_ids"], given["list_offsets"]
    full, first = not hasattr(packed, "to_local"), 0
    if not full:
        first = min(packed.shape[0], exchange.rank * block(packed.shape[0], exchange.size))
        packed, ids = packed.to_local(), ids.to_local()  # type: ignore[attr-defined]
    places = torch.arange(first, first + packed.shape[0], device=packed.device)
    assigned = torch.searchsorted(offsets.to(packed.device), places, right=True) - 1
    return Run(packed, ids, assigned, places), full


def digest_of(tensor: Tensor) -> tuple[object, ...]:
    """What tells one tensor from another, wherever they are."""
    values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)  # numpy has no bfloat16
    return tensor.dtype, tuple(tensor.shape), zlib.crc32(values.numpy().data)
