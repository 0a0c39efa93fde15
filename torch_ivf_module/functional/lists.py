"""Inverted lists as flat tensors, and the bookkeeping of ragged ranges.

L lists, N vectors, d dim, Q queries, P probes a query, W positions a query. A *row* is a position in the packed
tensor; an *id* is the user's label of it. Lists are contiguous runs of rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class InvertedLists(NamedTuple):
    """The vectors of list l are rows ``offsets[l]:offsets[l + 1]``, in the order they were added.

    List number L stands for no list: it is empty, and lies behind the last one.
    """

    packed: Tensor  # (N, d) storage dtype
    offsets: Tensor  # (L + 1,) int64
    ids: Tensor  # (N,) int64
    sizes: Tensor  # (L + 1,) int64: rows in each list, 0 in the last entry
    bias: Tensor  # (N,) float32, or (0,) where the metric has none; see metric.row_bias


def inverted_lists(packed: Tensor, offsets: Tensor, ids: Tensor, bias: Tensor) -> InvertedLists:
    """InvertedLists of the buffers and the bias of each row."""
    return InvertedLists(packed, offsets, ids, torch.nn.functional.pad(lengths(offsets), (0, 1)), bias)


def lengths(offsets: Tensor) -> Tensor:
    """Rows in each list, (L,)."""
    return offsets[1:] - offsets[:-1]


def offsets_of(assigned: Tensor, nlist: int) -> Tensor:
    """Offsets (nlist + 1,) of lists holding the rows `assigned` (N,) says."""
    ends = torch.bincount(assigned, minlength=nlist).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def pack(x: Tensor, ids: Tensor, assigned: Tensor, nlist: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort vectors (N, d) and ids (N,) by list, keeping their order within one: packed, offsets, ids."""
    order = torch.sort(narrow(assigned, nlist), stable=True).indices
    return x.index_select(0, order), offsets_of(assigned, nlist), ids.index_select(0, order)


def append(
    packed: Tensor, offsets: Tensor, ids: Tensor, x: Tensor, new_ids: Tensor, assigned: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors in which each list is followed by what is added to it; every vector is copied once."""
    nlist = offsets.shape[0] - 1
    if packed.shape[0] == 0:
        return pack(x, new_ids, assigned, nlist)
    order = torch.sort(narrow(assigned, nlist), stable=True).indices
    extra = offsets_of(assigned, nlist)
    arange = torch.arange(packed.shape[0] + x.shape[0], device=packed.device)
    # An old row moves up by what was added to earlier lists; a new one lies behind all old rows of its list.
    old_at = arange[: packed.shape[0]] + torch.repeat_interleave(extra[:-1], lengths(offsets))
    new_at = arange[: x.shape[0]] + offsets[1:].index_select(0, assigned.index_select(0, order))
    out = packed.new_empty((arange.shape[0], packed.shape[1]))
    out.index_copy_(0, old_at, packed).index_copy_(0, new_at, x.index_select(0, order))
    out_ids = ids.new_empty(arange.shape[0])
    out_ids.index_copy_(0, old_at, ids).index_copy_(0, new_at, new_ids.index_select(0, order))
    return out, offsets + extra, out_ids


def keep_rows(packed: Tensor, offsets: Tensor, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors with only the rows where `kept` (N,) is true, in their order."""
    before = torch.cat([offsets.new_zeros(1), kept.cumsum(0)])
    return packed[kept], before.index_select(0, offsets), ids[kept]


def marked(ids: Tensor, mask: Tensor) -> Tensor:
    """Which ids (N,) a bool mask over ids marks: bool (N,); an id that lies outside the mask is not marked."""
    outside = (ids < 0) | (ids >= mask.shape[0])
    return torch.cat([mask, mask.new_zeros(1)])[torch.where(outside, mask.shape[0], ids)]


def vectors_at(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    """The vectors (Q, k, d) of rows (Q, k) that count on from part to part, each (N, d); NaN for a row of -1."""
    found = parts[0].new_full((*rows.shape, parts[0].shape[1]), math.nan)
    before = 0
    for part in parts:
        here = (rows >= before) & (rows < before + part.shape[0])
        found[here] = part[rows[here] - before]
        before += part.shape[0]
    return found


def only(lists: InvertedLists, kept: Tensor) -> InvertedLists:
    """The lists with nothing to be found in them but the rows that `kept` (N,) says."""
    bias = lists.bias if lists.bias.shape[0] else torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
    return lists._replace(bias=torch.where(kept, bias, -math.inf))


def ranges_to_positions(starts: Tensor, sizes: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Lay each query's ranges end to end.

    starts, sizes (Q, P) int64: range p of a query is ``starts[p] : starts[p] + sizes[p]``. Returns positions
    (Q, width), negative behind the last range, and the range each came from (Q, width), P behind the last.
    """
    queries = starts.shape[0]
    ends = sizes.cumsum(1)
    # Position w lies in the range whose number is the count of ranges that end at or before w.
    marks = torch.zeros(queries, width + 1, dtype=torch.int64, device=starts.device)
    marks.scatter_add_(1, ends.clamp(max=width), torch.ones_like(ends))
    probe = marks[:, :width].cumsum(1)
    moves = torch.nn.functional.pad(starts - ends + sizes, (0, 1), value=-width)
    along = torch.arange(width, device=starts.device)
    return moves.gather(1, probe).add_(along), probe


def narrow(assigned: Tensor, nlist: int) -> Tensor:
    """List numbers in the smallest integer that holds them: a CPU sorts int16 three times as fast as int64."""
    return assigned.to(torch.int16 if nlist < 1 << 15 else torch.int32)
