"""The base class of indexes: faiss's methods, on arrays, over seven operations on tensors.

Q queries, N vectors, d dim, k results, n rows of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..index.base import IndexBase
from ..params import SearchParams
from .arrays import Float32, faiss_errors, lacking, missing, numbers, padded, returned, returned_rows, rows
from .constants import metric_number
from .selectors import IDSelector, selector


class Index:
    """An index with faiss's methods; `module` is the index of this library that does the work, a torch.nn.Module.

    Vectors x are arrays (n, d) of any kind of number, converted to float32, or float tensors; results are arrays or
    tensors accordingly. Errors are RuntimeError, and AssertionError for shapes, as in faiss.
    """

    verbose = False
    metric_arg = 0.0
    own_fields = False
    takes_ids = True  # whether `add_with_ids` works

    def __init__(self, module: Any) -> None:
        self._module = module

    @classmethod
    def of(cls, module: Any) -> Index:
        """The index of this class around a module."""
        made = cls.__new__(cls)
        Index.__init__(made, module)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        # As faiss: a misspelt setting is an error.
        if not name.startswith("_") and not hasattr(type(self), name):
            raise lacking(self, name)
        super().__setattr__(name, value)

    __getattr__ = missing

    def __repr__(self) -> str:
        return f"faiss_compat.{type(self).__name__}({self.d}, ntotal={self.ntotal})"

    @property
    def module(self) -> Any:
        """The index of this library that holds the vectors."""
        return self._module

    @property
    def d(self) -> int:
        """Dimension of the vectors."""
        return self.module.d

    @property
    def ntotal(self) -> int:
        """Vectors in the index."""
        return self.plain.ntotal

    @property
    def is_trained(self) -> bool:
        """Whether vectors can be added. Setting it has no effect."""
        return self.module.is_trained

    @is_trained.setter
    def is_trained(self, value: bool) -> None:
        pass

    @property
    def metric_type(self) -> int:
        """METRIC_L2 or METRIC_INNER_PRODUCT."""
        return metric_number(self.plain.metric)

    @property
    def device(self) -> torch.device:
        """Where the vectors are."""
        return self.plain.device

    @property
    def plain(self) -> IndexBase:
        """The index of this library that holds the vectors, without transforms."""
        return self.module

    # -- operations on tensors; subclasses differ in these --------------------------------------------------

    def fit(self, x: Tensor) -> None:
        """Train on x (n, d)."""
        self.module.fit(x)

    def put(self, x: Tensor, ids: Tensor | None) -> None:
        """Add x (n, d) under ids (n,), or numbered from `ntotal` on."""
        if ids is None:
            ids = torch.arange(self.ntotal, self.ntotal + x.shape[0], device=x.device)
        self.module.add_with_ids(x, ids)

    def take(self, sel: IDSelector) -> int:
        """Remove the selected ids; how many rows that were."""
        return self.module.remove_ids(sel.chosen(self.ids, self.device))

    def nearest(self, x: Tensor, k: int, params: Any) -> tuple[Tensor, Tensor]:
        """D and I (Q, k) for x (Q, d), padded as this library does."""
        return self.module.search(x, k, params=self.settings(params))

    def nearest_vectors(self, x: Tensor, k: int, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`nearest`, and the vectors found (Q, k, d)."""
        return self.module.search_and_reconstruct(x, k, params=self.settings(params))

    def within(self, x: Tensor, radius: float, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """lims (Q + 1,), D and I (n,) for x (Q, d)."""
        return self.module.range_search(x, radius, params=self.settings(params))

    def vectors(self, ids: Tensor) -> Tensor:
        """The vectors (n, d) of ids (n,)."""
        return self.module.reconstruct_batch(ids)

    def ids(self) -> Tensor:
        """All ids (N,), in the order of the rows of `plain`."""
        return self.plain.store.packed_lists()[2]

    def settings(self, params: Any) -> SearchParams | None:
        """faiss's settings of a search as those of this library."""
        if params is None or params.sel is None:
            return None
        return SearchParams(selector=params.sel.chosen(self.ids, self.device))

    # -- faiss's methods -------------------------------------------------------------------------------------

    def train(self, x: Any, *, numeric_type: int = Float32, xq_train: Any = None) -> None:
        """Train on x (n, d); `xq_train` is not used."""
        with faiss_errors():
            self.fit(rows(x, self.d, self.device))

    def add(self, x: Any, numeric_type: int = Float32) -> None:
        """Add x (n, d), numbered from `ntotal` on."""
        with faiss_errors():
            self.put(rows(x, self.d, self.device), None)

    def add_with_ids(self, x: Any, ids: Any, numeric_type: int = Float32) -> None:
        """Add x (n, d) under ids (n,)."""
        if not self.takes_ids:
            raise RuntimeError(f"add_with_ids is not implemented for {type(self).__name__}; use IndexIDMap around it")
        with faiss_errors():
            x = rows(x, self.d, self.device)
            self.put(x, numbers(ids, self.device, x.shape[0]))

    def search(
        self, x: Any, k: int, *, params: Any = None, D: Any = None, I: Any = None, numeric_type: int = Float32
    ) -> tuple[Any, Any]:
        """D and I (Q, k) for x (Q, d), written into `D` and `I` if these are given."""
        queries = _queries(self, x, k)
        with faiss_errors():
            found, ids = self.nearest(queries, int(k), params)
        return returned(padded(found, ids), x, D), returned(ids, x, I)

    def assign(self, x: Any, k: int, labels: Any = None) -> Any:
        """The I (Q, k) of `search`."""
        return self.search(x, k, I=labels)[1]

    def search_and_reconstruct(
        self, x: Any, k: int, *, params: Any = None, D: Any = None, I: Any = None, R: Any = None
    ) -> tuple[Any, Any, Any]:
        """D and I (Q, k), and the vectors found R (Q, k, d), NaN where I is -1."""
        queries = _queries(self, x, k)
        with faiss_errors():
            found, ids, vectors = self.nearest_vectors(queries, int(k), params)
        return returned(padded(found, ids), x, D), returned(ids, x, I), returned(vectors.float(), x, R)

    def range_search(self, x: Any, thresh: float, *, params: Any = None) -> tuple[Any, Any, Any]:
        """lims (Q + 1,) uint64, int64 of tensors, D and I (n,): all strictly inside the radius of x (Q, d)."""
        with faiss_errors():
            lims, found, ids = self.within(rows(x, self.d, self.device), float(thresh), params)
        ends = returned(lims, x)
        return ends if isinstance(x, Tensor) else ends.astype("uint64"), returned(found, x), returned(ids, x)

    def reconstruct(self, key: int, x: Any = None) -> Any:
        """The vector (d,) of an id."""
        with faiss_errors():
            found = self.vectors(torch.tensor([int(key)], device=self.device))[0]
        return returned_rows(found, None, x)

    def reconstruct_batch(self, key: Any, x: Any = None) -> Any:
        """The vectors (n, d) of ids (n,)."""
        with faiss_errors():
            found = self.vectors(numbers(key, self.device))
        return returned_rows(found, key, x)

    def reconstruct_n(self, n0: int = 0, ni: int = -1, x: Any = None) -> Any:
        """The vectors (ni, d) of ids n0 .. n0 + ni - 1, by default of all from n0 on."""
        ni = self.ntotal - n0 if ni == -1 else ni
        with faiss_errors():
            found = self.vectors(torch.arange(int(n0), int(n0) + max(0, int(ni)), device=self.device))
        return returned_rows(found, None, x)

    def remove_ids(self, x: Any) -> int:
        """Remove the ids of an array or a selector; how many rows that were."""
        with faiss_errors():
            return self.take(selector(x))

    def merge_from(self, otherIndex: Index, add_id: int = 0) -> None:
        """Move all vectors of another index of the same kind into this one, `add_id` added to their ids."""
        if type(otherIndex) is not type(self):
            raise RuntimeError(f"cannot merge {type(otherIndex).__name__} into {type(self).__name__}")
        with faiss_errors():
            self.join(otherIndex, int(add_id))

    def join(self, other: Any, add_id: int) -> None:
        """`merge_from` of an index of the same class."""
        self.module.merge_from(other.module, add_id)

    def check_compatible_for_merge(self, otherIndex: Index) -> None:
        """RuntimeError unless the other index has this one's class, dimension and metric."""
        mine, theirs = ((type(index), index.d, index.metric_type) for index in (self, otherIndex))
        if mine != theirs:
            raise RuntimeError(f"an index of {theirs[0].__name__}, d = {theirs[1]} does not fit {self!r}")

    def reset(self) -> None:
        """Remove all vectors; what was trained stays."""
        with faiss_errors():
            self.plain.reset()

    def sa_code_size(self) -> int:
        """Bytes of a stored vector."""
        rows = self.plain.store.packed_lists()[0]
        return rows.shape[1] * rows.element_size()

    @property
    def getDevice(self) -> Callable[[], int]:
        """``getDevice()`` is the number of the GPU that holds the vectors; an index on the CPU has no such method."""
        number = self.device.index
        if number is None:
            raise AttributeError(f"{type(self).__name__} is on the CPU, so it has no getDevice")
        return lambda: number


def _queries(index: Index, x: Any, k: int) -> Tensor:
    if not k > 0:
        raise AssertionError(f"k must be > 0, got {k}")
    return rows(x, index.d, index.device)
