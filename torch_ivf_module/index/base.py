"""What flat and inverted-file indexes share: building, reading, searching.

Q queries, N vectors, d dim, k results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import native  # noqa: F401  registers the kernel
from ..functional import metric as metrics
from ..functional.kernels import kernel_for
from ..functional.lists import InvertedLists, restricted, vectors_at
from ..functional.probe import Coarse, probe
from ..functional.range_scan import range_search
from ..functional.search import MODES, SearchOptions, capped_lists, finite_queries, lookup, search
from ..functional.transforms import differentiable, is_dual, outside, scored
from ..params import DEFAULTS, SearchParams, positive
from . import validation
from .building import Builds
from .eager import eager, opaque, recorded_by_fx, refuse_recording, refuse_scripting, without_autocast
from .module import Self
from .saves import Saves
from .torch_ivf_compat import TorchIvfNames

if TYPE_CHECKING:
    from ..graph import SearchGraph


class IndexBase(TorchIvfNames, Saves, Builds):
    """A vector index whose state is buffers of a torch.nn.Module. Use one of its subclasses."""

    __prepare_scriptable__ = refuse_scripting

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
        """ "auto", "csr" (list-major) or "matrix" (query-major). It changes the time, not the answer.

        "auto" takes the device's kernel where there is one, else the mode with the lower predicted time.
        """
        return self._search_mode

    @search_mode.setter
    def search_mode(self, value: str) -> None:
        value = "csr" if value == "chunked" else value  # as torch-ivf calls it on flat indexes
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
        """Workspace memory that a search may use, in bytes."""
        return self._max_bytes

    @max_bytes.setter
    def max_bytes(self, value: int) -> None:
        self._max_bytes = positive(value, "max_bytes")

    # -- building ------------------------------------------------------------------------------------------

    @eager
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
        validation.vectors(x, "x", self.d, self.device)
        return self

    # -- searching -----------------------------------------------------------------------------------------

    @opaque
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
        scores, ids, _ = self._answer(x, k, params, "search")
        return metrics.to_distance(scores, self.metric), ids

    @opaque
    def search_and_reconstruct(
        self, x: Tensor, k: int, *, params: SearchParams | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`search`, and beside D and I the vectors found, R (nq, k, d) in the storage dtype; NaN where I is -1.

        >>> from torch_ivf_module import IndexFlatL2
        >>> index = IndexFlatL2(2)
        >>> index.add(torch.eye(2))
        >>> index.search_and_reconstruct(torch.tensor([[0.0, 0.9]]), 1)[2]
        tensor([[[0., 1.]]])
        """
        scores, ids, vectors = self._answer(x, k, params, "search_and_reconstruct", with_vectors=True)
        return metrics.to_distance(scores, self.metric), ids, vectors

    def _answer(
        self, x: Tensor, k: int, params: SearchParams | None, action: str, *, with_vectors: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (nq, k), differentiable in x, best first, ids (nq, k), and vectors (nq, k, d) if asked for."""
        refuse_recording(action)
        x = validation.vectors(x, "x", self.d, self.device)
        k = positive(k, "k")
        self._require_trained(action)
        self._check_plain()
        with without_autocast(x.device):
            queries = metrics.prepare(x.float(), self.metric)
            differentiate = differentiable(queries)

            def find(plain: Tensor) -> tuple[Tensor, ...]:
                scores, rows, segments = self._search(plain, k, self._params(params))
                ids = lookup([part.ids for part in segments], rows)
                if not (with_vectors or differentiate):
                    return scores, ids, scores.new_empty(scores.shape[0], 0)
                return scores, ids, vectors_at([part.packed for part in segments], rows)

            scores, ids, vectors = outside(find, queries)
            return scored(queries, ids, vectors, self.metric) if differentiate else (scores, ids, vectors)

    def _prepared(self, x: Tensor) -> Tensor:
        """Queries as they are compared."""
        with without_autocast(x.device):
            return metrics.prepare(x.float(), self.metric)

    def _probed(self, queries: Tensor, params: SearchParams, sizes: Tensor | None = None) -> Tensor:
        """The lists (nq, P) that prepared queries read; `sizes` (L + 1,), where given, are what `max_codes` counts."""
        with without_autocast(queries.device), torch.no_grad():
            coarse, segments = self._segments()
            options = self.search_options(1, params)
            if sizes is not None:
                segments = [segments[0]._replace(sizes=sizes)]
            x, finite = finite_queries(queries)
            nearest = probe(x, coarse, options.nprobe, self.metric, kernel_for(x))
            cap = None if sizes is None else options.max_codes
            return capped_lists(nearest, finite, coarse, segments, cap)[0]

    def _search(
        self, queries: Tensor, k: int, params: SearchParams, probed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[InvertedLists]]:
        """Scores and rows (nq, k) of prepared queries, and the lists that the rows are counted in.

        Of the lists `probed` (nq, P) where they are given. To be called without autocast and under `torch.no_grad`.
        """
        options = self.search_options(k, params)
        counted = options.max_codes is not None or options.budget is not None
        coarse, segments = self._chosen(params, queries.shape[0] * options.nprobe, counted=counted)
        stats: dict[str, Any] | None = {} if params.debug_stats else None
        scores, found = search(queries, coarse, segments, options, probed=probed, stats=stats)
        if stats is not None:
            self.last_search_stats = stats
        return scores, found, segments

    def search_options(self, k: int, params: SearchParams | None = None) -> SearchOptions:
        """What `params`, or the index's own settings where they are None, mean for a search of k results."""
        params = params or DEFAULTS
        return SearchOptions(
            k, 1, self.metric, self._search_mode, max_bytes=self._max_bytes, exact=params.profile == "exact"
        )

    @eager
    def range_search(
        self, x: Tensor, radius: float | Tensor, *, params: SearchParams | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All vectors of the probed lists strictly inside the radius: D < radius (l2), D > radius (ip, cosine).

        `radius` is a number, or a tensor (nq,) of one for each query. Returns lims (nq + 1,) int64, D (n,) float32 and
        I (n,) int64; the results of query i are ``lims[i]:lims[i + 1]``, in any order. Of `params` it takes `nprobe`
        and `selector`: lists are read whole, `max_codes` and budgets are ignored, as in faiss. D has no derivative:
        it does not require grad, whether x does or not. Raises as `search`, and RuntimeError for a dual tensor x.
        """
        x = validation.vectors(x, "x", self.d, self.device)
        if is_dual(x):
            raise RuntimeError("range_search has no derivative, but x is a dual tensor of forward mode: detach it")
        radii = validation.radii(radius, "radius", x.shape[0], self.device)
        params = self._params(params)
        self._require_trained("range_search")
        return self._range_search(self._prepared(x), radii, params)

    def _range_search(
        self, queries: Tensor, radii: Tensor, params: SearchParams, probed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`range_search` of prepared queries and radii (nq,), of the lists `probed` where they are given."""
        with without_autocast(queries.device), torch.no_grad():
            nprobe = self.search_options(1, params).nprobe
            coarse, segments = self._chosen(params, queries.shape[0] * nprobe, counted=False)
            lims, scores, rows = range_search(
                queries,
                coarse,
                segments,
                score=metrics.to_score(radii, self.metric),
                nprobe=nprobe,
                metric=self.metric,
                max_bytes=self.max_bytes,
                probed=probed,
            )
            return lims, metrics.to_distance(scores, self.metric), lookup([part.ids for part in segments], rows)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``search(x, self.k)`` for x (..., d): D and I of shape (..., k).

        Under torch.compile it is the graph made by ``graph()``, if neither index nor settings have changed since.
        """
        if torch.compiler.is_compiling() and self._own_graph is not None:
            own: tuple[Tensor, Tensor] = self._own_graph(x)
            return own
        if (node := recorded_by_fx(self, x)) is not None:
            return node
        return self._layer(x)

    @opaque
    def _layer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        refuse_recording("forward")
        x = validation.layer_input(x, "x", self.d, self.device)
        found, ids = self.search(x.reshape(-1, self.d), self.k)
        return found.view(*x.shape[:-1], self.k), ids.view(*x.shape[:-1], self.k)

    @eager
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

    def _chosen(self, params: SearchParams, visits: int, *, counted: bool) -> tuple[Coarse, list[InvertedLists]]:
        """What a search reads: `_segments`, with only the rows that the selector allows.

        `visits` is how many lists the queries read together; `counted` says that a cap on rows counts them, also those
        that the selector excludes.
        """
        coarse, segments = self._segments(counted=counted)
        if params.selector is None:
            return coarse, segments
        chosen = validation.selector(params.selector, "selector", self.device)
        each = None if counted else visits / max(1, coarse.centroids.shape[0])
        return coarse, [restricted(lists, chosen, each) for lists in segments]

    def _params(self, params: SearchParams | None) -> SearchParams:
        if params is not None and not isinstance(params, SearchParams):
            raise TypeError(f"params must be SearchParams or None, got {type(params).__name__}")
        return params or DEFAULTS

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
