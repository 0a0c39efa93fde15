"""Vectors that were added and not yet packed.

Packing costs a copy of the whole index, so single adds wait here. A search reads the waiting rows as a second,
small set of inverted lists; when they are many, they are packed. N packed rows, T waiting rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.lists import InvertedLists, inverted_lists, pack

_FEW = 512  # waiting rows that are cheap to sort again at every read, whatever the size of the index


class Staging:
    """Rows in the order they were added, each with its id and the list it was assigned to."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.rows = 0
        self.custom_ids = False
        self._lists: tuple[Tensor, InvertedLists] | None = None

    def push(self, x: Tensor, ids: Tensor, assigned: Tensor, *, custom_ids: bool) -> None:
        """Keep rows x (n, d), ids (n,) and lists (n,); the tensors are taken over, not copied.

        `custom_ids` says that the ids are the caller's, so that some may be there already.
        """
        self.custom_ids |= custom_ids
        self.parts.append((x, ids, assigned))
        self.rows += x.shape[0]
        self._lists = None

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """All waiting rows: x (T, d), ids (T,), lists (T,)."""
        if len(self.parts) > 1:
            x, ids, assigned = (torch.cat(column) for column in zip(*self.parts, strict=True))
            self.parts = [(x, ids, assigned)]
        return self.parts[0]

    def lists(self, nlist: int, origin: Tensor, metric: str) -> InvertedLists:
        """The waiting rows as inverted lists."""
        if self._lists is None or self._lists[0] is not origin:
            packed, offsets, ids = pack(*self.joined(), nlist)
            bias = metrics.row_bias(packed, origin, metric)
            self._lists = origin, inverted_lists(packed, offsets, ids, bias)
        return self._lists[1]


def few(waiting: int, packed: int) -> bool:
    """Whether reading `waiting` rows apart is cheaper than packing them.

    A read sorts T waiting rows; packing copies all N once every T reads. The sum is least at T = sqrt(N).
    """
    return waiting <= max(_FEW, math.isqrt(packed))
