"""Training the centroids of an inverted file, and moving its vectors to the lists of new centroids.

N vectors, L lists, d dim, n training rows.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, TypeVar

import numpy
import torch
from torch import Tensor, nn

from .._arrays import finite
from .._optional import require
from ..functional.kmeans import RowShard, kmeans
from ..functional.probe import coarse_of, nearest_lists
from ..functional.row_codes import vectors_of
from ..params import positive
from . import validation
from .building import stored_rows
from .groups import packed_by_list
from .ids import places
from .searching import prepared
from .store import ListStore

if TYPE_CHECKING:
    from .base import IndexBase

Self = TypeVar("Self", bound=nn.Module)

_ROWS_PER_LIST = 39  # faiss warns if there are fewer training rows per list


def train(self: Self, mode: bool | Tensor = True, **settings: Any) -> Self:
    """Train the index on a tensor, as faiss's `train`; or switch the mode, as `train` of torch.nn.Module.

    ``train(x, ...)`` is `fit`. ``train(True)`` and ``train(False)`` set the training flag. For code written for
    torch-ivf, `max_iter` means `niter`, and `batch_size` and `tol` are accepted but have no effect.
    """
    given: object = mode
    if isinstance(given, Tensor) or (hasattr(given, "__len__") and not isinstance(given, (str, bytes))):
        names = {"max_iter": "niter"}
        known = {names.get(name, name): value for name, value in settings.items() if name not in ("batch_size", "tol")}
        fitted: Self = self.fit(given, **known)  # type: ignore[operator]
        return fitted
    if not isinstance(mode, (bool, numpy.bool_)):
        raise TypeError(f"train takes a bool or float vectors (n, {self.d}), got {type(mode).__name__}")
    if settings:
        raise TypeError(f"train(mode) takes no {', '.join(settings)}: pass a tensor to fit the index")
    return nn.Module.train(self, bool(mode))


def training_rows(index: IndexBase, x: Tensor) -> Tensor:
    """Training rows x (n, d) as the metric compares them; ValueError for one that is not finite."""
    x = validation.vectors(x, "x", index.d, index.device).detach()
    finite(x, "x")
    return prepared(index, x)


def stored_sample(
    index: IndexBase,
    *,
    max_points_per_centroid: int = 256,
    seed: int = 1234,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Tensor:
    """Training rows (n, d): the stored vectors, or as many of them as k-means takes. `settings` are not used."""
    rows = index.store.packed_lists()[0]
    most = max(positive(max_points_per_centroid, "max_points_per_centroid"), _ROWS_PER_LIST) * index.store.nlist
    if rows.shape[0] > most:
        generator = torch.Generator(device="cpu").manual_seed(seed) if generator is None else generator
        chosen = torch.randperm(rows.shape[0], generator=generator, device="cpu")[:most].sort().values
        rows = rows.index_select(0, chosen.to(rows.device))
    return training_rows(index, vectors_of(rows, index.d))


def clustered(
    index: IndexBase,
    nlist: int,
    x: Tensor,
    shard: RowShard,
    *,
    niter: int = 10,
    max_points_per_centroid: int = 256,
    verbose: bool = False,
    **settings: Any,
) -> Tensor:
    """Centroids (nlist, d) of the training rows of which x (n, d) are those of this process, as `shard` says."""
    niter, most = positive(niter, "niter"), positive(max_points_per_centroid, "max_points_per_centroid")
    if shard.total < nlist:
        raise ValueError(f"x has {shard.total} rows, but training {nlist} lists needs at least {nlist}")
    if shard.total < _ROWS_PER_LIST * nlist:
        warnings.warn(
            f"{shard.total} training rows for {nlist} centroids: give at least {_ROWS_PER_LIST * nlist} for good lists",
            stacklevel=5,  # the caller of `fit`, which two functions of `eager` wrap
        )
    bar = functools.partial(require("tqdm", "progress").tqdm, desc="k-means") if verbose else iter
    with torch.no_grad(), torch.autocast(index.device.type, enabled=False):
        return kmeans(
            x,
            nlist,
            niter=niter,
            metric=index.metric,
            max_points_per_centroid=most,
            progress=bar,
            shard=shard,
            **settings,
        )[0]


def move_to(store: ListStore, centroids: Tensor) -> int:
    """Replace the centroids by others (L, d) and move every vector to its nearest list; how many vectors that moves."""
    with store.lock, torch.no_grad(), torch.autocast(store.device.type, enabled=False):
        packed, ids, before, groups, repeated = stored_rows(store)
        assigned = nearest_lists(packed, coarse_of(centroids, store.metric), store.metric)
        lists = packed_by_list(packed, ids, groups, assigned, centroids.shape[0])
        store.put(centroids=centroids)
        store.replace_lists(*lists)
        store.ordering = "none"
        last = slice(packed.shape[0] - repeated, None)  # the last added rows of their ids, as before
        store.ids.last_places = places(ids[last], assigned[last], None if groups is None else groups[last])
        return int((assigned != before).sum())
