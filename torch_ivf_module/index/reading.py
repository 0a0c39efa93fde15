"""Reading an index by id and by list.

N vectors, L lists, d dim, n ids, H hits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional import lists as ragged
from ..functional.id_lookup import last_of, rows_with
from . import validation
from .eager import eager, opaque
from .module import IndexModule


class ListStats(NamedTuple):
    """How the vectors of an index are spread over its lists."""

    lists: int
    empty: int
    min: int
    median: float
    max: int
    imbalance: float


class Reads(IndexModule):
    """An index that is read by id and by list."""

    @eager
    def reconstruct(self, id: int) -> Tensor:
        """The stored vector (d,) of an id, in the storage dtype; of a duplicate id the last. KeyError if unknown."""
        return self.reconstruct_batch(torch.tensor([validation.whole(id, "id")], device="cpu").to(self.device))[0]

    @eager
    def reconstruct_n(self, start: int, n: int) -> Tensor:
        """The stored vectors (n, d) of ids ``start : start + n``, each as `reconstruct`. KeyError if one is unknown."""
        if validation.whole(n, "n") < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        return self.reconstruct_batch(validation.whole(start, "start") + torch.arange(n, device=self.device))

    @eager
    def reconstruct_batch(self, ids: Tensor) -> Tensor:
        """The stored vectors (n, d) of ids (n,) int64, each as `reconstruct`. KeyError if one is unknown."""
        wanted, back = validation.id_list(ids, "ids", self.device).unique(return_inverse=True)
        with self._lock:
            self._pack_many()
            waiting = self._updates.joined()[0] if self._updates.rows else None
            rows = self._last_rows(wanted)
            at = last_of(*self._updates.find(wanted), wanted.shape[0])
            unknown = wanted[(rows < 0) & (at < 0)]
            if unknown.shape[0]:
                raise KeyError(f"id {int(unknown[0])} is not in the index")
            packed = self._raw("packed_embeddings")
            found = packed.new_empty(wanted.shape[0], self.d)
            found[at < 0] = packed[rows[at < 0]]  # what waits was added later
            if waiting is not None:
                found[at >= 0] = waiting[at[at >= 0]]
        return found[back]

    @eager
    def list_sizes(self) -> Tensor:
        """Vectors in each list, (L,) int64; a flat index is one list, an untrained one has none."""
        offsets = self._packed()[1]
        return ragged.lengths(offsets) if self._nlist else offsets[:0]

    @eager
    def imbalance_factor(self) -> float:
        """How many times the rows of evenly filled lists a query reads, were queries spread as the vectors are.

        As faiss has it: ``L * sum(sizes ** 2) / sum(sizes) ** 2``, at best 1; 1 for an empty index.
        """
        sizes = self.list_sizes().double()
        return float(sizes.shape[0] * sizes.square().sum() / sizes.sum().square()) if self.ntotal else 1.0

    @eager
    def list_stats(self) -> ListStats:
        """The number of lists, how many are empty, their least, median and greatest size, and `imbalance_factor`."""
        sizes = self.list_sizes()
        if not sizes.shape[0]:
            return ListStats(0, 0, 0, 0.0, 0, 1.0)
        return ListStats(
            lists=sizes.shape[0],
            empty=int((sizes == 0).sum()),
            min=int(sizes.min()),
            median=float(sizes.double().quantile(0.5)),
            max=int(sizes.max()),
            imbalance=self.imbalance_factor(),
        )

    @opaque
    def memory_bytes(self) -> int:
        """Bytes of the buffers and of what was derived from them so far; graphs made of the index are left out."""
        with self._lock:
            tensors = [tensor for tensor in self.__dict__["_buffers"].values() if tensor is not None]
            if self._derived is not None:
                tensors += [*self._derived.coarse, self._derived.lists.sizes, self._derived.lists.bias]
            if self._sorted is not None:
                tensors.append(self._sorted[1])
            return sum(tensor.nbytes for tensor in tensors) + self._updates.bytes

    # -- rows and ids --------------------------------------------------------------------------------------

    def _rows_with(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The packed rows (H,) that carry a wanted id and are not gone, and the place in `wanted` of each."""
        rows, which = rows_with(self._raw("list_ids"), self._id_order(), wanted)
        if self._updates.gone is None:
            return rows, which
        kept = ~self._updates.gone[rows]
        return rows[kept], which[kept]

    def _last_rows(self, wanted: Tensor) -> Tensor:
        """The packed row (n,) of the last added vector of each wanted id, -1 for none; what waits is left out."""
        rows, which = self._rows_with(wanted)
        last = last_of(rows, which, wanted.shape[0])
        if not self._latest:
            return last
        noted = torch.tensor([self._latest.get(id, -1) for id in wanted.tolist()], device="cpu").to(wanted.device)
        number = torch.searchsorted(self._raw("list_offsets"), rows, right=True) - 1
        there = number == noted[which]
        in_list = last_of(rows[there], which[there], wanted.shape[0])
        return torch.where(in_list < 0, last, in_list)

    def _oldest_first(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """All vectors (N, d), their ids (N,) and lists (N,), and how many at the end are the last added of an id noted
        as a duplicate; else the order is that of the buffers."""
        packed, offsets, ids = self._packed()
        numbers = torch.arange(self._nlist, device=ids.device)
        assigned = torch.repeat_interleave(numbers, ragged.lengths(offsets)) if self._nlist else ids[:0]
        last = self._last_rows(torch.tensor(list(self._latest), dtype=torch.int64, device="cpu").to(ids.device))
        last = last[last >= 0]
        if last.shape[0]:
            earlier = torch.ones_like(ids, dtype=torch.bool).index_fill_(0, last, False)
            order = torch.cat([torch.nonzero(earlier)[:, 0], last])
            packed, ids, assigned = packed[order], ids[order], assigned[order]
        return packed, ids, assigned, last.shape[0]
