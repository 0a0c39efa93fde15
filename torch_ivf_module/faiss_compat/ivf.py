"""Inverted files, with their quantizer as an index of its own.

Q queries, N vectors, L lists, P probes, d dim, k results, n rows of a call.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .._arrays import as_tensor
from ..functional.row_codes import as_float
from ..index import IndexIVFFlat as IVFFlatModule
from ..index.building import assign
from ..index.schema import next_id_after
from ..params import DEFAULTS, SearchParams
from .arrays import Unsupported, faiss_errors, numbers, padded, returned, rows
from .base import Index
from .clustering import ClusteringParameters
from .constants import METRIC_L2, DirectMap, metric_name, metric_number
from .flat import IndexFlat
from .invlists import InvertedLists, nearest_in, within_in
from .parameters import SearchParametersIVF


class IndexIVF(Index):
    """The base class of inverted files. The centroids are the vectors of `quantizer`, a flat index.

    If the quantizer has another metric than the index, as in faiss it chooses the lists by its own.
    """

    parallel_mode = 0  # has no effect

    def __init__(self, quantizer: Index, module: Any) -> None:
        if not isinstance(quantizer, IndexFlat) or quantizer.d != module.d:
            raise Unsupported(f"the quantizer must be an IndexFlat of dimension {module.d}, got {quantizer!r}")
        super().__init__(module)
        self._quantizer = quantizer
        self._seen: object = None  # the version of the quantizer whose vectors the module has as centroids
        self._cp = ClusteringParameters()
        self._cp.niter = 10
        self._direct_map = DirectMap()

    @classmethod
    def around(cls, quantizer: Index, module: Any) -> IndexIVF:
        """The index of this class around a module that may be filled, whose centroids are in `quantizer`."""
        made = cls.__new__(cls)
        IndexIVF.__init__(made, quantizer, module)
        return made

    @property
    def module(self) -> Any:
        """The index of this library that holds the vectors; its centroids are those of the quantizer."""
        if self.quantizer.module.store.version is not self._seen:
            self._take_centroids()
        return self._module

    @property
    def quantizer(self) -> IndexFlat:
        """The flat index of the centroids."""
        return self._quantizer

    @property
    def cp(self) -> ClusteringParameters:
        """Settings of training."""
        return self._cp

    @property
    def direct_map(self) -> DirectMap:
        """The kind of direct map that was asked for."""
        return self._direct_map

    def make_direct_map(self, new_maintain_direct_map: bool = True) -> None:
        """Set the kind of `direct_map`."""
        self.set_direct_map_type(DirectMap.Array if new_maintain_direct_map else DirectMap.NoMap)

    def set_direct_map_type(self, type: int) -> None:
        """Set the kind of `direct_map`."""
        self._direct_map.type = type

    @property
    def nlist(self) -> int:
        """Number of lists."""
        return self._module.nlist

    @property
    def nprobe(self) -> int:
        """Lists that a query reads."""
        return self._module.nprobe

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        with faiss_errors():
            self._module.nprobe = int(value)

    @property
    def max_codes(self) -> int:
        """The maximum of vectors that a query reads, 0 for no limit."""
        return self._module.max_codes or 0

    @max_codes.setter
    def max_codes(self, value: int) -> None:
        with faiss_errors():
            self._module.max_codes = int(value)

    @property
    def code_size(self) -> int:
        """Bytes of a stored vector."""
        return self.sa_code_size()

    @property
    def invlists(self) -> InvertedLists:
        """The inverted lists."""
        return InvertedLists(self)

    def get_list_size(self, list_no: int) -> int:
        """Vectors in a list."""
        return self.invlists.list_size(list_no)

    # -- operations on tensors -------------------------------------------------------------------------------

    def fit(self, x: Tensor) -> None:
        """Fit the quantizer to x (n, d), unless it has its centroids already."""
        if self.module.is_trained:
            return
        cp = self.cp
        with warnings.catch_warnings():
            if x.shape[0] >= cp.min_points_per_centroid * self.nlist:
                warnings.filterwarnings("ignore", message=".*training rows for", category=UserWarning)
            self._module.fit(
                x, niter=cp.niter, seed=cp.seed, max_points_per_centroid=cp.max_points_per_centroid
            )
        self.quantizer.reset()
        self.quantizer.put(self._module.centroids, None)  # the next access takes them as it stores them

    def put(self, x: Tensor, ids: Tensor | None) -> None:
        """Add x (n, d) under ids (n,), or numbered from `ntotal` on."""
        if self._chooses_by_metric():
            return super().put(x, ids)
        self.module.store.require_trained("add")
        if ids is None:
            ids = torch.arange(self.ntotal, self.ntotal + x.shape[0], device=x.device)
        return self._put_in(*self._placed(x), ids)

    def nearest(self, x: Tensor, k: int, params: Any) -> tuple[Tensor, Tensor]:
        """D and I (Q, k) for x (Q, d)."""
        if self._chooses_by_metric():
            return super().nearest(x, k, params)
        settings = self.settings(params) or DEFAULTS
        return nearest_in(self.module, x, k, self._probes(x, settings), settings)

    def nearest_vectors(self, x: Tensor, k: int, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """`nearest`, and the vectors found (Q, k, d)."""
        if self._chooses_by_metric():
            return super().nearest_vectors(x, k, params)
        found, ids = self.nearest(x, k, params)
        vectors = torch.full((*ids.shape, self.d), torch.nan, dtype=torch.float32, device=x.device)
        vectors[ids >= 0] = self.vectors(ids[ids >= 0]).float()
        return found, ids, vectors

    def within(self, x: Tensor, radius: float, params: Any) -> tuple[Tensor, Tensor, Tensor]:
        """lims (Q + 1,), D and I (n,) for x (Q, d)."""
        if self._chooses_by_metric():
            return super().within(x, radius, params)
        settings = self.settings(params) or DEFAULTS
        return within_in(self.module, x, radius, self._probes(x, settings), settings)

    def settings(self, params: Any) -> SearchParams | None:
        """faiss's settings of a search as those of this library."""
        if params is None:
            return None
        if not isinstance(params, SearchParametersIVF):
            raise RuntimeError(f"params must be SearchParametersIVF for an inverted file, got {type(params).__name__}")
        chosen = None if params.sel is None else params.sel.chosen(self.ids, self.device)
        return SearchParams(nprobe=int(params.nprobe), max_codes=int(params.max_codes), selector=chosen)

    # -- changing --------------------------------------------------------------------------------------------

    def update_vectors(self, keys: Any, x: Any) -> None:
        """Replace the vectors of ids (n,) by x (n, d)."""
        with faiss_errors():
            x = rows(x, self.d, self.device)
            keys = numbers(keys, self.device, x.shape[0])
            if self._chooses_by_metric():
                self.module.update(keys, x)
            else:
                self.vectors(keys)  # RuntimeError if one is unknown
                placed = self._placed(x)  # or if x cannot be stored, before anything is removed
                self.module.remove_ids(keys)
                self._put_in(*placed, keys)

    def copy_subset_to(self, other: IndexIVF, subset_type: int, a1: int, a2: int) -> None:
        """Add copies of some vectors to an index with the same centroids: ids in a1 .. a2 - 1 if `subset_type` is 0,
        ids with ``id % a1 == a2`` if it is 1."""
        if subset_type not in (0, 1):
            raise Unsupported(f"faiss_compat copies subsets of type 0 and 1, got {subset_type}")
        ids = self.ids()
        chosen = ids[(ids >= a1) & (ids < a2)] if subset_type == 0 else ids[ids % a1 == a2]
        with faiss_errors():
            other.module.merge_from(self.module.copy_subset(chosen))

    # -- lists given by the caller ----------------------------------------------------------------------------

    def search_preassigned(
        self, x: Any, k: int, Iq: Any, Dq: Any = None, *, params: Any = None, D: Any = None, I: Any = None
    ) -> tuple[Any, Any]:
        """`search` in the lists Iq (Q, P), -1 for none; the distances Dq to their centroids are not used."""
        queries = rows(x, self.d, self.device)
        with faiss_errors():
            settings = self.settings(params) or DEFAULTS
            found, ids = nearest_in(self.module, queries, int(k), self._given(Iq, queries), settings)
        return returned(padded(found, ids), x, D), returned(ids, x, I)

    def range_search_preassigned(
        self, x: Any, thresh: float, Iq: Any, Dq: Any = None, *, params: Any = None
    ) -> tuple[Any, Any, Any]:
        """`range_search` in the lists Iq (Q, P), -1 for none; the distances Dq to their centroids are not used."""
        queries = rows(x, self.d, self.device)
        with faiss_errors():
            settings = self.settings(params) or DEFAULTS
            lims, found, ids = within_in(self.module, queries, float(thresh), self._given(Iq, queries), settings)
        ends = returned(lims, x)
        return ends if isinstance(x, Tensor) else ends.astype("uint64"), returned(found, x), returned(ids, x)

    # -- details ---------------------------------------------------------------------------------------------

    def _chooses_by_metric(self) -> bool:
        """Whether lists are chosen by the metric of the index, as this library does it."""
        return self.quantizer.metric_type == metric_number(self._module.metric)

    def _probes(self, x: Tensor, settings: SearchParams) -> Tensor:
        """The lists (Q, P) that the quantizer chooses for x (Q, d)."""
        self.module.store.require_trained("search")
        return self.quantizer.nearest(x, min(self.nlist, settings.nprobe or self.nprobe), None)[1]

    def _placed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, d) as stored rows, and the list (n,) that the quantizer chooses for each."""
        stored, own = assign(self.module.store, x)
        lists = self.quantizer.nearest(x, 1, None)[1][:, 0]
        return stored, torch.where(lists < 0, own, lists)  # the quantizer finds none where distances overflow

    def _put_in(self, stored: Tensor, lists: Tensor, ids: Tensor) -> None:
        store = self.module.store
        with store.lock:
            store.add(stored, ids, lists, max(store.next_id, next_id_after(ids)), custom_ids=True)

    def _given(self, lists: Any, x: Tensor) -> Tensor:
        """Lists (Q, P) that a caller gives for x (Q, d)."""
        found = as_tensor(lists, "Iq").long().to(x.device)
        if found.dim() != 2 or found.shape[0] != x.shape[0]:
            raise AssertionError(f"Iq must have shape ({x.shape[0]}, nprobe), got {tuple(found.shape)}")
        return found

    def _take_centroids(self) -> None:
        """Make the vectors of the quantizer the centroids of the module, if they are as many as there are lists."""
        self._seen = self.quantizer.module.store.version
        module = self._module
        centroids = as_float(self.quantizer.module.store.packed_lists()[0], module.d)
        if centroids.shape[0] == module.nlist:
            state = module.state_dict()
            if not module.is_trained:
                state["list_offsets"] = torch.zeros(module.nlist + 1, dtype=torch.int64, device=module.device)
            module.load_state_dict({**state, "centroids": centroids.to(module.device)}, assign=True)
        elif not module.ntotal:
            module.reset_parameters()


class IndexIVFFlat(IndexIVF):
    """Inverted file of uncompressed vectors.

    >>> import numpy
    >>> x = numpy.random.RandomState(0).rand(1000, 16)
    >>> index = IndexIVFFlat(IndexFlat(16), 16, 8)
    >>> index.train(x)
    >>> index.add(x)
    >>> index.search(x[:2], 1)[1].tolist()
    [[0], [1]]
    """

    def __init__(
        self, quantizer: Index, d: int, nlist: int, metric: int = METRIC_L2, own_invlists: bool = True
    ) -> None:
        super().__init__(quantizer, IVFFlatModule(d, nlist, nprobe=1, metric=metric_name(metric), device="cpu"))
