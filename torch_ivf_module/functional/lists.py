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

# Copying a chosen row costs as much as scanning some 50 rows by a product, or 3 one by one. So lists of only the
# chosen rows pay where a list has many visitors, or where few rows are chosen.
_COPY = 50
_FEW = 32
_DENSE = 16  # largest id over number of rows, up to which a mask over ids (a gather) beats a search among sorted ids


class InvertedLists(NamedTuple):
    """The vectors of list l are rows ``offsets[l] : offsets[l] + sizes[l]``.

    List number L stands for no list: it is empty, and lies behind the last one. In an index lists lie end to end; those
    that `prefixes` makes overlap.
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


def sampled_lists(offsets: Tensor, rows: int) -> Tensor:
    """The lists that some of so many packed rows are in, evenly spaced: at most 256, none where there are no rows."""
    some = min(rows, 256)
    at = torch.div(torch.arange(some, device=offsets.device) * rows, max(1, some), rounding_mode="floor")
    return torch.searchsorted(offsets, at, right=True) - 1


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
    rows = torch.nonzero(kept)[:, 0]  # as an index of its own a mask takes twice the time
    return packed.index_select(0, rows), torch.searchsorted(rows, offsets), ids.index_select(0, rows)


def prefixes(lists: InvertedLists, probed: Tensor, limits: Tensor, visitors: int) -> tuple[InvertedLists, Tensor]:
    """Lists that are the beginnings of lists, and which of them each query reads instead of probed (Q, P).

    The visitors of a list are sorted by how many rows `limits` (Q, P) lets them read. Each `visitors` of them share a
    beginning as long as the longest needs, so that little is read which nobody may see. Waits for the device.
    """
    target, most = probed.flatten(), limits.flatten()
    nlist, longest = lists.sizes.shape[0] - 1, int(most.max())
    order = torch.sort(narrow(target * (longest + 1) + (longest - most), (nlist + 1) * (longest + 1))).indices
    target, most = target[order], most[order]
    visits = torch.bincount(target, minlength=nlist + 1)
    rank = torch.arange(order.shape[0], device=order.device) - (visits.cumsum(0) - visits)[target]
    begins = torch.remainder(rank, visitors) == 0
    moved = torch.empty_like(order)
    moved[order] = begins.cumsum(0) - 1
    offsets = torch.cat([lists.offsets[target[begins]], lists.offsets[-1:]])
    sizes = torch.nn.functional.pad(most[begins], (0, 1))
    return lists._replace(offsets=offsets, sizes=sizes), moved.view(probed.shape)


def marked(ids: Tensor, chosen: Tensor) -> Tensor:
    """Which ids (N,) are chosen, by a bool mask whose entry i is for id i or by int64 ids in any order: bool (N,).

    >>> marked(torch.tensor([3, 0, 9]), torch.tensor([9, 9, 5]))
    tensor([False, False,  True])
    """
    if chosen.dtype == torch.bool:
        # On either side of the mask stands an entry for the ids that it does not reach.
        none = chosen.new_zeros(1)
        return torch.cat([none, chosen, none]).index_select(0, ids.clamp(-1, chosen.shape[0]).add_(1))
    if ids.shape[0] == 0 or chosen.shape[0] == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    first, last = torch.stack(chosen.aminmax()).tolist()
    if first < 0 or last >= _DENSE * ids.shape[0]:
        chosen = chosen.sort().values
        at = torch.searchsorted(chosen, ids).clamp_(max=chosen.shape[0] - 1)
        return chosen[at] == ids
    mask = torch.zeros(last + 1, dtype=torch.bool, device=ids.device)
    return marked(ids, mask.index_fill_(0, chosen, True))


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


def restricted(lists: InvertedLists, chosen: Tensor, visits: float | None) -> InvertedLists:
    """The lists with nothing to be found in them but what `chosen` says, as `marked` reads it. Waits for the device.

    `visits` is how many queries visit a list on average; where that pays, the result is new lists of those rows alone.
    With None rows keep their places, as whoever counts rows needs it.
    """
    kept = marked(lists.ids, chosen)
    if visits is None or int(torch.count_nonzero(kept)) > kept.shape[0] * max(1 / _FEW, visits / (visits + _COPY)):
        return only(lists, kept)
    bias = lists.bias.masked_select(kept) if lists.bias.shape[0] else lists.bias
    packed, offsets, ids = keep_rows(lists.packed, lists.offsets, lists.ids, kept)
    return inverted_lists(packed, offsets, ids, bias)


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


def narrow(numbers: Tensor, count: int) -> Tensor:
    """Numbers below `count` in the smallest integer that holds them: a CPU sorts int16 three times as fast as int64."""
    return numbers.to(torch.int16 if count < 1 << 15 else torch.int32 if count < 1 << 31 else torch.int64)
