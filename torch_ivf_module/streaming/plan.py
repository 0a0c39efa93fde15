"""How many rows are handled at a time, so that building an index from a file takes no more than some memory.

N rows, L lists, S rows of the sample, d dim.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

from ..advice import FEWEST_ROWS
from ..index import IndexIVF
from ..index.base import IndexBase

__all__ = ["DEFAULT_MEMORY", "Plan", "least_memory", "plan"]

DEFAULT_MEMORY = 512 << 20
# Bytes beside those of the rows in hand. For each number of a centroid: training has the old and the new centroids, the
# old ones about the origin and their sums, some of them as float64; assigning has centroids, those about the origin,
# and the copy of them that the kernel reads. For each row of the sample: its number, place and list as int64.
_TRAINING, _ASSIGNING, _SAMPLED = 32, 12, 32
# Copies of a row in hand: as it was read, about its origin or at unit length; as it is stored, and sorted; while rows
# are merged those that are written still.
_READ, _STORED, _MERGED, _NUMBERS = 5, 2, 3, 64
_KEPT = 32 << 20  # what the allocator keeps of freed blocks, and what training takes at a time
_SHARE = 0.7  # of what is left, for rows: freed blocks are kept in pieces


class Plan(NamedTuple):
    """How an index is built within memory."""

    sample: int  # rows to train on, of all processes
    batch: int  # rows to read at a time
    merged: int  # stored rows to sort at a time


def least_memory(nlist: int, d: int, sample: int, kept: int = _KEPT) -> int:
    """Bytes that training on so many rows, none if the index is trained, and assigning take beside rows in hand."""
    return kept + max(_ASSIGNING * nlist * d, (_TRAINING * nlist * d + _SAMPLED * sample) if sample else 0)


def plan(index: IndexBase, rows: int, sample: int, batch: int | None, max_memory: int) -> Plan:
    """What fits: a smaller sample with a warning, fewer rows at a time; ValueError if centroids alone do not.

    `rows` and `sample` are those of the file and to train on, `batch` the most to read at a time.
    """
    nlist = index.nlist if isinstance(index, IndexIVF) else 0
    numbers, kept = nlist * index.d, min(_KEPT, max_memory // 4)
    room = max_memory - kept - _ASSIGNING * numbers
    most = (max_memory - kept - _TRAINING * numbers) // _SAMPLED
    if room <= 0 or (sample and most < nlist):
        least = least_memory(nlist, index.d, nlist if sample else 0, kept)
        raise ValueError(
            f"max_memory must be more than {least:,} bytes for {nlist:,} lists of {index.d} numbers, got {max_memory:,}"
        )
    if most < min(sample, FEWEST_ROWS * nlist):
        text = f"max_memory allows training on {most:,} rows of {sample:,}, which is few for {nlist:,} lists"
        warnings.warn(text, stacklevel=3)
    stored = index.store.packed.element_size() * index.store.packed.shape[1]
    read, sort = _READ * 4 * index.d + _STORED * stored + _NUMBERS, _MERGED * stored + _NUMBERS
    return Plan(
        min(sample, most),
        max(1, min(rows if batch is None else batch, int(_SHARE * room / read))),
        max(1, int(_SHARE * room / sort)),
    )
