"""What an index stores, in numbers: the part of `ListStore` that only reads its attributes.

N packed rows, L lists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import schema
from .row_format import RowFormat

if TYPE_CHECKING:
    from .pending import PendingUpdates


class StoreSize:
    """Properties of a `ListStore`, which sets these attributes."""

    buffers: dict[str, Tensor]
    format: RowFormat
    flat: bool
    own: tuple[str, ...]
    _updates: PendingUpdates

    def check(self, *, values: bool = True) -> None:
        """As `ListStore.check`."""
        raise NotImplementedError

    @property
    def packed(self) -> Tensor:
        """The packed rows (N, ...), as `format` has them."""
        return self.buffers[self.format.name]

    @property
    def _packed_rows(self) -> int:
        return self.packed.shape[0]

    @property
    def ntotal(self) -> int:
        """Rows, without deleted ones."""
        return self._packed_rows - self._updates.deleted_rows + self._updates.rows

    @property
    def nlist(self) -> int:
        """Number of lists: 1 for a flat index, 0 before training."""
        return max(0, self.buffers["list_offsets"].shape[0] - 1)

    @property
    def is_trained(self) -> bool:
        """Whether rows can be added."""
        return self.flat or self.buffers["centroids"].shape[0] > 0

    @property
    def grouped(self) -> bool:
        """Whether rows have groups."""
        return schema.GROUPS in self.buffers or self._updates.grouped

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.buffers[self.format.name].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors."""
        return self.format.vector_dtype(self.packed)

    @property
    def next_id(self) -> int:
        """The id that `add` gives next."""
        self.check()
        return int(self.buffers[schema.NEXT_ID])

    def require_trained(self, action: str) -> None:
        """Raise RuntimeError before training."""
        if not self.is_trained:
            raise RuntimeError(f"{action} needs a trained index: call train(x) first")

    def own_buffers(self) -> dict[str, Tensor]:
        """The buffers of the index that there are, by name."""
        return {name: self.buffers[name] for name in self.own if name in self.buffers}
