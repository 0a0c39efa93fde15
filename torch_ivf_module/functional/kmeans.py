"""Fitting centroids: Lloyd's k-means on a sample, empty clusters split, as faiss trains its coarse quantizer.

N rows, L lists, d dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from . import metric as metrics
from .probe import coarse_of, probe

_SPLIT = 1.0 / 1024  # the relative step between the two halves of a split cluster, as in faiss


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
) -> tuple[Tensor, Tensor]:
    """Fit `nlist` centroids to rows `x` (N, d): Lloyd (1982), random start, empty clusters split as faiss does.

    At most ``max_points_per_centroid * nlist`` sampled rows are used. For ip and cosine the centroids are kept at
    unit length. The global random state is not touched; a `generator` (a CPU one) goes before `seed`. `start`, where
    given, are centroids (nlist, d) to begin with instead of random rows.

    Returns the centroids (nlist, d) float32 and the objective of each iteration (niter,) float32: the sum of
    squared distances to the assigned centroids for l2, the sum of their products with the rows otherwise.

    Raises ValueError when there are fewer rows than centroids.

    >>> centroids, objective = kmeans(torch.rand(200, 8), 4)
    >>> centroids.shape
    torch.Size([4, 8])
    """
    if nlist < 1:
        raise ValueError(f"nlist must be >= 1, got {nlist}")
    if x.shape[0] < nlist:
        raise ValueError(f"x has {x.shape[0]} rows, but {nlist} centroids need at least {nlist}")
    if generator is None:
        generator = torch.Generator(device="cpu").manual_seed(seed)
    x = x.detach()
    order = torch.randperm(x.shape[0], generator=generator, device="cpu")
    most = max_points_per_centroid * nlist
    rows = (x[order[:most].to(x.device)] if x.shape[0] > most else x).float()
    if start is None:
        start = rows[torch.randperm(rows.shape[0], generator=generator, device="cpu")[:nlist].to(x.device)]
    centroids = metrics.on_sphere(start, metric)
    origin = metrics.origin_of(rows, metric)
    shifted = metrics.shift(rows, origin, metric)
    objective = []
    for _ in progress(range(niter)):
        coarse = coarse_of(centroids, metric, origin)
        best, assigned = probe(shifted, coarse, 1)
        objective.append(metrics.clustering_objective(shifted, best[:, 0], metric))
        centroids = metrics.on_sphere(_means(rows, assigned[:, 0], centroids, generator), metric)
    return centroids, torch.stack(objective) if objective else torch.zeros(0, dtype=torch.float32, device=x.device)


def _means(rows: Tensor, assigned: Tensor, centroids: Tensor, generator: torch.Generator) -> Tensor:
    """The mean of the rows of each cluster (L, d); a cluster without any takes half of a large one."""
    nlist = centroids.shape[0]
    counts = torch.bincount(assigned, minlength=nlist)
    means = torch.zeros_like(centroids).index_add_(0, assigned, rows) / counts.clamp(min=1)[:, None]
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
        weights[large] = (weights[large] - 1) / 2
        weights[number] = weights[large]
    return means
