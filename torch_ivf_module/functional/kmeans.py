"""Training centroids: Lloyd's k-means on a sample; empty clusters are refilled by splitting others, as in faiss.

N rows, L lists, d dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._arrays import finite_in_dtype, floats
from . import metric as metrics
from .probe import Coarse, coarse_of, nearest_by_ranking

_SPLIT = 1.0 / 1024  # distance of the halves of a split cluster, relative to its spread (in faiss: to its mean)
_ROUNDING = 4 * torch.finfo(torch.float32).eps  # relative error of the mean of equal rows, at most
_CHUNK = 1 << 20  # numbers of the rows that are assigned, or converted to float64, at a time


class RowShard(NamedTuple):
    """The position of one process's rows among those of all processes that train together."""

    first: int  # number of its first row
    total: int  # rows of all processes
    add: Callable[[Tensor], Tensor]  # the sum of a tensor over all processes

    @classmethod
    def alone(cls, x: Tensor) -> RowShard:
        """The shard of a process that has all rows, x."""
        return cls(0, x.shape[0], lambda tensor: tensor)

    def has(self, x: Tensor, wanted: Tensor) -> Tensor:
        """Whether the rows with the numbers `wanted` (n,) are in x, the rows of this process: bool (n,)."""
        return (wanted >= self.first) & (wanted < self.first + x.shape[0])

    def rows(self, x: Tensor, wanted: Tensor) -> Tensor:
        """The rows with the numbers `wanted` (n,), from the processes that have them: (n, d) float32."""
        local = self.has(x, wanted)
        rows = torch.zeros(wanted.shape[0], x.shape[1], dtype=torch.float32, device=x.device)
        rows[local] = x[wanted[local] - self.first].float()
        return self.add(rows)  # each row is zero in all processes but one


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
    shard: RowShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Fit `nlist` centroids to rows `x` (N, d) by Lloyd's k-means; empty clusters are refilled as in faiss.

    x may be a tensor of any float dtype, an array, or a list of rows.

    At most ``max_points_per_centroid * nlist`` sampled rows are used. For ip and cosine the centroids have unit length.
    The global random state is neither used nor changed. `generator` (on the CPU) replaces `seed`. `start` (nlist, d)
    are the initial centroids; by default they are random rows.

    Returns the centroids (nlist, d) float32 and the objective of each iteration (niter,) float32: the sum of
    squared distances to the assigned centroids for l2, the sum of their products with the rows otherwise.

    With a `shard`, x are the rows of one of several processes, which all make the same call. The sample and the initial
    centroids are those of one process with all rows. Only the order of summation differs, and so the rounding.

    Raises ValueError for fewer rows than centroids, rows that are not finite in float32, a wrong shape or an unknown
    metric; TypeError for rows that are not floats or not dense.

    >>> centroids, objective = kmeans(torch.rand(200, 8), 4)
    >>> centroids.shape
    torch.Size([4, 8])
    """
    if nlist < 1:
        raise ValueError(f"nlist must be >= 1, got {nlist}")
    metrics.check_metric(metric)
    x = _checked(x, "x").detach()
    shard = RowShard.alone(x) if shard is None else shard
    if shard.total < nlist:
        raise ValueError(f"x has {shard.total} rows, but {nlist} centroids need at least {nlist}")
    if start is not None:
        start = _checked(start, "start").detach()
        if start.shape != (nlist, x.shape[1]):
            raise ValueError(f"start must have shape ({nlist}, {x.shape[1]}), got {tuple(start.shape)}")
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
    sample, rows = _sampled(x, shard, max_points_per_centroid * nlist, generator)
    if start is None:
        first = torch.randperm(sample.shape[0], generator=generator, device="cpu")[:nlist].to(x.device)
        start = shard.rows(x, sample[first])
    centroids = metrics.on_sphere(start, metric)
    origin = metrics.origin_of(shard.rows(x, sample[:: metrics.origin_step(sample.shape[0])]), metric)
    objective = []
    for _ in progress(range(niter)):
        assigned, value = _assigned(rows, coarse_of(centroids, metric, origin), metric)
        objective.append(value)
        centroids = _improved(rows, assigned, centroids, metric, generator, shard.add)
    return centroids, shard.add(torch.stack(objective)) if objective else rows.new_zeros(0)


def _checked(x: object, name: str) -> Tensor:
    """x as a tensor (N, d) of finite floats, float64 converted to float32."""
    tensor = floats(x, name)
    if tensor.dim() != 2 or tensor.shape[1] == 0:
        raise ValueError(f"{name} must have shape (n, d), got {tuple(tensor.shape)}")
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    finite_in_dtype(tensor, name)
    return tensor


def sampled(total: int, most: int, generator: torch.Generator) -> Tensor:
    """The ascending numbers (S,) of at most `most` of `total` rows, on the CPU: all, or a random one of each of `most`
    consecutive ranges of equal length, which takes no memory for the other rows.

    >>> sampled(3, 5, torch.Generator()), sampled(100, 5, torch.Generator()).div(20, rounding_mode="floor")
    (tensor([0, 1, 2]), tensor([0, 1, 2, 3, 4]))
    """
    if total <= most:
        return torch.arange(total, device="cpu")
    edges = torch.arange(most + 1, device="cpu") * total // most
    within = torch.rand(most, dtype=torch.float64, generator=generator, device="cpu")
    return edges[:-1] + (within * edges.diff()).long()


def _sampled(x: Tensor, shard: RowShard, most: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The numbers of the sampled rows (S,), and those of these rows that are in x, (n, d) float32."""
    sample = sampled(shard.total, most, generator).to(x.device)
    if sample.shape[0] == shard.total:
        return sample, x.float()
    return sample, x[sample[shard.has(x, sample)] - shard.first].float()


