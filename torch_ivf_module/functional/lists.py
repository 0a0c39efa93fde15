"""Inverted lists as flat tensors: packing, filtering, and ranges of different lengths side by side.

L lists, N vectors, d dim, Q queries, P probes per query, W positions per query. A *row* is a position in the packed
tensor; an *id* is the user's label of it. The rows of a list are contiguous.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .row_codes import Rows, rows_at, vectors_of

# Copying a row costs as much as scanning about _COPY rows by a matrix product, or 3 rows one by one. So a copy of the
# rows that pass a filter pays if many queries probe each list, or if at most one row in _FEW passes.
_COPY = 50
_FEW = 32
_SEARCH = 64  # finding the list of a row by search takes as long as writing the lists of so many rows
_DENSE = 16  # up to this ratio of largest id to number of rows, a mask over ids is faster than a search in sorted ids


# By `InvertedLists.sizes`, on the host: the rows of the 0, 1, 2, … longest lists together.
_longest: WeakIdKeyDictionary = WeakIdKeyDictionary()


class InvertedLists(NamedTuple):
    """The vectors of list l are rows ``offsets[l] : offsets[l] + sizes[l]``.

    List L stands for no list; it is empty. In an index each list starts where the one before it ends; those that
    `prefixes` returns overlap.
    """

    packed: Tensor  # (N, d) storage dtype, or coded rows (N, W) uint8; see row_codes, by whose functions it is read
    offsets: Tensor  # (L + 1,) int64
    ids: Tensor  # (N,) int64
    sizes: Tensor  # (L + 1,) int64: rows in each list, 0 in the last entry
    bias: Tensor  # (N,) float32, or (0,) where the metric has none; see metric.row_bias


def inverted_lists(packed: Tensor, offsets: Tensor, ids: Tensor, bias: Tensor) -> InvertedLists:
    """InvertedLists of the buffers of an index and the bias of each row."""
    return InvertedLists(packed, offsets, ids, torch.nn.functional.pad(lengths(offsets), (0, 1)), bias)


def most_rows(lists: InvertedLists, count: int) -> int:
    """The rows of the `count` longest lists together.

    Synchronizes with the device for the first search of these lists; the host keeps their sizes as long as they exist.
    """
    longest = _longest.get(lists.sizes)
    if longest is None:
        longest = list(itertools.accumulate(sorted(lists.sizes.tolist(), reverse=True), initial=0))
        _longest[lists.sizes] = longest
    return int(longest[min(count, len(longest) - 1)])


def lengths(offsets: Tensor) -> Tensor:
    """Rows in each list, (L,)."""
    return offsets[1:] - offsets[:-1]


def offsets_of(assigned: Tensor, nlist: int) -> Tensor:
    """Offsets (nlist + 1,) of lists, if row i belongs to list ``assigned[i]``; assigned (N,)."""
    ends = torch.bincount(assigned, minlength=nlist).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def lists_of(offsets: Tensor, rows: Tensor, total: int) -> Tensor:
    """The list of each of some rows (H,) of `total` packed rows; offsets (L + 1,)."""
    if _SEARCH * rows.shape[0] < total:
        return torch.searchsorted(offsets, rows, right=True) - 1
    numbers = torch.arange(offsets.shape[0] - 1, device=offsets.device)
    return numbers.repeat_interleave(lengths(offsets), output_size=total)[rows]


def sampled_lists(offsets: Tensor, rows: int) -> Tensor:
    """The lists of at most 256 evenly spaced rows of `rows` packed rows (S,)."""
    count = min(rows, 256)
    at = torch.div(torch.arange(count, device=offsets.device) * rows, max(1, count), rounding_mode="floor")
    return torch.searchsorted(offsets, at, right=True) - 1


def pack(x: Tensor, ids: Tensor, assigned: Tensor, nlist: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort vectors (N, d) and ids (N,) by list, stably: packed, offsets, ids."""
    order = torch.sort(narrow(assigned, nlist), stable=True).indices
    return x.index_select(0, order), offsets_of(assigned, nlist), ids.index_select(0, order)


