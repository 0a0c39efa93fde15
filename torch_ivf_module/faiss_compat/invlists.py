"""The lists of an inverted file, and searches in lists that the caller chose.

Q queries, P probes, d dim, k results, n rows of a list.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional.metric import to_distance
from ..index.searching import prepared, range_of_prepared, search_prepared
from ..params import SearchParams


class InvertedLists:
    """The lists of an index, to read."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @property
    def nlist(self) -> int:
        """Number of lists."""
        return self._index.nlist

    @property
    def code_size(self) -> int:
        """Bytes of a stored vector."""
        return self._index.code_size

    def list_size(self, list_no: int) -> int:
        """Vectors in a list."""
        part = self._part(list_no)
        return part.stop - part.start

    def get_ids(self, list_no: int) -> Any:
        """The ids (n,) int64 of a list."""
        return self._index.ids()[self._part(list_no)].cpu().numpy()

    def get_codes(self, list_no: int) -> Any:
        """The bytes (n * code_size,) uint8 of the vectors of a list."""
        part = self._index.module.store.packed_lists()[0][self._part(list_no)]
        return part.cpu().contiguous().view(torch.uint8).numpy().reshape(-1)

    def compute_ntotal(self) -> int:
        """Vectors in all lists."""
        return self._index.ntotal

    def imbalance_factor(self) -> float:
        """How uneven the lists are: 1 if all have the same size."""
        return self._index.module.imbalance_factor()

    def _part(self, list_no: int) -> slice:
        if not 0 <= list_no < self.nlist:
            raise RuntimeError(f"list_no must be in 0 .. {self.nlist - 1}, got {list_no}")
        offsets = self._index.module.store.packed_lists()[1]
        return slice(*offsets[list_no : list_no + 2].tolist()) if offsets.shape[0] else slice(0, 0)


def nearest_in(module: Any, x: Tensor, k: int, lists: Tensor, settings: SearchParams) -> tuple[Tensor, Tensor]:
    """D and I (Q, k) of a search for x (Q, d) in `lists` (Q, P) of an inverted file, -1 for none."""
    module.store.require_trained("search")
    with torch.no_grad():
        scores, _, ids, _ = search_prepared(module, prepared(module, x), k, settings, _probed(module, lists))
        return to_distance(scores, module.metric), ids


def within_in(
    module: Any, x: Tensor, radius: float, lists: Tensor, settings: SearchParams
) -> tuple[Tensor, Tensor, Tensor]:
    """lims (Q + 1,), D and I (n,) of a search by radius for x (Q, d) in `lists` (Q, P), -1 for none."""
    module.store.require_trained("range_search")
    radii = torch.full(x.shape[:1], radius, dtype=torch.float32, device=x.device)
    return range_of_prepared(module, prepared(module, x), radii, settings, _probed(module, lists))


def _probed(module: Any, lists: Tensor) -> Tensor:
    """Lists (Q, P) as a search takes them: list L is no list."""
    if bool((lists >= module.nlist).any()) or bool((lists < -1).any()):
        raise ValueError(f"the lists must be in -1 .. {module.nlist - 1}")
    return lists.masked_fill(lists < 0, module.nlist)
