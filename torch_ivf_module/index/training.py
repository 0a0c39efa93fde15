"""Training the centroids of an inverted file, and moving its vectors to new ones.

N vectors, L lists, d dim, n training rows.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._arrays import finite
from .._optional import require
from ..functional import lists as ragged
from ..functional.kmeans import RowShard, kmeans
from ..functional.probe import coarse_of, nearest_lists
from ..params import positive
from . import validation
from .building import assigned_rows
from .searching import prepared
from .store import ListStore

if TYPE_CHECKING:
    from .base import IndexBase

_ROWS_PER_LIST = 39  # training rows below which faiss warns


def training_rows(index: IndexBase, x: Tensor) -> Tensor:
    """Rows x (n, d) that can be trained on, as they are compared; ValueError for one that is not finite."""
    x = validation.vectors(x, "x", index.d, index.device).detach()
    finite(x, "x")
    return prepared(index, x)


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
            stacklevel=5,  # two frames of `eager` among them
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
    """Replace the centroids by others (L, d) and move every vector to its nearest list; how many change their list."""
    with store.lock, torch.no_grad(), torch.autocast(store.device.type, enabled=False):
        packed, ids, before, repeated = assigned_rows(store)
        assigned = nearest_lists(packed, coarse_of(centroids, store.metric), store.metric)
        lists = ragged.pack(packed, ids, assigned, centroids.shape[0])
        store.put(centroids=centroids)
        store.replace_lists(*lists)
        store.ordering = "none"
        last = slice(packed.shape[0] - repeated, None)  # the last added rows of their ids, as before
        store.ids.last_lists = dict(zip(ids[last].tolist(), assigned[last].tolist(), strict=True))
        return int((assigned != before).sum())
