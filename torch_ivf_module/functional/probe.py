"""The lists that a query probes. Assigning a vector to a list is probing with nprobe = 1.

Q queries, L lists, P probes, d dim, K candidates per query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import metric as metrics
from .chunking import in_chunks
from .codec import Codes
from .kernels import Kernel, kernel_for
from .rescore import rescore
from .row_codes import as_float
from .select import best_positions
from .workspace import Workspace

_CHUNK_SCORES = 1 << 20  # scores computed at a time: 4 MiB stays in cache, where reading them again is cheap


class Coarse(NamedTuple):
    """The coarse quantizer: centroids, and the tensors that are derived from them once."""

    centroids: Tensor  # (L, d) float32
    relative: Tensor  # (L, d) float32, relative to the origin
    bias: Tensor  # (L,) float32, or (0,); see metric.row_bias
    origin: Tensor  # (d,) float32
    codes: Codes | None = None  # of the centroids as one list, for a kernel

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        own = sum(tensor.nbytes for tensor in (self.centroids, self.relative, self.bias, self.origin))
        return own + (self.codes.bytes if self.codes else 0)


def coarse_of(centroids: Tensor, metric: str, origin: Tensor | None = None) -> Coarse:
    """The coarse quantizer of centroids (L, d), relative to `origin` (d,) or to their median."""
    origin = metrics.origin_of(centroids, metric) if origin is None else origin
    bias = metrics.row_bias(centroids, origin, metric)
    return Coarse(centroids, centroids - origin, bias, origin)


def probe(
    x: Tensor, coarse: Coarse, nprobe: int, metric: str, kernel: Kernel | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest lists of each query, nearest first: exact scores and list numbers, both (Q, P), P = min(nprobe, L).

    x (Q, d) float32, finite, *not* relative to the origin. This is a search among the centroids: they are ranked in
    float32, and ranked again in float64 for queries where rounding or overflow could change which lists are chosen.
    Which these are is read back from the device; on an accelerator, few scores are ranked in float64 at once instead.
    A kernel, if there is one, is used in every search mode, so that the lists do not depend on the mode.
    """
    nprobe = min(nprobe, coarse.centroids.shape[0])
    if coarse.centroids.shape[0] == 1 and nprobe:
        return x.new_zeros(x.shape[0], 1), torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    if kernel is not None and nprobe and kernel.serves(coarse.centroids):
        return kernel.probe(x, coarse, nprobe, metric)
    # MPS has no float64.
    if x.device.type not in ("cpu", "mps") and x.shape[0] * coarse.centroids.shape[0] <= _CHUNK_SCORES:
        return _probe_in_float64(x, coarse, nprobe, metric)  # all of them at once: nothing is read back
    scores, lists, uncertified = _probe_in_float32(x, coarse, nprobe, nprobe + 1 + nprobe // 4, metric)
    if bool(uncertified.any()):
        scores[uncertified], lists[uncertified] = _probe_in_float64(x[uncertified], coarse, nprobe, metric)
    return scores, lists


def probe_by_ranking(x: Tensor, coarse: Coarse, nprobe: int, metric: str) -> tuple[Tensor, Tensor]:
    """`probe` in operations of static shapes, for graphs: ranking scores and lists (Q, P), not certified."""
    if coarse.centroids.shape[0] == 1 and nprobe:
        return x.new_zeros(x.shape[0], 1), torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    return best_positions(_ranking(metrics.shift(x, coarse.origin, metric), coarse, None), nprobe)


def nearest_lists(rows: Tensor, coarse: Coarse, metric: str) -> Tensor:
    """The list (n,) of each stored row (n, ...): that of the centroid nearest to its vector."""
    kernel, d = kernel_for(rows.new_empty(0, dtype=torch.float32)), coarse.centroids.shape[1]
    return in_chunks(lambda part: probe(as_float(part, d), coarse, 1, metric, kernel)[1][:, 0], 1 << 14, rows)


def nearest_by_ranking(x: Tensor, coarse: Coarse) -> tuple[Tensor, Tensor]:
    """The list of highest ranking score of each row x (Q, d) *relative to the origin*: scores and lists (Q,).

    Not certified: of two lists whose scores differ by rounding errors, either may be returned, which k-means allows.
    """
    kernel = kernel_for(x)
    if kernel is not None and kernel.serves(coarse.relative):
        scores, lists = kernel.nearest(x, coarse.relative, coarse.bias, 1)
        if bool(((lists >= 0) & scores.isfinite()).all()):  # false if a score overflowed
            return scores[:, 0], lists[:, 0]
    memory = Workspace(x.device)

    def best(chunk: Tensor) -> tuple[Tensor, Tensor]:
        return _ranking(chunk, coarse, memory).max(1)

    return in_chunks(best, _step(coarse), x)


def _probe_in_float32(
    x: Tensor, coarse: Coarse, nprobe: int, candidates: int, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`probe` in float32 operations, and the queries (Q,) whose lists are not certified.

    `candidates` is how many centroids per query are scored exactly.
    """
    memory = Workspace(x.device)
    candidates = min(candidates, coarse.centroids.shape[0])

    def best(chunk: Tensor) -> tuple[Tensor, Tensor]:
        ranking = _ranking(metrics.shift(chunk, coarse.origin, metric), coarse, memory)
        return best_positions(ranking.nan_to_num_(nan=-torch.inf), candidates)

    ranking, nearest = in_chunks(best, _step(coarse), x)
    if not metrics.by_differences(metric):
        return ranking[:, :nprobe], nearest[:, :nprobe], ~ranking[:, :nprobe].isfinite().all(1)
    scores, lists = rescore(x, coarse.centroids, nearest, nprobe, metric)
    uncertified = (lists < 0).any(1)
    if candidates < coarse.centroids.shape[0] and nprobe:
        uncertified |= metrics.uncertified(x, coarse.origin, ranking[:, -1], scores[:, -1], relative=True)
    return scores, lists, uncertified


def _step(coarse: Coarse) -> int:
    """Queries whose scores are computed at a time."""
    return max(1, _CHUNK_SCORES // max(1, coarse.centroids.shape[0]))


def _ranking(y: Tensor, coarse: Coarse, memory: Workspace | None) -> Tensor:
    """Ranking scores (Q, L) of the centroids for queries relative to the origin.

    Written to `memory` if given: newly allocated memory for each chunk fragments the heap (training 1,600 lists on
    400 MB grew to 2.4 GB at times).
    """
    out = None if memory is None else memory.take(y.shape[0], coarse.relative.shape[0])
    if coarse.bias.shape[0]:
        return torch.addmm(coarse.bias, y, coarse.relative.t(), out=out)
    return torch.mm(y, coarse.relative.t(), out=out)


def _probe_in_float64(x: Tensor, coarse: Coarse, nprobe: int, metric: str) -> tuple[Tensor, Tensor]:
    """`probe` in float64, where no square of a float32 number overflows."""

    def best(chunk: Tensor) -> tuple[Tensor, Tensor]:
        queries, centroids = chunk.double(), coarse.centroids.double()
        if metrics.by_differences(metric):
            distances = torch.cdist(queries, centroids, compute_mode="donot_use_mm_for_euclid_dist")
            scores = distances.square().neg()
        else:
            scores = queries @ centroids.t()
        nearest, lists = scores.topk(nprobe, dim=1)
        return nearest.float(), lists

    return in_chunks(best, _step(coarse), x)
