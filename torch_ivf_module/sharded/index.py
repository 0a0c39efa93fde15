"""An index whose vectors are divided among the processes of a group.

W processes, N vectors of all processes, n rows of one process, L lists, Q queries of one process, d dim, k results.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._optional import require
from ..functional import metric as metrics
from ..functional.kmeans import RowShard
from ..functional.transforms import is_dual, wrapped
from ..index import IndexIVF, building, grouping, schema, searching, training, validation
from ..index.eager import without_autocast
from ..index.filtering import check_filters
from ..index.ids import Matches
from ..params import SearchParams, positive
from . import checkpoint_files, filters, global_state, routing
from .module import ShardedModule

Self = TypeVar("Self", bound="ShardedIndex")


class ShardedIndex(ShardedModule):
    """One index over the processes of a torch.distributed group: each stores a part of the vectors and all centroids.

    Every process makes the same calls in the same order, each with its own data, which may be empty. A call waits for
    the other processes. `search` returns the results of one index of all vectors. If one process refuses its input,
    all processes raise an error, and no index is changed. If a process ends, the others raise an error that names the
    step, within the timeout of the group.

    Parameters
    ----------
    index : an empty index, or the same filled index on every process (``ShardedIndex(load(path, mmap=True))``). Each
        process keeps its part. Centroids, lists and ids are compared between processes, but not vectors. The object is
        changed, and becomes the attribute `index`. Set `k`, `nprobe`, `max_codes`, `search_mode`, `max_bytes` and
        `codes` on the ShardedIndex, to the same values on every process.
    process_group : the group; by default all processes. Threads must not use one index at the same time.
    shard : "rows" assigns rows to processes in turn: all store the same number, and every query is sent to all.
        "lists" assigns complete lists by size (inverted-file indexes only): a query is sent to the owners of its lists.

    Vectors are not buffers of this module, so DistributedDataParallel and fully_shard ignore them. `state_dict` has
    the names and shapes of the plain index of all rows; vectors and ids are DTensors sharded along the rows. So
    `torch.distributed.checkpoint` can load it with another number of processes, and into a plain index. `state_dict` is
    a collective call. A sharded index cannot be pickled (TypeError), because a process group cannot.

    Raises TypeError or ValueError for a wrong argument, RuntimeError without a process group or when the processes'
    indexes differ.

    >>> import tempfile, torch.distributed as dist
    >>> from torch_ivf_module import IndexIVFFlat
    >>> with tempfile.TemporaryDirectory() as place:
    ...     dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=0, world_size=1)
    ...     index = ShardedIndex(IndexIVFFlat(8, nlist=4, nprobe=4))
    ...     x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    ...     index.train(x).add(x)
    ...     print(index.search(x[:2], 1)[1].flatten(), index.ntotal)
    ...     dist.destroy_process_group()
    tensor([0, 1]) 400
    """

    def info(self) -> dict[str, Any]:
        """Settings, `ntotal`, and the `rows` and `bytes` of the buffers of each process."""
        index = self.index
        _, said = self._agree("info", lambda: (None, [index.ntotal, sum(part.nbytes for part in index.buffers())]))
        sizes = {"ntotal": self._ntotal, "rows": said[:, 0].tolist(), "bytes": said[:, 1].tolist()}
        group = {"shard": self.shard, "world_size": self._exchange.size, "rank": self._exchange.rank}
        return {**self.index.config(), **group, **sizes}

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
        """Fit the centroids to the rows x (n, d) of all processes by k-means; each process computes with its own rows.

        The sample and the initial centroids are those of one process with the rows of all processes in the order of the
        ranks; so is the result, up to rounding. A `generator` must be in the same state on all processes. In a filled
        index, vectors are moved to their new lists. `verbose` shows a progress bar on rank 0. Settings and errors are
        those of `IndexIVF.fit`.
        """
        index = self.index
        if not isinstance(index, IndexIVF):
            self._agree("train", lambda: (index.fit(x), []))
            return self
        settings: dict[str, Any] = dict(niter=niter, max_points_per_centroid=max_points_per_centroid, seed=seed)

        def prepare() -> tuple[Tensor, list[int]]:
            if verbose:
                require("tqdm", "progress")
            return training.training_rows(index, x), [x.shape[0]]

        def compared() -> object:
            return settings, None if generator is None else global_state.digest_of(generator.get_state()), verbose

        rows, said = self._agree("train", prepare, compared)
        first, total = int(said[: self._exchange.rank, 0].sum()), int(said[:, 0].sum())
        shard = RowShard(first, total, lambda tensor: self._exchange.all_reduce("train", tensor))
        shown = verbose and self._exchange.rank == 0
        centroids = training.clustered(index, index.nlist, rows, shard, generator=generator, verbose=shown, **settings)
        centroids = self._exchange.broadcast("train", centroids)
        with self._as_before_on_error("train"):
            self._agree("train", lambda: (training.move_to(index.store, centroids), []))
            if self.shard == "lists":
                self._redistribute("train")
        self._sizes = None
        return self

    def add(self, x: Tensor) -> None:
        """Add the rows x (n, d) of this process; ids are assigned from ``next_id`` on, rank by rank.

        Rows are checked and converted as in `IndexBase.add`, and then sent to the processes that store them.
        """
        self._add("add", x, None)

    def add_with_ids(self, x: Tensor, ids: Tensor) -> None:
        """Like `add`, with ids (n,). The ids must not be in use on any process; this is not checked."""
        self._add("add_with_ids", x, ids)

    def _add(self, step: str, x: Tensor, ids: Tensor | None) -> None:
        index = self.index

        def prepare() -> tuple[tuple[Tensor, Tensor, Tensor | None], list[int]]:
            index.store.require_trained("add")
            index.check_buffers()
            given = validation.vectors(x, "x", self.d, index.device)
            own = None if ids is None else validation.ids(ids, "ids", given.shape[0], index.device)
            rows, assigned = building.assign(index.store, given)
            return (rows, assigned, own), [rows.shape[0], 0 if own is None else schema.next_id_after(own)]

        (rows, assigned, own), said = self._agree(step, prepare)
        total, before, number = int(said[:, 0].sum()), int(said[: self._exchange.rank, 0].sum()), index.store.next_id
        if own is None:
            next_id = validation.numbering(number, total)
            own = torch.arange(number + before, number + before + rows.shape[0], device=rows.device)
        else:
            next_id = max(number, int(said[:, 1].max()))
        owners = self._owners_after(step, assigned)
        positions = torch.arange(self._ntotal + before, self._ntotal + before + rows.shape[0], device=rows.device)
        rows, own, assigned = self._send(step, global_state.LocalRows(rows, own, assigned, positions), owners)
        index.store.add(rows, own, assigned, next_id, custom_ids=ids is not None)
        self._owners, self._sizes, self._ntotal = owners, None, self._ntotal + total

    def remove_ids(self, ids: Tensor) -> int:
        """Remove the ids that any process passes, from all processes; returns the number of rows removed on all.

        Each process passes ids of its own, as to `IndexBase.remove_ids`.
        """
        index = self.index

        def prepare() -> tuple[Tensor, list[int]]:
            own = building.selected_ids(ids, index.device)
            return own, [own.shape[0]]

        def find() -> tuple[Matches, list[int]]:
            matches = index.store.matches(removed.unique())
            return matches, [matches.rows]

        own, said = self._agree("remove_ids", prepare)
        removed = self._exchange.all_gather_rows("remove_ids", own, said[:, 0])
        matches, said = self._agree("remove_ids", find)
        index.store.delete(matches)  # no communication follows, so no process can fail after another has deleted
        count = int(said[:, 0].sum())
        self._ntotal, self._sizes = self._ntotal - count, None
        return count

    def reset(self) -> None:
        """Remove all vectors; ids start from 0 again. Centroids are kept."""

        def prepare() -> tuple[None, list[int]]:
            self.index.check_buffers()
            return None, []

        self._agree("reset", prepare)
        self.index.reset()
        self._forget()

    def reset_parameters(self) -> None:
        """Make the index empty and untrained, like `IndexBase.reset_parameters`."""
        self._agree("reset_parameters", lambda: (None, []))
        self.index.reset_parameters()
        self._forget()

    def rebalance(self) -> None:
        """Assign all rows to processes again, for example after removals or uneven growth; no list changes."""
        self._agree("rebalance", lambda: (None, []))
        if self.index.is_trained:
            self._redistribute("rebalance")

    # -- searching -----------------------------------------------------------------------------------------

    def search(self, x: Tensor, k: int, *, params: SearchParams | None = None) -> tuple[Tensor, Tensor]:
        """The k nearest of the vectors of all processes to each query of this process.

        x (Q, d), D (Q, k) and I (Q, k) are as in `IndexBase.search`. Q may differ between processes, and may be 0. `k`
        and `params` must be the same, except for the selector and exclude of each query. A query and the numbers of its
        lists are sent to every process that stores some of these lists, which returns k distances and ids. D has no
        gradient. Raises the errors of `IndexBase.search`, and ValueError for `params` with a budget.
        """

        def prepare() -> tuple[filters.Queries, list[int]]:
            positive(k, "k")
            return self._queries(x, params, "search")

        with torch.no_grad():
            (queries, settings), said = self._agree("search", prepare, lambda: (int(k), self._settings(params)))
            sizes = None if self.index.search_options(k, settings).max_codes is None else self._list_sizes("search")
            probed = searching.probed_lists(self.index, queries, settings, sizes)
            routes, theirs, lists, filter = filters.send_queries(
                self._exchange, "search", queries, probed, self._list_owners(), settings, said
            )
            with without_autocast(theirs.device):
                scores, _, ids, _ = searching.search_prepared(self.index, theirs, k, settings, lists, filter)
            scores, ids = routing.merge_results(self._exchange, "search", routes, scores, ids)
            return metrics.to_distance(scores, self.metric), ids

    def range_search(
        self, x: Tensor, radius: float | Tensor, *, params: SearchParams | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All vectors of all processes within the radius of each query of this one: lims, D, I.

        As `IndexBase.range_search`; `params` as for `search`.
        """

        def prepare() -> tuple[tuple[Tensor, Tensor, SearchParams], list[int]]:
            (queries, settings), said = self._queries(x, params, "range_search")
            return (queries, validation.radii(radius, "radius", queries.shape[0], self.index.device), settings), said

        with torch.no_grad():
            step = "range_search"
            (queries, radii, settings), said = self._agree(step, prepare, lambda: self._settings(params))
            probed = searching.probed_lists(self.index, queries, settings)
            routes, theirs, lists, filter, around = filters.send_queries(
                self._exchange, step, queries, probed, self._list_owners(), settings, said, radii
            )
            found = searching.range_of_prepared(self.index, theirs, around, settings, lists, filter)
            return routing.merge_range_results(self._exchange, step, routes, *found)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``search(x, index.k)`` for x (..., d): D and I of shape (..., k)."""
        k = self.index.k
        # `search` refuses other input, on all processes.
        rows = isinstance(x, Tensor) and x.dim() and x.shape[-1] == self.d
        found, ids = self.search(x.reshape(-1, self.d) if rows else x, k)
        return found.view(*x.shape[:-1], k), ids.view(*x.shape[:-1], k)

    def _queries(self, x: Tensor, params: SearchParams | None, action: str) -> tuple[filters.Queries, list[int]]:
        self.index.store.require_trained(action)
        given = validation.vectors(x, "x", self.d, self.index.device)
        if wrapped(given) or is_dual(given):
            raise RuntimeError(f"{action} of a ShardedIndex has no derivative and no torch.func transform: detach x")
        settings = self.index.checked_params(params)
        grouping.refuse(settings, "a ShardedIndex")
        check_filters(settings, given.shape[0], self.index.device)
        if self.index.search_options(1, settings).budget is not None:
            raise ValueError("params has a budget of rows, but no process has whole lists; max_codes counts whole ones")
        return (searching.prepared(self.index, given), settings), filters.widths(settings)

    def _list_owners(self) -> Tensor | None:
        return None if self.shard == "rows" else self._owners

    def _settings(self, params: SearchParams | None) -> tuple[object, ...]:
        """What must be the same on all processes: `params`, and the settings of the index that it does not give."""
        usual, given = self.index.search_options(1), params or SearchParams()
        return *filters.settings_of(given), usual.nprobe, usual.max_codes

    # -- state ---------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint into the folder `path`, which all processes must have access to; see `restore`.

        The previous checkpoint is removed when the new one is complete. So after an interrupted save the folder has a
        complete checkpoint. `newest` returns its path for `torch.distributed.checkpoint`; the key in
        it is "index".
        """
        checkpoint_files.save(self._exchange, self._global_buffers("save"), path)

    def restore(self: Self, path: str | os.PathLike[str]) -> Self:
        """Load the newest checkpoint of `save` in a folder, or a checkpoint of a plain or sharded index that
        ``torch.distributed.checkpoint.save({"index": index}, ...)`` wrote. Returns self."""
        empty = global_state.empty_buffers(self._exchange, self.index)
        self.load_state_dict(checkpoint_files.restore(self._exchange, empty, path))
        return self

    def extra_repr(self) -> str:
        """The settings, as the module shows them."""
        place = f"rank={self._exchange.rank} of {self._exchange.size}, shard={self.shard!r}, ntotal={self._ntotal}"
        return f"{place}, index={self.index!r}"
