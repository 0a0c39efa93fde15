"""How the rows of an index are stored: as floats of one dtype, or as codes with a range for each row.

N rows, d dim, W bytes of a coded row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .._arrays import finite, finite_in_dtype, word
from ..functional import row_codes
from ..params import positive

STORAGE = (torch.float32, torch.float16, torch.bfloat16)  # dtypes of rows of floats
_CHECKED_ROWS = 1 << 16  # coded rows whose ranges are checked at a time


class RowFormat(Protocol):
    """What differs between stored rows. `rows` is always the buffer, or rows of it, (N, width)."""

    @property
    def d(self) -> int:
        """The dimension of the vectors."""

    @property
    def kind(self) -> str:
        """What an entry is; rows of one kind may be moved from one index to another."""

    @property
    def name(self) -> str:
        """The name of the buffer."""

    @property
    def width(self) -> int:
        """Entries of a stored row."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of a new buffer."""

    def vector_dtype(self, rows: Tensor) -> torch.dtype:
        """The dtype of the vectors that users see."""

    def config(self, rows: Tensor) -> dict[str, Any]:
        """The constructor arguments that make an index of this format."""

    def stored(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """Detached copies of vectors x (N, d) as rows of a buffer of this dtype; ValueError for one without a finite
        row, which calls x by `name`."""

    def copied(self, rows: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        """Copies of the rows of another index of this format, as rows of a buffer of this dtype."""

    def misfit(self, rows: Tensor) -> str | None:
        """Why a tensor cannot be the buffer; None if it can. No values are read."""

    def adopted(self, rows: Tensor) -> Tensor:
        """A tensor without misfit as the buffer."""

    def check_values(self, rows: Tensor) -> None:
        """ValueError if a vector is not finite."""

    def recast(self, rows: Tensor, before: Tensor) -> Tensor:
        """The buffer after ``nn.Module._apply`` made `rows` of the buffer `before`: in a dtype that it may have."""


@dataclass(frozen=True)
class FloatRows:
    """Rows (N, d) of one of the dtypes STORAGE, which casting the module changes; `dtype` is that of a new buffer."""

    d: int
    dtype: torch.dtype = torch.float32
    name = "packed_embeddings"
    kind = "floats"

    def __post_init__(self) -> None:
        positive(self.d, "d")
        if self.dtype not in STORAGE:
            raise ValueError(f"dtype must be torch.float32, torch.float16 or torch.bfloat16, got {self.dtype}")

    @property
    def width(self) -> int:
        return self.d

    def vector_dtype(self, rows: Tensor) -> torch.dtype:
        return rows.dtype

    def config(self, rows: Tensor) -> dict[str, Any]:
        return {"dtype": word(rows.dtype)}

    def stored(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        finite(x, name)
        kept = x.detach().to(dtype, copy=True)
        if kept.dtype != x.dtype:
            finite_in_dtype(kept, name)
        return kept.contiguous()

    copied = stored

    def misfit(self, rows: Tensor) -> str | None:
        if rows.dim() != 2 or rows.shape[1] != self.d:
            return f"{self.name} must have shape (n, {self.d}), got {tuple(rows.shape)}"
        return None if rows.is_floating_point() else f"{self.name} must hold floats, got {rows.dtype}"

    def adopted(self, rows: Tensor) -> Tensor:
        return rows if rows.dtype in STORAGE else rows.float()

    def check_values(self, rows: Tensor) -> None:
        finite_in_dtype(rows, self.name)

    def recast(self, rows: Tensor, before: Tensor) -> Tensor:
        rows = rows if rows.dtype in STORAGE else before.to(rows.device)
        if rows.dtype not in (before.dtype, torch.float32):
            finite_in_dtype(rows, self.name)
        return rows


@dataclass(frozen=True)
class CodeRows:
    """Rows (N, W) uint8 of codes of `bits` bits, see functional/row_codes.py. Casting the module does not change them,
    and the vectors that users see are float32."""

    d: int
    bits: int = 8
    name = "packed_codes"
    dtype = torch.uint8

    def __post_init__(self) -> None:
        positive(self.d, "d")
        if self.bits not in row_codes.BITS or isinstance(self.bits, bool):
            raise ValueError(f"bits must be 8 or 4, got {self.bits!r}")

    @property
    def kind(self) -> str:
        return f"codes of {self.bits} bits"

    @property
    def width(self) -> int:
        return row_codes.width(self.d, self.bits)

    def vector_dtype(self, rows: Tensor) -> torch.dtype:
        return torch.float32

    def config(self, rows: Tensor) -> dict[str, Any]:
        return {"bits": self.bits}

    def stored(self, x: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        finite(x, name)
        rows = row_codes.encode(x, self.bits)
        self._check_ranges(rows, f"{name} must have entries, and in each row a range of them, that float32 holds")
        return rows

    def copied(self, rows: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        return rows.clone()

    def misfit(self, rows: Tensor) -> str | None:
        if rows.dim() == 2 and rows.shape[1] == self.width and rows.dtype == torch.uint8:
            return None
        text = f"{self.name} must be uint8 of shape (n, {self.width}), rows of {self.d} codes of {self.bits} bits, got "
        text += f"{word(rows.dtype)} {tuple(rows.shape)}"
        other = row_codes.bits_of(rows.shape[1], self.d) if rows.dim() == 2 and rows.dtype == torch.uint8 else None
        return text if other is None else f"{text}, which has codes of {other} bits"

    def adopted(self, rows: Tensor) -> Tensor:
        return rows

    def check_values(self, rows: Tensor) -> None:
        self._check_ranges(rows, f"{self.name} must have finite scales and offsets")

    def recast(self, rows: Tensor, before: Tensor) -> Tensor:
        return rows if rows.dtype == torch.uint8 else before.to(rows.device)

    def _check_ranges(self, rows: Tensor, text: str) -> None:
        """ValueError, which begins with `text`, if the largest entry of a row would not be finite."""
        for start in range(0, 0 if rows.is_meta else rows.shape[0], _CHECKED_ROWS):
            scale, offset = row_codes.split(rows[start : start + _CHECKED_ROWS]).ranges.unbind(1)
            bad = torch.nonzero(~torch.isfinite(offset + scale * (2**self.bits - 1)))
            if bad.shape[0]:
                raise ValueError(f"{text}, but row {start + int(bad[0])} has not")


NAMES = (FloatRows.name, CodeRows.name)  # of the buffers of all formats
