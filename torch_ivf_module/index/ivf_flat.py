"""The inverted-file index with uncompressed vectors."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arrays import finite
from .._optional import require
from ..functional import lists as ragged
from ..functional import metric as metrics
from ..functional.budget import Budget
from ..functional.chunking import in_chunks
from ..functional.kernels import kernel_for
from ..functional.kmeans import RowShard, kmeans
from ..functional.lists import sampled_lists
from ..functional.ordering import order_within_lists
from ..functional.probe import Coarse, coarse_of, probe
from ..functional.search import SearchOptions
from ..params import DEFAULTS, SearchParams, positive
from . import validation
from .base import IndexBase
from .eager import eager
from .module import Self
from .torch_ivf_compat import TorchIvfSettings


class Retrained(NamedTuple):
    """What `IndexIVFFlat.retrain` did."""

    moved: int  # vectors that are in another list than before
    total: int  # vectors in the index
    imbalance_before: float  # see IndexIVFFlat.imbalance_factor
    imbalance: float


class IndexIVFFlat(TorchIvfSettings, IndexBase):
    """Inverted file: vectors are kept in `nlist` lists around centroids, and a query reads the `nprobe` nearest.

    Parameters
    ----------
    d : dimension of the vectors.
    nlist : number of lists; about 4 * sqrt(N) is usual.
    nprobe : lists that a query visits, min(8, nlist) by default; more of them find more of the true neighbours.
    metric : "l2" (squared), "ip" or "cosine".
    max_codes : the most rows a query reads, None for no limit; see `SearchParams`.
    list_ordering : the order that the rows of a list are said to be in; see `rebuild_lists`.
    k : results that `forward` returns.
    search_mode, max_bytes : see the properties.
    device, dtype : where and in which dtype (float32, float16, bfloat16) vectors are stored.

    >>> x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    >>> index = IndexIVFFlat(16, nlist=8, nprobe=2)
    >>> index.train(x).add(x)
    >>> index.search(x[:2], 1)[1].flatten()
    tensor([0, 1])
    """

    def __init__(
        self,
        d: int,
        nlist: int = 512,
        nprobe: int | None = None,
        metric: str = "l2",
        *,
        max_codes: int | None = None,
        list_ordering: str = "none",
        **settings: Any,
    ) -> None:
        super().__init__(d, metric=metric, **settings)
        self._wanted_nlist = positive(nlist, "nlist")
        self.nprobe = min(8, nlist) if nprobe is None else nprobe
        self.max_codes = max_codes
        self._list_ordering = self._checked_ordering(list_ordering) or "none"
        self._unordered = 0

    @property
    def nlist(self) -> int:
        """Number of lists: of the buffers once trained, as asked for before."""
        return self._nlist or self._wanted_nlist

    @property
    def nprobe(self) -> int:
        """Lists that a query visits; more than `nlist` means all."""
        return self._own_nprobe

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        self._own_nprobe = positive(value, "nprobe")
        self._own_graph = None

    @property
    def max_codes(self) -> int | None:
        """The most rows that a query reads, None for no limit."""
        return self._own_max_codes

    @max_codes.setter
    def max_codes(self, value: int | None) -> None:
        # 0 is how faiss spells "no limit".
        self._own_max_codes = None if value is None or value == 0 else positive(value, "max_codes")
        self._own_graph = None

    @property
    def list_ordering(self) -> str:
        """The order that the rows of each list are in, those aside that have come since; "none" after `fit`."""
        return self._list_ordering

    @eager
    def rebuild_lists(self, *, ordering: str | None = None) -> None:
        """Sort the rows of each list so that a search with a budget, which reads the first, finds the most.

        `ordering` is "residual_norm_asc" (l2: those near the centroid first) or "proj_desc" (ip, cosine: those with
        the largest product with it), by default the one for the metric. Rows added later lie behind, unsorted, until
        the next call; `SearchParams` can have it done by need. Answers without a budget do not change. Raises
        ValueError for an ordering that the metric does not have.

        >>> x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
        >>> index = IndexIVFFlat(16, nlist=8)
        >>> index.train(x).add(x)
        >>> index.rebuild_lists()
        >>> index.list_ordering
        'residual_norm_asc'
        """
        ordering = self._checked_ordering(ordering) or metrics.ORDERING[self.metric]
        with self._lock, torch.no_grad():
            packed, offsets, ids = self._packed()
            if packed.shape[0]:
                order = order_within_lists(packed, offsets, ids, self._raw("centroids"), self.metric)
                self._replace(packed.index_select(0, order), offsets, ids.index_select(0, order))
            self._list_ordering, self._unordered = ordering, 0

    def _checked_ordering(self, ordering: str | None) -> str | None:
        """The name of an ordering, None for "none"; ValueError if the metric does not have it."""
        if ordering not in (None, "none", metrics.ORDERING[self.metric]):
            own = metrics.ORDERING[self.metric]
            raise ValueError(f"list_ordering must be {own!r} or 'none' for metric {self.metric!r}, got {ordering!r}")
        return None if ordering == "none" else ordering

    def _params(self, params: SearchParams | None) -> SearchParams:
        params = super()._params(params)
        self._checked_ordering(params.list_ordering)
        if params.rebuild_policy == "auto_threshold" and params.list_ordering != "none":
            with self._lock:
                late = 0 < params.rebuild_threshold_adds <= self._unordered
                if self.list_ordering == "none" or late:
                    self.rebuild_lists()
        return params

    def _stage(self, rows: Tensor, *rest: Any, **settings: Any) -> None:
        with self._lock:
            super()._stage(rows, *rest, **settings)
            self._unordered += rows.shape[0]

    def _exchange(self, tensors: dict[str, Tensor]) -> None:
        super()._exchange(tensors)
        self._unordered = 0

    def _start_empty(self, *, keep_centroids: bool) -> None:
        super()._start_empty(keep_centroids=keep_centroids)
        if not keep_centroids:
            self._list_ordering = "none"

    def _take(self, given: Mapping[str, Tensor], *, assign: bool) -> None:
        # An empty index is told by whoever makes it how the rows to come lie; one that was in order no longer is.
        self._list_ordering = "none" if self.ntotal else self._list_ordering
        super()._take(given, assign=assign)

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
        """Fit the centroids to x (n, d) by k-means on at most ``max_points_per_centroid * nlist`` sampled rows.

        The same seed, device and thread count give the same centroids. On a filled index every stored vector
        moves to its new list. `verbose` shows a progress bar (extra `progress`). Returns self.

        Raises ValueError for fewer rows than `nlist` or rows that are not finite, and warns below 39 rows a list.
        """
        settings = dict(niter=niter, max_points_per_centroid=max_points_per_centroid, seed=seed, generator=generator)
        x = self._training_rows(x)
        self._adopt(self._clustered(x, RowShard.alone(x), verbose=verbose, **settings))
        return self

    @eager
    def retrain(self, x: Tensor | None = None, *, verbose: bool = False, **settings: Any) -> Retrained:
        """Go on with k-means from the centroids there are, on x (n, d) or the stored vectors, and move every vector.

        For lists that fit the vectors less and less, because these have changed since training; centroids keep their
        numbers, so that what moved can be told. `fit` begins anew. `settings` are those of `fit`, and so is what
        it raises; RuntimeError before training.

        >>> x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
        >>> index = IndexIVFFlat(8, nlist=4).train(x)
        >>> index.add(x + 1)
        >>> report = index.retrain()
        >>> report.moved > 0, report.total, report.imbalance < report.imbalance_before
        (True, 400, True)
        """
        self._require_trained("retrain")
        before = self.imbalance_factor()
        rows = self._training_rows(self._packed()[0] if x is None else x)
        start = self._raw("centroids")
        moved = self._adopt(self._clustered(rows, RowShard.alone(rows), verbose=verbose, start=start, **settings))
        return Retrained(moved, self.ntotal, before, self.imbalance_factor())

    def _training_rows(self, x: Tensor) -> Tensor:
        """Rows (n, d) that can be trained on, as they are compared."""
        x = validation.vectors(x, "x", self.d, self.device).detach()
        finite(x, "x")
        return self._prepared(x)

    def _clustered(
        self,
        x: Tensor,
        share: RowShard,
        *,
        niter: int = 10,
        max_points_per_centroid: int = 256,
        verbose: bool = False,
        **settings: Any,
    ) -> Tensor:
        """Centroids for the rows of which x is a share."""
        niter, most = positive(niter, "niter"), positive(max_points_per_centroid, "max_points_per_centroid")
        if share.total < self.nlist:
            raise ValueError(f"x has {share.total} rows, but training {self.nlist} lists needs at least {self.nlist}")
        _warn_few_rows(share.total, self.nlist)
        bar = functools.partial(require("tqdm", "progress").tqdm, desc="k-means") if verbose else iter
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return kmeans(
                x,
                self.nlist,
                niter=niter,
                metric=self.metric,
                max_points_per_centroid=most,
                progress=bar,
                share=share,
                **settings,
            )[0]

    def _adopt(self, centroids: Tensor) -> int:
        """Take over new centroids and move every stored vector to its new list; how many have another than before."""
        with self._lock, torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            packed, ids, before, noted = self._oldest_first()
            assigned = _nearest(packed, coarse_of(centroids, self.metric), self.metric)
            fresh = ragged.pack(packed, ids, assigned, centroids.shape[0])
            self._put(centroids=centroids)
            self._replace(*fresh)
            self._list_ordering = "none"
            last = slice(packed.shape[0] - noted, None)  # the last added of a duplicate id stays the last
            self._latest = dict(zip(ids[last].tolist(), assigned[last].tolist(), strict=True))
            return int((assigned != before).sum())

    def plot(self, ax: Any = None) -> Any:
        """A histogram of how many vectors the lists hold, on matplotlib axes (extra `plot`), which it returns.

        See `torch_ivf_module.plotting`, which also draws what `tune` tried.

        >>> x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
        >>> IndexIVFFlat(16, nlist=8).fit(x).plot().get_title()
        '8 lists'
        """
        from ..plotting import plot_list_sizes

        return plot_list_sizes(self, ax)

    def _assign(self, rows: Tensor) -> Tensor:
        return _nearest(rows, self._derive().coarse, self.metric)

    def _coarse(self) -> Coarse:
        centroids, offsets = self._raw("centroids"), self._raw("list_offsets")
        homes = sampled_lists(offsets, self._raw("packed_embeddings").shape[0])
        # Centroids of lists that hold vectors, which may lie closer together than all centroids do.
        origin = metrics.origin_of(centroids[homes] if homes.shape[0] else centroids, self.metric)
        return coarse_of(centroids, self.metric, origin)

    def search_options(self, k: int, params: SearchParams | None = None) -> SearchOptions:
        """What `params`, or the index's own settings where they are None, mean for a search of k results."""
        params = params or DEFAULTS
        return SearchOptions(
            k,
            min(self.nlist, self._own_nprobe if params.nprobe is None else params.nprobe),
            self.metric,
            self._search_mode,
            self._own_max_codes if params.max_codes is None else params.max_codes or None,
            _budget_of(params),
            self._max_bytes,
            params.profile == "exact",
        )

    def config(self) -> dict[str, Any]:
        """The constructor arguments that rebuild this index, its buffers left out."""
        own = ("nlist", "nprobe", "max_codes", "list_ordering")
        return {**super().config(), **{name: getattr(self, name) for name in own}}


def _budget_of(params: SearchParams) -> Budget | None:
    rows, most = params.of("candidate_budget") or 0, params.max_codes_cap_per_list
    if not rows and not most:
        return None
    return Budget(
        rows=rows,
        weighted=params.budget_strategy == "distance_weighted",
        even_cap=bool(params.of("use_per_list_sizes")),
        strict=params.strict_budget,
        drop_far=params.dynamic_nprobe,
        least=params.min_codes_per_list,
        most=most,
    )


def _nearest(rows: Tensor, coarse: Coarse, metric: str) -> Tensor:
    """The list (n,) of each row (n, d)."""

    kernel = kernel_for(rows.new_empty(0, dtype=torch.float32))
    return in_chunks(lambda part: probe(part.float(), coarse, 1, metric, kernel)[1][:, 0], 1 << 14, rows)


def _warn_few_rows(rows: int, nlist: int) -> None:
    """Say that the centroids rest on few rows, as faiss does."""
    if rows < 39 * nlist:
        warnings.warn(
            f"{rows} training rows for {nlist} centroids: give at least {39 * nlist} for good lists",
            stacklevel=6,  # two frames of `eager` among them
        )
