"""Fitting centroids: Lloyd's k-means on a sample, empty clusters split, as faiss trains its coarse quantizer.

N rows, L lists, d dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._arrays import finite_in_dtype, floats
from . import metric as metrics
from .probe import coarse_of, nearest_by_ranking

_SPLIT = 1.0 / 1024  # how far the halves of a split cluster move apart, relative to its spread; faiss: to its mean
_ROUNDING = 4 * torch.finfo(torch.float32).eps  # how far equal rows may seem to be from their mean, relative to it
_PART = 1 << 14  # rows that are held in float64 at a time


class RowShard(NamedTuple):
    """Which rows of all there are one process has, where several train together: those from `first` on."""

    first: int
    total: int
    add: Callable[[Tensor], Tensor]  # the sum of a tensor of every process

    @classmethod
    def alone(cls, x: Tensor) -> RowShard:
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
    share: RowShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit `nlist` centroids to rows `x` (N, d): Lloyd (1982), random start, empty clusters split as faiss does.

    x may be a tensor of any float dtype, an array, or a list of rows.

    At most ``max_points_per_centroid * nlist`` sampled rows are used. For ip and cosine the centroids are kept at
    unit length. The global random state is not touched; a `generator` (a CPU one) goes before `seed`. `start`, where
    given, are centroids (nlist, d) to begin with instead of random rows.

    Returns the centroids (nlist, d) float32 and the objective of each iteration (niter,) float32: the sum of
    squared distances to the assigned centroids for l2, the sum of their products with the rows otherwise.

    With a `share`, x are the rows of one of several processes, all of which call this alike. Sample and start are then
    those of one process that has all rows; what differs is the order in which rows are summed, and so the rounding.

    Raises ValueError for fewer rows than centroids, rows that float32 does not hold as finite numbers, another shape
    or an unknown metric; TypeError for rows that are not floats or not dense.

    >>> centroids, objective = kmeans(torch.rand(200, 8), 4)
    >>> centroids.shape
    torch.Size([4, 8])
    """
    if nlist < 1:
        raise ValueError(f"nlist must be >= 1, got {nlist}")
    metrics.check_metric(metric)
    x = _checked(x, "x").detach()
    share = RowShard.alone(x) if share is None else share
    if share.total < nlist:
        raise ValueError(f"x has {share.total} rows, but {nlist} centroids need at least {nlist}")
    if start is not None:
        start = _checked(start, "start").detach()
        if start.shape != (nlist, x.shape[1]):
            raise ValueError(f"start must have shape ({nlist}, {x.shape[1]}), got {tuple(start.shape)}")
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
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
        centroids = _improved(rows, assigned, centroids, metric, generator, share.add)
    return centroids, share.add(torch.stack(objective)) if objective else rows.new_zeros(0)


def _checked(x: object, name: str) -> Tensor:
    """Rows (N, d) of finite floats: float64 as the float32 that they are compared in."""
    tensor = floats(x, name)
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must have shape (n, d), got {tuple(tensor.shape)}")
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    finite_in_dtype(tensor, name)
    return tensor


def _sampled(x: Tensor, share: RowShard, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which of all rows are used (S,), at most so many, and those of them that x has (n, d) float32."""
    order = torch.randperm(share.total, generator=generator, device="cpu")
    if share.total <= most:
        return torch.arange(share.total, device=x.device), x.float()
    sample = order[:most].to(x.device)
    return sample, x[sample[share.has(x, sample)] - share.first].float()


def _improved(
    rows: Tensor,
    assigned: Tensor,
    centroids: Tensor,
    metric: str,
    generator: torch.Generator,
    add: Callable[[Tensor], Tensor],
) -> Tensor:
    """The mean of the rows of each cluster (L, d); an empty one takes a half of another, or else keeps its centroid."""
    counts = add(torch.bincount(assigned, minlength=centroids.shape[0]))
    means = add(_sums(rows, assigned, centroids)) / counts.clamp(min=1)[:, None]
    empty = torch.nonzero(counts == 0)[:, 0]
    if empty.shape[0] == 0:
        return metrics.on_sphere(means, metric)
    means[empty] = centroids[empty]
    means = metrics.on_sphere(means, metric)
    spread = (add(_squares(rows, assigned, means, metric)) / counts.clamp(min=1)).sqrt()
    # Equal rows all go to the same half, so a cluster of them is not split.
    weights = (counts - 1).clamp(min=0).double().masked_fill_(spread == 0, 0)
    return metrics.on_sphere(_split(means, spread, weights.cpu(), empty, generator), metric)


def _parts(rows: Tensor, assigned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(rows.split(_PART), assigned.split(_PART), strict=True)


def _sums(rows: Tensor, assigned: Tensor, centroids: Tensor) -> Tensor:
    """The sum of the rows of each cluster (L, d): made in float64, so that of equal rows the mean is their value but
    for rounding; float32, which is half as much to send."""
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    for part, clusters in _parts(rows, assigned):
        sums.index_add_(0, clusters, part.double())
    return sums.float()


def _squares(rows: Tensor, assigned: Tensor, means: Tensor, metric: str) -> Tensor:
    """The sum of squared distances from the rows of each cluster to its mean (L,) float64; rounding counts as zero."""
    sums = torch.zeros(means.shape[0], dtype=torch.float64, device=means.device)
    for part, clusters in _parts(rows, assigned):
        mean = means[clusters]
        apart = metrics.on_sphere(part, metric).double() - mean
        apart.masked_fill_(apart.abs() <= _ROUNDING * mean.abs(), 0)
        sums.index_add_(0, clusters, apart.square().sum(1))
    return sums


def _split(means: Tensor, spread: Tensor, weights: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """The means (L, d) with each of the `empty` clusters (E,) at one half of another, drawn by its weight (L,).

    As in faiss, both halves move, to opposite sides, but by a part of the spread (L,): a step relative to the mean
    would depend on where zero is. Each split has a random direction, so that a cluster that is split several times
    falls into as many parts. All draws are made at once. A cluster that is drawn several times is split once, and what
    is left of its draws is drawn again from the halves: about log2(E) rounds. All tensors but `empty` are overwritten.
    """
    while empty.shape[0] and bool((weights > 0).any()):
        drawn = torch.multinomial(weights, empty.shape[0], replacement=True, generator=generator).unique()
        weights[drawn] = (weights[drawn] - 1).clamp(min=0) / 2  # of halves of halves: below one there is none to spare
        signs = torch.randint(2, (drawn.shape[0], means.shape[1]), dtype=torch.int8, generator=generator, device="cpu")
        drawn = drawn.to(means.device)
        fresh, empty = empty[: drawn.shape[0]], empty[drawn.shape[0] :]
        old, width = means[drawn], spread[drawn]
        step = torch.maximum(2 * _ROUNDING * old.abs(), _SPLIT * width[:, None]) * (2 * signs.to(width) - 1)
        means[drawn], means[fresh] = (old - step).float(), (old + step).float()
        weights[fresh.cpu()], spread[fresh] = weights[drawn.cpu()], width
    return means