def append(
    packed: Tensor, offsets: Tensor, ids: Tensor, x: Tensor, new_ids: Tensor, assigned: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """New packed, offsets and ids, with the new vectors x (n, d) at the end of their lists. Copies each vector once."""
    nlist = offsets.shape[0] - 1
    if packed.shape[0] == 0:
        return pack(x, new_ids, assigned, nlist)
    order = torch.sort(narrow(assigned, nlist), stable=True).indices
    extra = offsets_of(assigned, nlist)
    arange = torch.arange(packed.shape[0] + x.shape[0], device=packed.device)
    # An old row moves up by the number of rows added to earlier lists; a new row follows all old rows of its list.
    old_at = arange[: packed.shape[0]] + torch.repeat_interleave(extra[:-1], lengths(offsets))
    new_at = arange[: x.shape[0]] + offsets[1:].index_select(0, assigned.index_select(0, order))
    out = packed.new_empty((arange.shape[0], packed.shape[1]))
    out.index_copy_(0, old_at, packed).index_copy_(0, new_at, x.index_select(0, order))
    out_ids = ids.new_empty(arange.shape[0])
    out_ids.index_copy_(0, old_at, ids).index_copy_(0, new_at, new_ids.index_select(0, order))
    return out, offsets + extra, out_ids


def keep_rows(packed: Tensor, offsets: Tensor, ids: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """New packed, offsets and ids with only the rows where `kept` (N,) is true, in their order."""
    rows = torch.nonzero(kept)[:, 0]  # indexing by the mask itself takes twice the time
    return packed.index_select(0, rows), torch.searchsorted(rows, offsets), ids.index_select(0, rows)


def prefixes(lists: InvertedLists, probed: Tensor, limits: Tensor, visitors: int) -> tuple[InvertedLists, Tensor]:
    """New lists that are prefixes of the lists, and which of the new lists each query reads instead of probed (Q, P).

    The queries that probe a list are sorted by the number of rows that they read of it, `limits` (Q, P). Each group of
    `visitors` queries shares a prefix, as long as the longest that one of them reads. So few rows are read for queries
    that do not need them. Synchronizes with the device.
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


def is_selected(ids: Tensor, chosen: Tensor) -> Tensor:
    """Which ids (N,) are chosen: bool (N,). `chosen` is a bool mask whose entry i is for id i, or int64 ids.

    >>> is_selected(torch.tensor([3, 0, 9]), torch.tensor([9, 9, 5]))
    tensor([False, False,  True])
    """
    if chosen.dtype == torch.bool:
        # An additional entry, False, at either end of the mask is for negative ids and for ids beyond its end.
        none = chosen.new_zeros(1)
        return torch.cat([none, chosen, none]).index_select(0, ids.clamp(-1, chosen.shape[0]).add_(1))
    if ids.shape[0] == 0 or chosen.shape[0] == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    # The size of a mask would have to be read back from an accelerator.
    first, last = torch.stack(chosen.aminmax()).tolist() if chosen.is_cpu else (-1, -1)
    if first < 0 or last >= _DENSE * ids.shape[0]:
        chosen = chosen.sort().values
        at = torch.searchsorted(chosen, ids).clamp_(max=chosen.shape[0] - 1)
        return chosen[at] == ids
    mask = torch.zeros(last + 1, dtype=torch.bool, device=ids.device)
    return is_selected(ids, mask.index_fill_(0, chosen, True))


def ids_at(ids: Sequence[Tensor], rows: Tensor) -> Tensor:
    """The ids of rows (Q, k) that are numbered over all segments; -1 stays -1. `ids` (N,) of each segment."""
    result, before = torch.full_like(rows, -1), 0
    for segment in ids:
        if segment.shape[0]:
            local = rows - before if before else rows
            elsewhere = (local < 0) | (local >= segment.shape[0])
            result = torch.where(elsewhere, result, segment.take(local.masked_fill(elsewhere, 0)))
        before += segment.shape[0]
    return result


def vectors_at(segments: Sequence[Rows], rows: Tensor, d: int) -> Tensor:
    """The vectors (Q, k, d) of rows (Q, k) that are numbered over all segments; NaN for a row of -1."""
    dtype = torch.float32 if segments[0].dtype == torch.uint8 else segments[0].dtype
    vectors = torch.full((*rows.shape, d), math.nan, dtype=dtype, device=rows.device)
    before = 0
    for segment in segments:
        inside = (rows >= before) & (rows < before + segment.shape[0])
        vectors[inside] = vectors_of(rows_at(segment, rows[inside] - before), d)
        before += segment.shape[0]
    return vectors


def mask_rows(lists: InvertedLists, kept: Tensor) -> InvertedLists:
    """The lists with a bias of -inf for the rows where `kept` (N,) is false, so that no search returns them."""
    bias = lists.bias if lists.bias.shape[0] else torch.zeros(kept.shape, dtype=torch.float32, device=kept.device)
    return lists._replace(bias=torch.where(kept, bias, -math.inf))


def restricted(lists: InvertedLists, chosen: Tensor, visits: float | None) -> InvertedLists:
    """The lists restricted to the ids that are `chosen`, see `is_selected`.

    `visits` is how many queries probe a list on average. If a copy pays for that many, the result is new lists of the
    chosen rows; otherwise, and always with None, the other rows are masked as by `mask_rows`. None is for callers that
    limit the number of rows, which count masked ones too. On an accelerator rows are masked, since the host would have
    to wait for the size of a copy.
    """
    kept = is_selected(lists.ids, chosen)
    if visits is None or not kept.is_cpu:
        return mask_rows(lists, kept)
    if int(torch.count_nonzero(kept)) > kept.shape[0] * max(1 / _FEW, visits / (visits + _COPY)):
        return mask_rows(lists, kept)
    return kept_lists(lists, kept)


def kept_lists(lists: InvertedLists, kept: Tensor) -> InvertedLists:
    """Copies of the rows where `kept` (N,) is true."""
    bias = lists.bias.masked_select(kept) if lists.bias.shape[0] else lists.bias
    packed, offsets, ids = keep_rows(lists.packed, lists.offsets, lists.ids, kept)
    return inverted_lists(packed, offsets, ids, bias)


def ranges_to_positions(starts: Tensor, sizes: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Concatenate the ranges of each query.

    starts, sizes (Q, P) int64: range p of a query is ``starts[p] : starts[p] + sizes[p]``. Returns the positions in the
    ranges (Q, width), negative after the last range, and the number of the range of each (Q, width), P after the last.
    """
    queries = starts.shape[0]
    ends = sizes.cumsum(1)
    # Column w is in the range whose number is the count of ranges that end at or before w.
    marks = torch.zeros(queries, width + 1, dtype=torch.int64, device=starts.device)
    marks.scatter_add_(1, ends.clamp(max=width), torch.ones_like(ends))
    probe = marks[:, :width].cumsum(1)
    shifts = torch.nn.functional.pad(starts - ends + sizes, (0, 1), value=-width)
    column = torch.arange(width, device=starts.device)
    return shifts.gather(1, probe).add_(column), probe


def narrow(numbers: Tensor, count: int) -> Tensor:
    """Numbers below `count` in the smallest sufficient dtype: a CPU sorts int16 three times as fast as int64."""
    return numbers.to(torch.int16 if count < 1 << 15 else torch.int32 if count < 1 << 31 else torch.int64)
