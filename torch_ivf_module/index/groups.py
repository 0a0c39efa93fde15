"""The groups of rows: an optional buffer beside the ids, and the order of rows by it.

An index whose rows have no groups has no such buffer. N packed rows, L lists.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..functional.cells import NO_GROUP, append_by_group, pack_by_group
from ..functional.lists import append, keep_rows, pack
from . import schema
from .ids import IdLookup
from .pending import PendingUpdates

Packed = tuple[Tensor, Tensor, Tensor, Tensor | None]  # rows (N, ...), offsets (L + 1,), ids (N,), groups (N,)


def groups_in(buffers: Mapping[str, Tensor]) -> Tensor:
    """The groups (N,) of the packed rows, NO_GROUP for all if there is no buffer of them."""
    groups = buffers.get(schema.GROUPS)
    return torch.full_like(buffers["list_ids"], NO_GROUP) if groups is None else groups


def packed_by_list(rows: Tensor, ids: Tensor, groups: Tensor | None, assigned: Tensor, nlist: int) -> Packed:
    """Rows (N, ...) with ids and perhaps groups (N,) that belong to the lists `assigned` (N,), sorted."""
    if groups is None:
        return *pack(rows, ids, assigned, nlist), None
    return pack_by_group(rows, ids, groups, assigned, nlist)


def kept_rows(buffers: Mapping[str, Tensor], rows: Tensor, kept: Tensor) -> Packed:
    """The packed lists of an index with those of its packed rows (N, ...) alone where `kept` (N,) is true."""
    groups = buffers.get(schema.GROUPS)
    labels = _labels(buffers["list_ids"], groups, grouped=groups is not None)
    return _unlabelled(*keep_rows(rows, buffers["list_offsets"], labels, kept), grouped=groups is not None)


def repacked(buffers: Mapping[str, Tensor], rows: Tensor, updates: PendingUpdates, lookup: IdLookup) -> Packed:
    """The packed lists of an index after `updates` of its packed rows (N, ...); `lookup` is told of repeated ids."""
    grouped = schema.GROUPS in buffers or updates.grouped
    offsets, labels = buffers["list_offsets"], _labels(buffers["list_ids"], buffers.get(schema.GROUPS), grouped=grouped)
    if updates.deleted is not None:
        rows, offsets, labels = keep_rows(rows, offsets, labels, ~updates.deleted.mask)
    if updates.rows:
        new, ids, assigned, groups = updates.joined()
        if updates.custom_ids:
            lookup.note(labels[:, 0] if grouped else labels, ids, assigned, groups)
        join = append_by_group if grouped else append
        rows, offsets, labels = join(rows, offsets, labels, new, _labels(ids, groups, grouped=grouped), assigned)
    rows, offsets, ids, groups = _unlabelled(rows, offsets, labels, grouped=grouped)
    left = groups is not None and bool((groups != NO_GROUP).any())
    return rows, offsets, ids, groups if left else None


def _labels(ids: Tensor, groups: Tensor | None, *, grouped: bool) -> Tensor:
    """Ids (N,), or if `grouped` ids and groups (N, 2)."""
    if not grouped:
        return ids
    return torch.stack([ids, torch.full_like(ids, NO_GROUP) if groups is None else groups], 1)


def _unlabelled(rows: Tensor, offsets: Tensor, labels: Tensor, *, grouped: bool) -> Packed:
    if not grouped:
        return rows, offsets, labels, None
    # Not `contiguous`, which would return a single row's as they are, of stride 2.
    ids, groups = (column.clone(memory_format=torch.contiguous_format) for column in labels.unbind(1))
    return rows, offsets, ids, groups
