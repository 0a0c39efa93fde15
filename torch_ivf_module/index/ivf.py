"""What inverted-file indexes have in common, whatever form their rows have.

N vectors, L lists, d dim, n training rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..functional import metric as metrics
from ..functional.budget import Budget
from ..functional.kmeans import RowShard
from ..functional.options import SearchOptions
from ..functional.ordering import order_within_lists
from ..functional.transforms import run_outside
from ..params import DEFAULTS, SearchParams, positive
from . import building, extensions, rebalancing, training
from .auto_rebalance import auto_rebalance_property, balanced
from .base import IndexBase
from .eager import eager
from .row_format import RowFormat

Self = TypeVar("Self", bound="IndexIVF")


class Retrained(NamedTuple):
    """The result of `IndexIVF.retrain`."""

    moved: int  # vectors that are in another list than before
    total: int  # vectors in the index
    imbalance_before: float  # see IndexIVF.imbalance_factor
    imbalance: float


class IndexIVF(IndexBase):
    """Inverted file: each vector is in the list of its nearest centroid, and a query reads the `nprobe` nearest lists.

    The base class of `IndexIVFFlat` and `IndexIVFScalarQuantizer`, which say how vectors are stored.
    """

    _auto_rebalance: float | None = None  # also of an index that was pickled before it had the setting
    _fitted: tuple[Tensor, Tensor] | None = None  # centroids, and the lengths that lists had when they were computed
    _rows_changed = 0  # rows added, replaced or removed since `auto_rebalance` looked at the lists

    # Settings of torch-ivf without effect: its "auto" compares these thresholds, here predicted costs are compared.
    approximate_mode: bool = False
    auto_search_avg_group_threshold: float = 8.0
    csr_small_batch_avg_group_threshold: float = 64.0

    def __init__(
        self,
        format: RowFormat,
        nlist: int,
        nprobe: int | None,
        metric: str,
        *,
        max_codes: int | None = None,
        list_ordering: str = "none",
        auto_rebalance: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(format, metric=metric, **settings)
        self._wanted_nlist = positive(nlist, "nlist")
        self.nprobe = min(8, nlist) if nprobe is None else nprobe
        self.max_codes = max_codes
        self.auto_rebalance = auto_rebalance
        self.store.ordering = self._checked_ordering(list_ordering) or "none"

    @property
    def nlist(self) -> int:
        """Number of lists; before training, the number that `fit` will create."""
        return self.store.nlist or self._wanted_nlist

    @property
    def nprobe(self) -> int:
        """Number of lists that a query reads; a value above `nlist` means all."""
        return self._own_nprobe

    @nprobe.setter
    def nprobe(self, value: int) -> None:
        self._own_nprobe = positive(value, "nprobe")
        self.store.graph = None

    @property
    def max_codes(self) -> int | None:
        """The maximum of rows that a query reads, None for no limit."""
        return self._own_max_codes

    @max_codes.setter
    def max_codes(self, value: int | None) -> None:
        # In faiss 0 means no limit.
        self._own_max_codes = None if value is None or value == 0 else positive(value, "max_codes")
        self.store.graph = None

    @property
    def list_ordering(self) -> str:
        """The order that `rebuild_lists` last gave to the rows of each list; "none" after `fit`."""
        return self.store.ordering

    @eager
    def rebuild_lists(self, *, ordering: str | None = None) -> None:
        """Sort the rows of each list, the most likely results first, for searches with a budget.

        A search with a budget reads the first rows of each list. `ordering` is "residual_norm_asc" (l2: rows near the
        centroid first) or "proj_desc" (ip, cosine: rows with a large product with the centroid first); the default
        depends on the metric. Rows that are added later follow unsorted until the next call, which
        `SearchParams(rebuild_policy=...)` can make. Results of searches without a budget do not change. Raises
        ValueError for an ordering of another metric.

        >>> from torch_ivf_module import IndexIVFFlat
        >>> x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
        >>> index = IndexIVFFlat(16, nlist=8)
        >>> index.train(x).add(x)
        >>> index.rebuild_lists()
        >>> index.list_ordering
        'residual_norm_asc'
        """
        ordering = self._checked_ordering(ordering) or metrics.ORDERING[self.metric]
        store = self.store
        with store.lock, torch.no_grad():
            packed, offsets, ids = store.packed_lists()
            if store.grouped:
                raise RuntimeError("rebuild_lists needs an index without groups, by which rows of a list are sorted")
            if packed.shape[0]:
                order = order_within_lists(packed, offsets, ids, store.buffers["centroids"], self.metric)
                store.replace_lists(packed.index_select(0, order), offsets, ids.index_select(0, order))
            store.ordering, store.unordered = ordering, 0

    def _checked_ordering(self, ordering: str | None) -> str | None:
        """The name of an ordering, None for "none"; ValueError if the metric does not have it."""
        if ordering not in (None, "none", metrics.ORDERING[self.metric]):
            own = metrics.ORDERING[self.metric]
            raise ValueError(f"list_ordering must be {own!r} or 'none' for metric {self.metric!r}, got {ordering!r}")
        return None if ordering == "none" else ordering

    def checked_params(self, params: SearchParams | None) -> SearchParams:
        """`params`, or the defaults for None; sorts the lists first if the policy "auto_threshold" requires it.

        TypeError for anything else, ValueError for an ordering that the metric does not have.
        """
        params = super().checked_params(params)
        self._checked_ordering(params.list_ordering)
        if params.rebuild_policy == "auto_threshold" and params.list_ordering != "none":
            with self.store.lock:
                many = 0 < params.rebuild_threshold_adds <= self.store.unordered
                if self.list_ordering == "none" or many:
                    run_outside(self.rebuild_lists)
        return params

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
        """Train the centroids by k-means on x (n, d), or a sample of ``max_points_per_centroid * nlist`` of its rows.

        The same seed, device and number of threads give the same centroids. In a filled index every stored vector
        is moved to its new list. `verbose` shows a progress bar (extra `progress`). Returns self.

        Raises ValueError for fewer rows than `nlist` or a row that is not finite. Warns for fewer than 39 rows per
        list.
        """
        x = training.training_rows(self, x)
        centroids = training.clustered(
            self,
            self.nlist,
            x,
            RowShard.alone(x),
            niter=niter,
            max_points_per_centroid=max_points_per_centroid,
            seed=seed,
            generator=generator,
            verbose=verbose,
        )
        training.move_to(self.store, centroids)
        return self

    @eager
    def retrain(self, x: Tensor | None = None, *, verbose: bool = False, **settings: Any) -> Retrained:
        """Continue k-means from the current centroids, on x (n, d) or the stored vectors, and assign all vectors again.

        For an index whose vectors have changed since training. Unlike `fit`, it does not start from random rows, and
        the result says how many vectors moved to another list. `settings` and errors are those of `fit`. Raises
        RuntimeError before training.

        >>> from torch_ivf_module import IndexIVFFlat
        >>> x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
        >>> index = IndexIVFFlat(8, nlist=4).train(x)
        >>> index.add(x + 1)
        >>> report = index.retrain()
        >>> report.moved > 0, report.total, report.imbalance < report.imbalance_before
        (True, 400, True)
        """
        self.store.require_trained("retrain")
        before = self.imbalance_factor()
        rows = training.stored_sample(self, **settings) if x is None else training.training_rows(self, x)
        settings["start"] = self.store.buffers["centroids"]
        centroids = training.clustered(self, self.nlist, rows, RowShard.alone(rows), verbose=verbose, **settings)
        moved = training.move_to(self.store, centroids)
        return Retrained(moved, self.ntotal, before, self.imbalance_factor())

    auto_rebalance = auto_rebalance_property
    rebalance = rebalancing.rebalance
    add = balanced(building.add)
    add_with_ids = balanced(building.add_with_ids)
    remove_ids = balanced(building.remove_ids)
    update = balanced(building.update)
    merge_from = balanced(building.merge_from)

    plot = extensions.plot

    def search_options(self, k: int, params: SearchParams | None = None) -> SearchOptions:
        """What `params`, or the index's own settings where they are None, mean for a search of k results."""
        params = params or DEFAULTS
        return SearchOptions(
            k,
            min(self.store.nlist or self._wanted_nlist, self._own_nprobe if params.nprobe is None else params.nprobe),
            self.metric,
            self._search_mode,
            self._own_max_codes if params.max_codes is None else params.max_codes or None,
            None if params is DEFAULTS else _budget_of(params),
            self._max_bytes,
            params.profile == "exact",
        )

    def config(self) -> dict[str, Any]:
        """The constructor arguments that rebuild this index, its buffers left out."""
        own = ("nlist", "nprobe", "max_codes", "list_ordering", "auto_rebalance")
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
