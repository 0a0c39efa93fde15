"""What flat and inverted-file indexes share: building, reading, searching.

Q queries, N vectors, d dim, k results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import lists as ragged
from ..functional import metric as metrics
from ..functional.budget import Budget
from ..functional.probe import Coarse
from ..functional.range_scan import range_search
from ..functional.search import MODES, lookup, search
from ..params import SearchParams, positive
from . import check, state
from .fits import Fits
from .module import IndexModule, Self
from .saves import Saves
from .staging import Staging

if TYPE_CHECKING:
    from ..graph import SearchGraph


class IndexBase(Fits, Saves, IndexModule):
    """A vector index whose state is buffers of a torch.nn.Module. Use one of its subclasses."""

    def __init__(
        self,
        d: int,
        *,
        metric: str,
        k: int = 10,
        search_mode: str = "auto",
        max_bytes: int = 256 << 20,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(d, metric=metric, device=device, dtype=dtype)
        self.k = k
        self.search_mode = search_mode
        self.max_bytes = max_bytes
        self.last_search_stats: dict[str, Any] | None = None  # of the last search that was told to keep them

    @property
    def search_mode(self) -> str:
        """ "auto", "csr" (list-major) or "matrix" (query-major). It changes the time, not the answer."""
        return self._search_mode

    @search_mode.setter
    def search_mode(self, value: str) -> None:
        if value not in MODES:
            raise ValueError(f"search_mode must be one of {', '.join(map(repr, MODES))}, got {value!r}")
        self._search_mode = value

    @property
    def k(self) -> int:
        """Results that `forward` returns."""
        return self._k

    @k.setter
    def k(self, value: int) -> None:
        self._k = positive(value, "k")
        self._own_graph = None

    @property
    def max_bytes(self) -> int:
        """Scratch memory that a search may use, in bytes."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self._max_bytes = positive(value, "max_bytes")

    # -- building ------------------------------------------------------------------------------------------

    def fit(
        self: Self,
        x: Tensor,
        *,
        niter: int = 10,
        max_points_per_centroid: int = 256,
        seed: int = 1234,
        generator: torch.Generator | None = None,
        verbose: bool = False,
    ) -> Self:
        """Nothing to fit in a flat index: it is always trained, and takes the settings of `IndexIVFFlat.fit`."""
        check.vectors(x, "x", self.d, self.device)
        return self

    def add(self, x: Tensor) -> None:
        """Add vectors x (n, d), numbered on from ``next_id``.

        They are converted to the storage dtype and detached; for cosine they are stored at unit length. Raises
        ValueError for a wrong shape or device or a row that is not finite, TypeError for a wrong dtype, and
        RuntimeError before training or when the ids would pass 2^63 - 2; the index is then as it was.
        """
        x = check.vectors(x, "x", self.d, self.device)
        first = int(self.next_id)
        if first + x.shape[0] > state.LAST_ID:
            raise RuntimeError(f"x has {x.shape[0]} rows, but ids would pass 2^63 - 2 from next_id = {first}")
        end = first + x.shape[0]
        self._add(x, torch.arange(first, end, device=self.device), end, custom_ids=False)

    def add_with_ids(self, x: Tensor, ids: Tensor) -> None:
        """Add vectors x (n, d) under ids (n,) int64: any value but -1, duplicates allowed. Raises as `add`."""
        x = check.vectors(x, "x", self.d, self.device)
        ids = check.ids(ids, "ids", x.shape[0], self.device).clone()
        self._add(x, ids, max(int(self.next_id), state.next_id_after(ids)), custom_ids=True)

    def _add(self, x: Tensor, ids: Tensor, next_id: int, *, custom_ids: bool) -> None:
        self._require_trained("add")
        rows, assigned = self._place(x)
        with self._lock:
            self._staging.push(rows, ids, assigned, custom_ids=custom_ids)
            self._put(next_id=torch.full_like(self._raw("next_id"), next_id))
            # Packing whenever the index has doubled keeps bulk loading linear without holding rows twice.
            if self._staging.rows >= max(self._raw("packed_embeddings").shape[0], 1):
                self._pack()

    def _place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as they are stored, prepared and no longer the caller's, and the list of each."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            rows = check.stored(metrics.prepare(x, self.metric), "x", self.dtype)
            return rows, self._assign(rows)

    def _assign(self, rows: Tensor) -> Tensor:
        """The list of each row (n,)."""
        return torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)

    def remove_ids(self, ids: Tensor) -> int:
        """Remove vectors by id and return how many rows went.

        `ids` is int64 (n,), unknown ones being ignored, or a bool mask whose entry i says whether id i goes. Every
        row of a duplicate id goes; the others keep their ids.
        """
        gone = self._with_ids(ids)
        count = int(gone.sum())
        if count:
            self._replace(*ragged.keep_rows(*self._packed(), ~gone))
        return count

    def _with_ids(self, ids: Tensor) -> Tensor:
        """Which packed rows (N,) carry one of the ids, given as numbers or as a bool mask over ids."""
        held = self.list_ids
        if isinstance(ids, Tensor) and ids.dtype == torch.bool:
            return ragged.marked(held, check.mask(ids, "ids", self.device))
        return torch.isin(held, check.id_list(ids, "ids", self.device))

    def update(self, ids: Tensor, x: Tensor) -> None:
        """Replace the vectors of ids (n,) by x (n, d). Raises KeyError for an unknown id, ValueError for one given
        twice; the index is then as it was."""
        x = check.vectors(x, "x", self.d, self.device)
        ids = check.ids(ids, "ids", x.shape[0], self.device).clone()
        if ids.unique().shape[0] != ids.shape[0]:
            raise ValueError("ids must be distinct in update, got one twice")
        unknown = ids[~torch.isin(ids, self.list_ids)]
        if unknown.shape[0]:
            raise KeyError(f"ids holds {int(unknown[0])}, which is not in the index")
        rows, assigned = self._place(x)
        with self._lock:
            self.remove_ids(ids)
            self._staging.push(rows, ids, assigned, custom_ids=False)

    def reset(self) -> None:
        """Forget the vectors; centroids and the count of ids stay."""
        with self._lock:
            self._staging = Staging()
            self._latest = {}
            packed, offsets, ids = self._packed()
            self._replace(packed[:0].clone(), torch.zeros_like(offsets), ids[:0].clone())

    # -- reading -------------------------------------------------------------------------------------------

    def reconstruct(self, id: int) -> Tensor:
        """The stored vector (d,) of an id, in the storage dtype; of a duplicate id the last. KeyError if unknown."""
        rows = torch.nonzero(self.list_ids == id)
        if rows.shape[0] == 0:
            raise KeyError(f"id {id} is not in the index")
        return self.packed_embeddings[self._latest_rows().get(int(id), int(rows[-1]))].clone()

    def reconstruct_n(self, start: int, n: int) -> Tensor:
        """The stored vectors (n, d) of ids ``start : start + n``, each as `reconstruct`. KeyError if one is unknown."""
        if n < 0:
            raise ValueError(f"n must be >= 0, got {n}")
        held, order = torch.sort(self.list_ids, stable=True)
        wanted = torch.arange(start, start + n, device=self.device)
        at = torch.searchsorted(held, wanted, right=True) - 1  # the last row of each id
        known = (at >= 0) & (held[at.clamp(min=0)] == wanted) if held.shape[0] else torch.zeros_like(wanted).bool()
        if not bool(known.all()):
            raise KeyError(f"id {int(wanted[~known][0])} is not in the index")
        rows = order[at]
        for id, row in self._latest_rows().items():
            if start <= id < start + n:
                rows[id - start] = row
        return self.packed_embeddings[rows]

    def search(self, x: Tensor, k: int, *, params: SearchParams | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest stored vectors of each query.

        Parameters
        ----------
        x : (nq, d) queries: float16, bfloat16, float32 or float64, any strides.
        k : results a query, >= 1.
        params : settings of this call.

        Returns
        -------
        D : (nq, k) float32: squared L2 ascending, or inner product / cosine descending; differentiable in `x`.
        I : (nq, k) int64 ids.

        Where fewer than k vectors are found, I is -1 and D is +inf (l2) or -inf (ip, cosine); so it is in every
        place for a query that is not finite. Raises ValueError, TypeError or RuntimeError (untrained index), each
        naming the argument.
        """
        x = check.vectors(x, "x", self.d, self.device)
        k = positive(k, "k")
        params = self._params(params)
        self._require_trained("search")
        with torch.autocast(self.device.type, enabled=False):
            queries = metrics.prepare(x.float(), self.metric)
            coarse, segments = self._chosen(params, x.shape[0], counted=True)
            stats: dict[str, Any] | None = {} if params.debug_stats else None
            scores, rows = search(
                queries,
                coarse,
                segments,
                k=k,
                metric=self.metric,
                mode=self.search_mode,
                max_bytes=self.max_bytes,
                nprobe=self._nprobe(params),
                max_codes=self._max_codes(params),
                budget=self._budget(params),
                exact=params.profile == "exact",
                stats=stats,
            )
            if stats is not None:
                self.last_search_stats = stats
            return metrics.to_distance(scores, self.metric), lookup([part.ids for part in segments], rows)

    def range_search(
        self, x: Tensor, radius: float | Tensor, *, params: SearchParams | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All vectors of the probed lists strictly inside the radius: D < radius (l2), D > radius (ip, cosine).

        `radius` is a number, or a tensor (nq,) of one for each query. Returns lims (nq + 1,) int64, D (n,) float32 and
        I (n,) int64; the results of query i are ``lims[i]:lims[i + 1]``, in any order. Of `params` it takes `nprobe`
        and `selector`: lists are read whole, `max_codes` and budgets are ignored, as in faiss. Raises as `search`.
        """
        x = check.vectors(x, "x", self.d, self.device)
        radius = check.radii(radius, "radius", x.shape[0], self.device)
        params = self._params(params)
        self._require_trained("range_search")
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            queries = metrics.prepare(x.float(), self.metric)
            coarse, segments = self._chosen(params, x.shape[0], counted=False)
            lims, scores, rows = range_search(
                queries,
                coarse,
                segments,
                score=metrics.radius_to_score(radius, self.metric),
                nprobe=self._nprobe(params),
                metric=self.metric,
                max_bytes=self.max_bytes,
            )
            return lims, metrics.to_distance(scores, self.metric), lookup([part.ids for part in segments], rows)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``search(x, self.k)`` for x (..., d): D and I of shape (..., k).

        Under torch.compile it is the graph made by ``graph()``, if neither index nor settings have changed since.
        """
        if torch.compiler.is_compiling():
            if self._own_graph is not None:
                own: tuple[Tensor, Tensor] = self._own_graph(x)
                return own
            torch._dynamo.graph_break("an index compiles once index.graph() has been called, and again after a change")
        x = check.layer_input(x, "x", self.d, self.device)
        found, ids = self.search(x.reshape(-1, self.d), self.k)
        return found.view(*x.shape[:-1], self.k), ids.view(*x.shape[:-1], self.k)

    def graph(
        self,
        k: int | None = None,
        nprobe: int | None = None,
        *,
        max_codes: int | None = None,
        storage: torch.dtype | None = None,
        layout: str = "rows",
    ) -> SearchGraph:
        """The search as a module of static shapes, for torch.compile and the formats of `torch_ivf_module.export`.

        Parameters
        ----------
        k, nprobe, max_codes : as the index has them, by default.
        storage : dtype of the vectors that are scanned (float32, float16, bfloat16), by default the index's own.
        layout : "rows" scans the index's own buffers, or one copy if `storage` differs from their dtype, and distances
            are then those to the copy. "tiles" scans a copy that a compiler makes faster code of, N * d *
            itemsize bytes beside the buffers; what is returned is scored with the index's own vectors.

        The graph has to be made again after every change of the index. One made without `k`, `nprobe`, `max_codes` and
        `storage` is what `forward` takes under torch.compile, until a setting of the index changes. Raises
        RuntimeError for an untrained index, ValueError for a wrong setting.
        """
        from ..graph import SearchGraph

        graph = SearchGraph(self, k=k, nprobe=nprobe, max_codes=max_codes, storage=storage, layout=layout)
        if k is None and nprobe is None and max_codes is None and storage is None:
            self.__dict__["_own_graph"] = graph  # not a submodule: its buffers are this module's
        return graph

    def _chosen(
        self, params: SearchParams, queries: int, *, counted: bool
    ) -> tuple[Coarse, list[ragged.InvertedLists]]:
        """What a search of so many queries reads: `_segments`, with only the rows that the selector lets it find.

        `counted` says that rows are counted on the way, those that are not let through among them.
        """
        coarse, segments = self._segments()
        if params.selector is None:
            return coarse, segments
        chosen = check.selector(params.selector, "selector", self.device)
        counted = counted and (self._max_codes(params) is not None or self._budget(params) is not None)
        visits = None if counted else queries * self._nprobe(params) / max(1, self._nlist)
        return coarse, [ragged.restricted(lists, chosen, visits) for lists in segments]

    def _nprobe(self, params: SearchParams) -> int:
        return 1

    def _max_codes(self, params: SearchParams) -> int | None:
        return None

    def _budget(self, params: SearchParams) -> Budget | None:
        return None

    def _params(self, params: SearchParams | None) -> SearchParams:
        if params is not None and not isinstance(params, SearchParams):
            raise TypeError(f"params must be SearchParams or None, got {type(params).__name__}")
        return params or SearchParams()

    def _require_trained(self, action: str) -> None:
        if not self.is_trained:
            raise RuntimeError(f"{action} needs a trained index: call train(x) first")

    # -- files ---------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """The constructor arguments that rebuild this index, its buffers left out."""
        return {
            "d": self.d,
            "metric": self.metric,
            "k": self.k,
            "search_mode": self.search_mode,
            "max_bytes": self.max_bytes,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        """The settings, as the module shows them."""
        shown = {key: value for key, value in self.config().items() if key not in ("max_bytes", "dtype")}
        words = [f"{key}={value!r}" if key != "d" else str(value) for key, value in shown.items()]
        return ", ".join([*words, f"ntotal={self.ntotal}", f"dtype={self.dtype}", f"device={self.device}"])
