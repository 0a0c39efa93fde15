"""Which lists a query visits. Assigning a vector to a list is probing with nprobe = 1.

Q queries, L lists, P probes, d dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import metric as metrics
from .kernels import kernel_for
from .parts import in_parts, tracing
from .scratch import Scratch
from .select import best_positions

_CHUNK_SCORES = 1 << 20  # scores held at a time: 4 MiB stays in cache, where a second pass over it is cheap


class Coarse(NamedTuple):
    """The coarse quantizer, ready to be multiplied with queries."""

    centroids: Tensor  # (L, d) float32, relative to the origin
    bias: Tensor  # (L,) float32, or (0,)
    origin: Tensor  # (d,) float32


def coarse_of(centroids: Tensor, metric: str, origin: Tensor | None = None) -> Coarse:
    """Centroids (L, d) made ready for `probe`, relative to `origin` (d,) or to one inside them."""
    origin = metrics.origin_of(centroids, metric) if origin is None else origin
    return Coarse(centroids - origin, metrics.row_bias(centroids, origin, metric), origin)


def probe(x: Tensor, coarse: Coarse, nprobe: int) -> tuple[Tensor, Tensor]:
    """The nearest lists of each query, nearest first.

    x (Q, d) float32 *relative to the origin* (see metric.shift). Returns ranking scores and lists, both (Q, P)
    with P = min(nprobe, L). A kernel finds them whatever the mode of the search, so that no answer depends on that.
    """
    lists = coarse.centroids.shape[0]
    if min(nprobe, lists) > 0 and (kernel := kernel_for(x, coarse.centroids)):
        scores, found = kernel.nearest(x, coarse.centroids, coarse.bias, min(nprobe, lists))
        if bool((found >= 0).all()):  # not where a score overflows
            return scores, found
    step = max(1, _CHUNK_SCORES // max(1, lists))
    if tracing() or x.shape[0] <= step:
        return best_positions(_scores(x, coarse, None), nprobe)
    # Fresh memory for each part's scores fragments the heap: fitting 1,600 lists to 400 MB grew to 2.4 GB at times.
    memory = Scratch(x.device)

    def nearest(part: Tensor) -> tuple[Tensor, Tensor]:
        return best_positions(_scores(part, coarse, memory.take(part.shape[0], lists)), nprobe)

    return in_parts(nearest, step, x)


def _scores(x: Tensor, coarse: Coarse, out: Tensor | None) -> Tensor:
    if coarse.bias.shape[0]:
        return torch.addmm(coarse.bias, x, coarse.centroids.t(), out=out)
    return torch.mm(x, coarse.centroids.t(), out=out)