def _assigned(rows: Tensor, coarse: Coarse, metric: str) -> tuple[Tensor, Tensor]:
    """The cluster of each row (N,), and the objective ()."""
    assigned = torch.empty(rows.shape[0], dtype=torch.int64, device=rows.device)
    objective = rows.new_zeros(())
    for chunk, found in _chunks(rows, assigned):
        shifted = metrics.shift(chunk, coarse.origin, metric)
        best, lists = nearest_by_ranking(shifted, coarse)
        found.copy_(lists)  # kept lists of chunks would lie between freed blocks, which could not be used again
        objective += metrics.clustering_objective(shifted, best, metric)
    return assigned, objective


def _improved(
    rows: Tensor,
    assigned: Tensor,
    centroids: Tensor,
    metric: str,
    generator: torch.Generator,
    add: Callable[[Tensor], Tensor],
) -> Tensor:
    """The mean of the rows of each cluster (L, d). An empty cluster takes half of another if one can be split, else it
    keeps its centroid."""
    counts = add(torch.bincount(assigned, minlength=centroids.shape[0]))
    means = add(_sums(rows, assigned, centroids)) / counts.clamp(min=1)[:, None]
    empty = torch.nonzero(counts == 0)[:, 0]
    if empty.shape[0] == 0:
        return metrics.on_sphere(means, metric)
    means[empty] = centroids[empty]
    means = metrics.on_sphere(means, metric)
    spread = (add(_squares(rows, assigned, means, metric)) / counts.clamp(min=1)).sqrt()
    # A cluster of equal rows is not split, since all of them would be assigned to the same half.
    weights = (counts - 1).clamp(min=0).double().masked_fill_(spread == 0, 0)
    return metrics.on_sphere(_split(means, spread, weights.cpu(), empty, generator), metric)


def _chunks(rows: Tensor, assigned: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and their clusters, some at a time."""
    return zip(rows.split(_chunk_rows(rows)), assigned.split(_chunk_rows(rows)), strict=True)


def _chunk_rows(rows: Tensor) -> int:
    """How many of the rows (N, d) are in hand at a time."""
    return max(1, _CHUNK // rows.shape[1])


def _sums(rows: Tensor, assigned: Tensor, centroids: Tensor) -> Tensor:
    """The sum of the rows of each cluster (L, d).

    Summed in float64, so that the mean of equal rows is their value up to rounding; returned in float32, which halves
    what processes send to each other.
    """
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    for chunk, clusters in _chunks(rows, assigned):
        sums.index_add_(0, clusters, chunk.double())
    return sums.float()


def _squares(rows: Tensor, assigned: Tensor, means: Tensor, metric: str) -> Tensor:
    """The sum of squared distances of the rows of each cluster from its mean (L,) float64.

    Differences that may be due to rounding count as zero.
    """
    sums = torch.zeros(means.shape[0], dtype=torch.float64, device=means.device)
    for chunk, clusters in _chunks(rows, assigned):
        mean = means[clusters]
        differences = metrics.on_sphere(chunk, metric).double() - mean
        differences.masked_fill_(differences.abs() <= _ROUNDING * mean.abs(), 0)
        sums.index_add_(0, clusters, differences.square().sum(1))
    return sums


def _split(means: Tensor, spread: Tensor, weights: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """The means (L, d) with each `empty` cluster (E,) placed at one half of another, drawn by its weight (L,).

    As in faiss, the two halves move in opposite directions, but by a fraction of the spread (L,): a step relative to
    the mean would depend on where zero is. Each split has a random direction, so that a cluster that is split several
    times gives different centroids. A round draws one cluster for each empty one. A cluster that is drawn several
    times is split once; the empty clusters that remain are filled in the next round, of about log2(E) in all.
    Overwrites all tensors but `empty`.
    """
    while empty.shape[0] and bool((weights > 0).any()):
        drawn = torch.multinomial(weights, empty.shape[0], replacement=True, generator=generator).unique()
        weights[drawn] = (weights[drawn] - 1).clamp(min=0) / 2  # a cluster of one row cannot be split
        signs = torch.randint(2, (drawn.shape[0], means.shape[1]), dtype=torch.int8, generator=generator, device="cpu")
        drawn = drawn.to(means.device)
        filled, empty = empty[: drawn.shape[0]], empty[drawn.shape[0] :]
        old, width = means[drawn], spread[drawn]
        step = torch.maximum(2 * _ROUNDING * old.abs(), _SPLIT * width[:, None]) * (2 * signs.to(width) - 1)
        means[drawn], means[filled] = (old - step).float(), (old + step).float()
        weights[filled.cpu()], spread[filled] = weights[drawn.cpu()], width
    return means
