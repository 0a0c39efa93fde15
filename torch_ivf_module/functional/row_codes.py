"""Stored rows as vectors: floats, or 8- or 4-bit codes of the entries with a range for each row.

N rows, d dim, W bytes of a row.

A coded row is W bytes: the codes of its entries, one byte each, or two in a byte with the first in the low half; then
its scale and its offset as little-endian float32. An entry is ``offset + scale * code``: offset is the least entry,
scale the 255th (15th) part of the range. So a row is decoded without reading anything else, and moved as it is. The
number of bits follows from W and d; of d = 1, where both have the same W, the only code is 0.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from .chunking import in_chunks

BITS = (8, 4)
_RANGE_BYTES = 8  # scale and offset
_ROUNDING = 2.0**-23  # of a decoded entry, relative to the largest of the row: the product and the sum, rounded
_ENTRIES = 1 << 18  # encoded at a time: 1 MiB of float32; 2 million rows of 128 a second, all at once 0.3 million
_LEVEL_ROUNDING = 1e-4  # of a code before it becomes an integer, from a quotient that is rounded


class SplitRows(NamedTuple):
    """Coded rows in two tensors, for graphs: formats of model files do not all have an operation that reads bytes as
    floats."""

    codes: Tensor  # (N, W - 8) uint8
    ranges: Tensor  # (N, 2) float32: scale and offset

    @property
    def shape(self) -> torch.Size:
        """The shape of the codes."""
        return self.codes.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.codes.device


Rows = Tensor | SplitRows  # (N, d) floats, or coded rows (N, W) uint8


def width(d: int, bits: int) -> int:
    """Bytes of a coded row.

    >>> width(128, 8), width(5, 4)
    (136, 11)
    """
    return -(-d * bits // 8) + _RANGE_BYTES


def bits_of(bytes: int, d: int) -> int | None:
    """The bits of codes in rows of so many bytes, 8 where both have so many, None where neither has."""
    return next((bits for bits in BITS if width(d, bits) == bytes), None)


def encode(x: Tensor, bits: int) -> Tensor:
    """Coded rows (N, W) of finite vectors x (N, d), as float32.

    The difference of the largest and the least entry of a row must be finite in float32.

    >>> encode(torch.tensor([[0.0, 1.0, 3.0]]), 8)[0, :3]
    tensor([  0,  85, 255], dtype=torch.uint8)
    """
    return in_chunks(lambda part: _encoded(part, bits), max(1, _ENTRIES // max(1, x.shape[1])), x.detach())


def _encoded(x: Tensor, bits: int) -> Tensor:
    levels = 2**bits - 1
    x = x.float()
    least, largest = x.aminmax(dim=1, keepdim=True)
    extent = largest - least
    scale = extent / levels
    # Rounded up, so that no entry is above the last level: of denormal numbers it could be by many levels.
    scale = torch.where(scale * levels < extent, torch.nextafter(scale, torch.full_like(scale, torch.inf)), scale)
    codes = ((x - least) / torch.where(scale > 0, scale, 1)).round_().clamp_(0, levels).to(torch.uint8)
    if bits == 4:
        codes = torch.nn.functional.pad(codes, (0, x.shape[1] % 2)).unflatten(1, (-1, 2))
        codes = codes[:, :, 0] | (codes[:, :, 1] << 4)
    return assembled(codes, torch.cat([scale, least], 1))


def assembled(codes: Tensor, ranges: Tensor) -> Tensor:
    """Coded rows (N, W) of codes (N, W - 8), two in a byte if they are of 4 bits, and scales and offsets (N, 2)."""
    return torch.cat([codes, _as_bytes(ranges)], 1)


def vectors_of(rows: Rows, d: int) -> Tensor:
    """Rows (..., d) or (..., W) as vectors (..., d): floats as they are, coded rows decoded to float32.

    >>> vectors_of(encode(torch.tensor([[0.0, 1.0, 3.0]]), 8), 3)
    tensor([[0., 1., 3.]])
    """
    if isinstance(rows, Tensor) and rows.dtype != torch.uint8:
        return rows
    codes, ranges = rows if isinstance(rows, SplitRows) else split(rows)
    return decoded(codes, ranges, d)


def as_float(rows: Rows, d: int) -> Tensor:
    """Rows as float32 vectors (..., d); no copy of rows that are float32 already."""
    return vectors_of(rows, d).float()


def rows_at(rows: Rows, at: Tensor) -> Rows:
    """The rows at the positions `at` (M,)."""
    if isinstance(rows, SplitRows):
        return SplitRows(rows.codes.index_select(0, at), rows.ranges.index_select(0, at))
    return rows.index_select(0, at)


def decoded(codes: Tensor, ranges: Tensor, d: int) -> Tensor:
    """The vectors (..., d) of codes (..., W - 8) and ranges (..., 2). TorchScript compiles this function too."""
    if codes.shape[-1] != d:  # two in a byte
        codes = torch.stack([codes & 15, codes // 16], -1).flatten(-2)[..., :d]  # torch.onnx would write >> as of int8
    return codes.float().mul_(ranges[..., :1]).add_(ranges[..., 1:])


def split(rows: Tensor) -> SplitRows:
    """Coded rows (..., W) as codes and ranges; the codes share their memory."""
    return SplitRows(rows[..., :-_RANGE_BYTES], _as_floats(rows[..., -_RANGE_BYTES:]))


def error_bound(rows: Tensor, d: int) -> Tensor:
    """How far any entry of the decoded vector may be from the one that was encoded, for coded rows (N, W): (N,)."""
    scale, offset = split(rows).ranges.double().unbind(1)
    levels = 2 ** (bits_of(rows.shape[1], d) or 8) - 1
    largest = torch.maximum(offset.abs(), (offset + scale * levels).abs())
    return scale * (0.5 + _LEVEL_ROUNDING) + _ROUNDING * largest + 2.0**-149


def _as_bytes(x: Tensor) -> Tensor:
    """Floats (N, m) as little-endian bytes (N, 4 * m)."""
    found = x.contiguous().view(torch.uint8)
    return found if sys.byteorder == "little" else found.unflatten(1, (-1, 4)).flip(2).flatten(1)


def _as_floats(x: Tensor) -> Tensor:
    """Little-endian bytes (..., 4 * m) as float32 (..., m)."""
    x = x if sys.byteorder == "little" else x.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)
    return x.clone(memory_format=torch.contiguous_format).view(torch.float32)  # a copy: the view needs an aligned start
