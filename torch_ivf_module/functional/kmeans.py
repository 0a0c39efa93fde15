"""Fitting centroids: Lloyd's k-means on a sample, empty clusters split, as faiss trains its coarse quantizer.

N rows, L lists, d dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import metric as metrics
from .probe import coarse_of, nearest_by_ranking

_SPLIT = 1.0 / 1024  # the relative step between the two halves of a split cluster, as in faiss


class Share(NamedTuple):
    """Which rows of all there are one process has, where several train together: those from `first` on."""

    first: int
    total: int
    add: Callable[[Tensor], Tensor]  # the sum of a tensor of every process

    @classmethod
    def alone(cls, x: Tensor) -> Share:
        """The share of a process that has all rows."""
        return cls(0, x.shape[0], lambda tensor: tensor)

    def has(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Which of the rows `wanted` (n,) of all are in x."""
        return (wanted >= self.first) & (wanted < self.first + x.shape[0])

    def rows(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Rows `wanted` (n,) of all, whoever has them: (n, d) float32."""
        mine = self.has(x, wanted)
        found = torch.zeros(wanted.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
        found[mine] = x[wanted[mine] - self.first].float()
        return self.add(found)  # but for one process they are zeros


def kmeans(
    x: Tensor,
    nlist: int,
    *,
    niter: int = 10,
    metric: str = "l2",
    max_points_per_centroid: int = 256,
    seed: int = 1234,
    generator: torch.Generator | None = None,
    start: Tensor | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    share: Share | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit `nlist` centroids to rows `x` (N, d): Lloyd (1982), random start, empty clusters split as faiss does.

    At most ``max_points_per_centroid * nlist`` sampled rows are used. For ip and cosine the centroids are kept at
    unit length. The global random state is not touched; a `generator` (a CPU one) goes before `seed`. `start`, where
    given, are centroids (nlist, d) to begin with instead of random rows.

    Returns the centroids (nlist, d) float32 and the objective of each iteration (niter,) float32: the sum of
    squared distances to the assigned centroids for l2, the sum of their products with the rows otherwise.

    With a `share`, x are the rows of one of several processes, all of which call this alike. Sample and start are then
    those of one process that has all rows; what differs is the order in which rows are summed, and so the rounding.

    Raises ValueError when there are fewer rows than centroids.

    >>> centroids, objective = kmeans(torch.rand(200, 8), 4)
    >>> centroids.shape
    torch.Size([4, 8])
    """
    if nlist < 1:
        raise ValueError(f"nlist must be >= 1, got {nlist}")
    share = Share.alone(x) if share is None else share
    if share.total < nlist:
        raise ValueError(f"x has {share.total} rows, but {nlist} centroids need at least {nlist}")
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
    x = x.detach()
    sample, rows = _sampled(x, share, max_points_per_centroid * nlist, generator)
    if start is None:
        first = torch.randperm(sample.shape[0], generator=generator, device="cpu")[:nlist].to(x.device)
        start = share.rows(x, sample[first])
    centroids = metrics.on_sphere(start, metric)
    origin = metrics.origin_of(share.rows(x, sample[:: metrics.origin_step(sample.shape[0])]), metric)
    shifted = metrics.shift(rows, origin, metric)
    objective = []
    for _ in progress(range(niter)):
        coarse = coarse_of(centroids, metric, origin)
        best, assigned = nearest_by_ranking(shifted, coarse)
        objective.append(metrics.clustering_objective(shifted, best, metric))
        centroids = metrics.on_sphere(_means(rows, assigned, centroids, generator, share.add), metric)
    return centroids, share.add(torch.stack(objective)) if objective else rows.new_zeros(0)


def _sampled(x: Tensor, share: Share, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of all rows are used (S,), at most so many, and those of them that x has (n, d) float32."""
    order = torch.randperm(share.total, generator=generator, device="cpu")
    if share.total <= most:
        return torch.arange(share.total, device=x.device), x.float()
    sample = order[:most].to(x.device)
    return sample, x[sample[share.has(x, sample)] - share.first].float()


def _means(
    rows: Tensor,
    assigned: Tensor,
    centroids: Tensor,
    generator: torch.Generator,
    add: Callable[[Tensor], Tensor],
) -> Tensor:
    """The mean of the rows of each cluster (L, d); a cluster without any takes half of a large one."""
    nlist = centroids.shape[0]
    counts = add(torch.bincount(assigned, minlength=nlist))
    means = add(torch.zeros_like(centroids).index_add_(0, assigned, rows)) / counts.clamp(min=1)[:, None]
    empty = torch.nonzero(counts == 0)[:, 0].tolist()
    weights = (counts - 1).clamp(min=0).double().cpu()
    for number in empty:
        if weights.sum() <= 0:  # no cluster has a row to spare: its old place is as good as any
            means[number] = centroids[number]
            continue
        large = int(torch.multinomial(weights, 1, generator=generator))
        step = torch.full_like(means[large], 1 + _SPLIT)
        step[::2] = 1 - _SPLIT
        means[number] = means[large] * step
        means[large] = means[large] * (2 - step)
        weights[large] = (weights[large] - 1).clamp(min=0) / 2  # halves of halves: below one there is none to spare
        weights[number] = weights[large]
    return means
