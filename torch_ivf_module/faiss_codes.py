"""Rows of faiss's scalar quantizers as rows of ours, and the other way.

N rows, d dim, W bytes of a coded row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .functional.row_codes import as_float, assembled
from .index.base import IndexBase
from .index.row_format import CodeRows

# The scalar quantizers that can be decoded, and the bits of the codes that are kept of them; None for floats.
QUANTIZERS = {
    "QT_8bit": 8,
    "QT_4bit": 4,
    "QT_6bit": 8,
    "QT_8bit_uniform": 8,
    "QT_4bit_uniform": 4,
    "QT_8bit_direct": 8,
    "QT_8bit_direct_signed": 8,
    "QT_fp16": None,
    "QT_bf16": None,
}
_DTYPES = {"QT_fp16": torch.float16, "QT_bf16": torch.bfloat16}
_DIRECT = {"QT_8bit_direct": 0.0, "QT_8bit_direct_signed": -128.0}  # the offset of codes whose scale is 1
CPU = torch.device("cpu")  # where faiss's vectors go, whatever the default device
ROWS = 1 << 14  # that are decoded at a time


class Unsupported(TypeError):
    """No counterpart here; the text says what works."""


# -- from faiss ----------------------------------------------------------------------------------------------


def by_residual(faiss: Any, index: Any) -> bool:
    """Whether the codes of an inverted file are those of differences from the centroid."""
    return isinstance(index, faiss.IndexIVFScalarQuantizer) and bool(index.by_residual)


def storage(faiss: Any, index: Any, codes: bool) -> tuple[str | None, dict[str, Any]]:
    """The name of the scalar quantizer of an index, None if it has none, and the `dtype` or the `bits` of ours."""
    sq = getattr(index, "sq", None)
    if sq is None:
        return None, {"dtype": torch.float32}
    names = {getattr(faiss.ScalarQuantizer, name, None): name for name in QUANTIZERS}
    if sq.qtype not in names:
        known = ", ".join(QUANTIZERS)
        raise Unsupported(f"index has faiss's scalar quantizer {sq.qtype}, which is not supported; these are: {known}")
    name = names[sq.qtype]
    if codes and QUANTIZERS[name] is not None:
        return name, {"bits": QUANTIZERS[name]}
    return name, {"dtype": torch.float32 if by_residual(faiss, index) else _DTYPES.get(name, torch.float32)}


def rows_of(
    faiss: Any, index: Any, quantizer: str | None, ours: IndexBase, codes: Any, centroid: Tensor | None = None
) -> Tensor:
    """faiss's codes (n, bytes), of one list if there is a centroid (d,), as rows that `ours` stores."""
    residual = by_residual(faiss, index)
    codes = np.ascontiguousarray(codes)
    if quantizer is not None and ours.store.format.name == CodeRows.name and not residual:
        kept = _range(faiss, index.sq, quantizer)
        if kept is not None:
            ranges = torch.tensor([kept], dtype=torch.float32, device=CPU)
            return assembled(torch.from_numpy(codes), ranges.expand(codes.shape[0], 2))
    vectors = torch.from_numpy(codes.view(np.float32) if quantizer is None else index.sq.decode(codes))
    vectors = vectors + centroid if residual and centroid is not None else vectors
    return ours.store.format.stored(vectors, "index", ours.store.packed.dtype)


def _range(faiss: Any, sq: Any, quantizer: str) -> tuple[float, float] | None:
    """The scale and offset of the codes, if all vectors and dimensions have the same."""
    if quantizer in _DIRECT:
        return 1.0, _DIRECT[quantizer]
    if not quantizer.endswith("_uniform"):
        return None
    least, extent = faiss.vector_to_array(sq.trained).tolist()
    scale = extent / (15 if "4bit" in quantizer else 255)
    return scale, least + scale / 2  # faiss decodes to the middle of a step


# -- to faiss ------------------------------------------------------------------------------------------------


def kind_of(faiss: Any, index: IndexBase) -> Any:
    """faiss's name of rows of two-byte floats or of codes; None for float32."""
    names = {torch.float16: "QT_fp16", torch.bfloat16: "QT_bf16", torch.float32: None}
    bits = index.config().get("bits")
    name = names[index.dtype] if bits is None else f"QT_{bits}bit"
    return None if name is None else getattr(faiss.ScalarQuantizer, name)


def train(faiss: Any, theirs: Any, rows: Tensor) -> None:
    """Give a scalar quantizer of codes the range of each dimension of the rows (N, W)."""
    ends = [torch.stack(as_float(chunk, theirs.d).aminmax(dim=0)) for chunk in rows.split(ROWS) if chunk.shape[0]]
    if ends:
        both = torch.stack(ends)
        least, largest = both[:, 0].amin(0), both[:, 1].amax(0)
        faiss.copy_array_to_vector(torch.cat([least, largest - least]).numpy(), theirs.sq.trained)
        theirs.is_trained = True


def codes_of(theirs: Any, packed: Tensor) -> Any:
    """Rows (n, ...) as faiss's codes (n, bytes): the bytes of floats, or codes of its own."""
    if packed.is_floating_point():
        return packed.contiguous().view(torch.uint8).numpy()
    return theirs.sq.compute_codes(as_float(packed, theirs.d).numpy())
