"""Reading vectors and groups by id, sizes of lists and memory: methods of `IndexBase`.

L lists, d dim, n ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..functional.lists import lengths
from ..functional.rebalance import imbalance_of
from ..functional.row_codes import vectors_of
from . import validation
from .eager import eager, opaque
from .groups import groups_in

if TYPE_CHECKING:
    from .base import IndexBase


class ListStats(NamedTuple):
    """How the vectors of an index are distributed over its lists."""

    lists: int
    empty: int
    min: int
    median: float
    max: int
    imbalance: float


@eager
def reconstruct(self: IndexBase, id: int) -> Tensor:
    """The stored vector (d,) of an id, in the storage dtype; the last if several rows have it. KeyError if unknown."""
    return self.reconstruct_batch(torch.tensor([validation.int64(id, "id")], device="cpu").to(self.device))[0]


@eager
def reconstruct_n(self: IndexBase, start: int, n: int) -> Tensor:
    """The stored vectors (n, d) of ids ``start : start + n``, each as `reconstruct`. KeyError if one is unknown."""
    if validation.int64(n, "n") < 0:
        raise ValueError(f"n must be >= 0, got {n}")
    return self.reconstruct_batch(validation.int64(start, "start") + torch.arange(n, device=self.device))


@eager
def reconstruct_batch(self: IndexBase, ids: Tensor) -> Tensor:
    """The stored vectors (n, d) of ids (n,) int64, each as `reconstruct`. KeyError if one is unknown."""
    wanted, back = validation.id_list(ids, "ids", self.device).unique(return_inverse=True)
    return vectors_of(self.store.last_added(wanted), self.d)[back]


@eager
def list_sizes(self: IndexBase) -> Tensor:
    """Vectors in each list, (L,) int64; a flat index is one list, an untrained one has none."""
    offsets = self.store.packed_lists()[1]
    return lengths(offsets) if offsets.shape[0] else offsets


@eager
def imbalance_factor(self: IndexBase) -> float:
    """Average number of rows that a query reads, relative to lists of equal size, for queries distributed like vectors.

    As in faiss: ``L * sum(sizes ** 2) / sum(sizes) ** 2``, at best 1; 1 for an empty index.
    """
    return imbalance_of(self.list_sizes())


@eager
def list_stats(self: IndexBase) -> ListStats:
    """The number of lists and of empty lists, the minimum, median and maximum size, and `imbalance_factor`."""
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


@eager
def groups_of(self: IndexBase, ids: Tensor) -> Tensor:
    """The groups (n,) int64 of ids (n,) int64; if several rows have an id, of the row that `reconstruct` returns.

    -1 for a row that was added without a group. KeyError if an id is unknown.

    >>> from torch_ivf_module import IndexFlatL2
    >>> index = IndexFlatL2(2)
    >>> index.add(torch.eye(2), groups=torch.tensor([7, 3]))
    >>> index.groups_of(torch.tensor([1, 0]))
    tensor([3, 7])
    """
    wanted, back = validation.id_list(ids, "ids", self.device).unique(return_inverse=True)
    return self.store.last_added(wanted, groups=True)[back]


@eager
def group_sizes(self: IndexBase) -> tuple[Tensor, Tensor]:
    """The groups (G,) int64 that rows have, ascending, and the number of rows of each (G,) int64.

    -1 is among them if rows were added without a group.
    """
    with self.store.lock:
        self.store.packed_lists()
        groups, sizes = groups_in(self.store.buffers).unique(return_counts=True)
        return groups, sizes


@opaque
def memory_bytes(self: IndexBase) -> int:
    """Bytes of the buffers, of pending rows, and of tensors derived from them so far; graphs are not included."""
    return self.store.memory_bytes()


def check_buffers(self: IndexBase) -> None:
    """Raise RuntimeError if ids or offsets were overwritten by other code, as averaging of weights does, or if they
    have no values, because they are on the meta device or were made under FakeTensorMode.

    Every method that reads them calls this; it costs nothing unless other code could have written to them since the
    last call.
    """
    self.store.check()
