"""The query-major scan over a copy of the lists in tiles (d, TILE) of TILE rows, a layout for compilers.

Q queries, L lists, P probes, T tiles, W tiles per query, d dim, k results.

Each list starts with a new tile, so a query's candidates are W tile numbers instead of TILE * W row numbers. In a tile
the values of all its rows for one dimension are adjacent, so a compiler's loop over d fills a vector register with
rows. Unused rows of the last tile of a list have a bias of -inf, and so has the last tile, T, which is of no list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .chunking import in_chunks
from .filters import rows_in_mask
from .lists import InvertedLists, ranges_to_positions
from .row_codes import vectors_of
from .select import PADDING, best_positions

TILE = 16  # rows: two AVX2 registers of float32, one AVX-512 register
_TILES_AT_A_TIME = 1 << 12  # tiles copied at a time
_GATHER_BYTES = 32 << 20  # tiles gathered at a time where no compiler fuses the gather with the product


class Tiles(NamedTuple):
    """A copy of the vectors of inverted lists."""

    vectors: Tensor  # (T + 1, d, TILE) any float dtype
    bias: Tensor  # (T + 1, TILE) float32, -inf where there is no row
    rows: Tensor  # (T + 1,) int64: the first packed row of each tile
    offsets: Tensor  # (L + 1,) int64
    sizes: Tensor  # (L + 1,) int64: tiles of each list, 0 in the last entry


def tiles_of(lists: InvertedLists, d: int, dtype: torch.dtype) -> Tiles:
    """Copy the vectors of `lists`, of `d` dimensions, into tiles of `dtype`. Synchronizes with the device."""
    sizes = torch.div(lists.sizes + (TILE - 1), TILE, rounding_mode="floor")
    offsets = sizes.cumsum(0) - sizes
    list_of = torch.repeat_interleave(torch.arange(sizes.shape[0], device=sizes.device), sizes)
    first = (torch.arange(list_of.shape[0], device=sizes.device) - offsets[list_of]) * TILE  # row within its list
    rows = torch.nn.functional.pad(lists.offsets[list_of] + first, (0, 1))
    remaining = torch.nn.functional.pad(lists.sizes[list_of] - first, (0, 1))  # rows of the list from here on
    lane = torch.arange(TILE, device=sizes.device)
    real = lane < remaining[:, None]
    at = (rows[:, None] + lane).masked_fill_(~real, 0)
    vectors = lists.packed.new_zeros((at.shape[0], d, TILE), dtype=dtype)
    bias = torch.zeros(at.shape, dtype=torch.float32, device=at.device)
    if lists.packed.shape[0]:
        for start in range(0, at.shape[0], _TILES_AT_A_TIME):
            chunk = slice(start, start + _TILES_AT_A_TIME)
            vectors[chunk] = vectors_of(lists.packed[at[chunk]], d).transpose(1, 2).to(dtype)
        if lists.bias.shape[0]:
            bias = lists.bias[at]
    return Tiles(vectors, bias.masked_fill_(~real, PADDING), rows, offsets, sizes)


def mask_tiles(tiles: Tiles, kept: Tensor) -> Tiles:
    """The tiles with a bias of -inf for the packed rows where `kept` (N,) is false, so that no search returns them."""
    at = tiles.rows[:, None] + torch.arange(TILE, device=kept.device)
    return tiles._replace(bias=torch.where(kept[at.clamp(max=kept.shape[0] - 1)], tiles.bias, PADDING))


def most_tiles(tiles: Tiles, nprobe: int) -> int:
    """Tiles of the `nprobe` longest lists together. Synchronizes with the device."""
    return int(torch.sort(tiles.sizes, descending=True).values[:nprobe].sum())


def scan_tiles(
    x: Tensor,
    tiles: Tiles,
    probed: Tensor,
    k: int,
    width: int,
    max_bytes: int,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best rows of the probed lists: ranking scores and packed rows (Q, min(k, TILE * width)), -inf and -1.

    x (Q, d) relative to the origin; probed (Q, P), L for no list; `width` is what `most_tiles` returns.
    Unless a graph is recorded, it takes about `max_bytes` of workspace, or what one query needs if that is more.
    """
    # Two temporaries for the tiles of a query: gathered, and multiplied.
    step = max(1, min(_GATHER_BYTES, max_bytes) // max(1, 8 * TILE * width * x.shape[1]))
    tensors = (x, probed) if mask is None else (x, probed, mask)
    return in_chunks(lambda x, probed, *mask: _scan(x, tiles, probed, k, width, ids, *mask), step, *tensors)


def _scan(
    x: Tensor, tiles: Tiles, probed: Tensor, k: int, width: int, ids: Tensor | None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    at = ranges_to_positions(tiles.offsets[probed], tiles.sizes[probed], width)[0]
    at = torch.where(at < 0, tiles.rows.shape[0] - 1, at)
    scores = tiles.bias[at] + (tiles.vectors[at].float() * x[:, None, :, None]).sum(2)  # (Q, W, TILE)
    scores = scores.nan_to_num(nan=PADDING, posinf=PADDING, neginf=PADDING)
    if mask is not None and ids is not None:
        rows = (tiles.rows[at][:, :, None] + torch.arange(TILE, device=at.device)).clamp(max=ids.shape[0] - 1)
        scores = scores.masked_fill(~rows_in_mask(mask, ids, rows), PADDING)
    chosen = best_positions(scores.amax(2), k)[1]
    best, among = best_positions(scores.gather(1, chosen[:, :, None].expand(-1, -1, TILE)).flatten(1), k)
    tile = torch.div(among, TILE, rounding_mode="floor")
    rows = tiles.rows[at.gather(1, chosen.gather(1, tile))] + (among - tile * TILE)
    return best, rows.masked_fill(best == PADDING, -1)
