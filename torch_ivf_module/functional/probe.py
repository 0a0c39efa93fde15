"""Which lists a query visits. Assigning a vector to a list is probing with nprobe = 1.

Q queries, L lists, P probes, d dim, K candidates a query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import metric as metrics
from .chunking import in_chunks
from .kernels import Kernel, kernel_for
from .rescore import rescore
from .select import best_positions
from .workspace import Workspace

_CHUNK_SCORES = 1 << 20  # scores held at a time: 4 MiB stays in cache, where a second pass over it is cheap


class Coarse(NamedTuple):
    """The coarse quantizer: centroids, and what is derived from them once."""

    centroids: Tensor  # (L, d) float32
    relative: Tensor  # (L, d) float32, relative to the origin
    bias: Tensor  # (L,) float32, or (0,); see metric.row_bias
    origin: Tensor  # (d,) float32


def coarse_of(centroids: Tensor, metric: str, origin: Tensor | None = None) -> Coarse:
    """Centroids (L, d) made ready for `probe`, relative to `origin` (d,) or to their median."""
    origin = metrics.origin_of(centroids, metric) if origin is None else origin
    bias = metrics.row_bias(centroids, origin, metric)
    return Coarse(centroids, centroids - origin, bias, origin)


def probe(
    x: Tensor, coarse: Coarse, nprobe: int, metric: str, kernel: Kernel | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest lists of each query, nearest first: exact scores and list numbers, both (Q, P), P = min(nprobe, L).

    x (Q, d) float32, finite, *not* relative to the origin. This is a search among the centroids: they are ranked in
    float32, and ranked again in float64 for queries where rounding or overflow could change which lists are chosen. A
    kernel finds the lists whatever the mode of the search, so that no answer depends on the mode.
    """
    nprobe = min(nprobe, coarse.centroids.shape[0])
    if coarse.centroids.shape[0] == 1 and nprobe:
        return x.new_zeros(x.shape[0], 1), torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    if kernel is not None and nprobe and kernel.serves(coarse.centroids):
        return kernel.probe(x, coarse, nprobe, metric)
    scores, found, unclear = _certified(x, coarse, nprobe, nprobe + 1 + nprobe // 4, metric)
    if bool(unclear.any()):
        scores[unclear], found[unclear] = _in_float64(x[unclear], coarse, nprobe, metric)
    return scores, found


def probe_by_ranking(x: Tensor, coarse: Coarse, nprobe: int, metric: str) -> tuple[Tensor, Tensor]:
    """`probe` in operations of static shapes, for graphs: ranking scores and lists (Q, P), nothing ranked again."""
    if coarse.centroids.shape[0] == 1 and nprobe:
        return x.new_zeros(x.shape[0], 1), torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    return best_positions(_ranking(metrics.shift(x, coarse.origin, metric), coarse, None), nprobe)


def nearest_by_ranking(x: Tensor, coarse: Coarse) -> tuple[Tensor, Tensor]:
    """The list of highest ranking score of each row x (Q, d) *relative to the origin*: scores and lists (Q,).

    Not certified: near ties may go either way, as k-means can bear.
    """
    kernel = kernel_for(x)
    if kernel is not None and kernel.serves(coarse.relative):
        scores, found = kernel.nearest(x, coarse.relative, coarse.bias, 1)
        if bool(((found >= 0) & scores.isfinite()).all()):  # not where a score overflows
            return scores[:, 0], found[:, 0]
    memory = Workspace(x.device)

    def best(part: Tensor) -> tuple[Tensor, Tensor]:
        return _ranking(part, coarse, memory).max(1)

    return in_chunks(best, _step(coarse), x)


def _certified(
    x: Tensor, coarse: Coarse, nprobe: int, kept: int, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`probe` by PyTorch operations, and the queries (Q,) whose lists are not certain."""
    memory = Workspace(x.device)
    kept = min(kept, coarse.centroids.shape[0])

    def candidates(part: Tensor) -> tuple[Tensor, Tensor]:
        ranking = _ranking(metrics.shift(part, coarse.origin, metric), coarse, memory)
        return best_positions(ranking.nan_to_num_(nan=-torch.inf), kept)

    ranking, found = in_chunks(candidates, _step(coarse), x)
    if metric != "l2":
        return ranking[:, :nprobe], found[:, :nprobe], ~ranking[:, :nprobe].isfinite().all(1)
    scores, lists = rescore(x, coarse.centroids, found, nprobe, metric)
    unclear = (lists < 0).any(1)
    if kept < coarse.centroids.shape[0] and nprobe:
        unclear |= metrics.doubtful(x, coarse.origin, ranking[:, -1], scores[:, -1], relative=True)
    return scores, lists, unclear


def _step(coarse: Coarse) -> int:
    """Queries whose scores are held at a time."""
    return max(1, _CHUNK_SCORES // max(1, coarse.centroids.shape[0]))


def _ranking(y: Tensor, coarse: Coarse, memory: Workspace | None) -> Tensor:
    """Ranking scores (Q, L) of the centroids for queries relative to the origin.

    Written to reused memory where it is given: fresh memory for each part fragments the heap (fitting 1,600 lists to
    400 MB grew to 2.4 GB at times).
    """
    out = None if memory is None else memory.take(y.shape[0], coarse.relative.shape[0])
    if coarse.bias.shape[0]:
        return torch.addmm(coarse.bias, y, coarse.relative.t(), out=out)
    return torch.mm(y, coarse.relative.t(), out=out)


def _in_float64(x: Tensor, coarse: Coarse, nprobe: int, metric: str) -> tuple[Tensor, Tensor]:
    """`probe` in float64, where no square of a float32 number overflows."""

    def best(part: Tensor) -> tuple[Tensor, Tensor]:
        query, centroids = part.double(), coarse.centroids.double()
        if metrics.by_differences(metric):
            apart = torch.cdist(query, centroids, compute_mode="donot_use_mm_for_euclid_dist")
            scores = apart.square().neg()
        else:
            scores = query @ centroids.t()
        found, at = scores.topk(nprobe, dim=1)
        return found.float(), at

    return in_chunks(best, _step(coarse), x)
