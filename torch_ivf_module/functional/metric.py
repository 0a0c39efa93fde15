"""Scores, where higher is better for every metric. The only file that branches on the metric.

Q queries, N vectors, K candidates of one query, d dim.

Two kinds of score appear:

* the *ranking score* of a scan, ``<x - origin, v> + bias(v)``: one product and one addition. For l2 it is
  ``(|x - origin|^2 - |x - v|^2) / 2`` minus a term that depends on the query alone, so it orders the vectors as
  the distance does. An origin within the data avoids the cancellation of the expanded square where data lies far
  from zero.
* the *exact score* of the candidates of a scan, for l2 computed from differences; it is what users see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .row_codes import as_float

METRICS = ("l2", "ip", "cosine")
ORDERING = {"l2": "residual_norm_asc", "ip": "proj_desc", "cosine": "proj_desc"}  # the names of `centrality`
_BIAS_ROWS = 1 << 12  # whose bias is computed at a time: where they have to be converted, 2 MiB of 128 dimensions
_SAMPLE = 256  # rows whose median is the origin; it is within a tenth of a standard deviation of that of all rows


def check_metric(metric: str) -> str:
    """Return `metric`, or raise a ValueError that names all metrics."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    return metric


def prepare(x: Tensor, metric: str) -> Tensor:
    """The vectors that the metric compares: `x` itself; for cosine `x` at unit length, at least float32.

    A zero row stays zero.
    """
    if metric != "cosine":
        return x
    x = x if x.dtype == torch.float64 else x.float()
    # Dividing by the largest entry first keeps the squares from overflow and underflow.
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(1)
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def on_sphere(centroids: Tensor, metric: str) -> Tensor:
    """Centroids at unit length, or unchanged if the metric is l2."""
    return centroids if metric == "l2" else prepare(centroids, "cosine")


def clustering_objective(shifted: Tensor, best: Tensor, metric: str) -> Tensor:
    """The objective of k-means: the sum of squared distances to the assigned centroids (l2), or of products with them.

    `best` (N,) are the ranking scores of rows `shifted` (N, d) against centroids relative to the same origin.
    """
    if metric != "l2":
        return best.sum()
    return (shifted.square().sum(1) - 2 * best).clamp(min=0).sum()


def origin_of(vectors: Tensor, metric: str) -> Tensor:
    """The origin (d,) of distances: a median, which outliers do not move; zero for ip and cosine."""
    if metric != "l2" or vectors.shape[0] == 0:
        return torch.zeros(vectors.shape[1], dtype=torch.float32, device=vectors.device)
    # Contiguous, because torch's median of an expanded tensor, whose rows share their memory, is sometimes wrong.
    return vectors[:: origin_step(vectors.shape[0])].float().contiguous().median(dim=0).values


def origin_step(count: int) -> int:
    """The step of the slice of `count` vectors v that decides the origin: ``origin_of(v[::step])`` is the same."""
    return max(1, count // _SAMPLE)


def row_bias(rows: Tensor, origin: Tensor, metric: str) -> Tensor:
    """The term of the ranking score that depends on the vector alone, (N,) float32; (0,) if the metric has none."""
    if metric != "l2":
        return torch.zeros(0, dtype=torch.float32, device=rows.device)
    d = origin.shape[0]
    norms = [
        torch.cdist(as_float(chunk, d), origin[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        for chunk in rows.split(_BIAS_ROWS)
    ]
    # -inf would mean that a filter excludes the row, so a square that overflows becomes the lowest finite number. The
    # ranking score is then too high, which makes the row a candidate and cannot lose it.
    return torch.cat(norms).square_().mul_(-0.5).clamp_(min=torch.finfo(torch.float32).min)


def by_differences(metric: str) -> bool:
    """Whether exact scores are computed from differences of vectors, not from products."""
    return metric == "l2"


def exact_scores(x: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """Exact scores of `vectors` (Q, K, d) for `x` (Q, d): (Q, K), differentiable in `x`.

    l2: the negated squared distance. ip, cosine: the inner product. May overwrite `vectors`: on a CPU, allocating
    memory for the differences would take longer than the arithmetic.

    >>> exact_scores(torch.zeros(1, 2), torch.tensor([[[3.0, 4.0]]]), "l2")
    tensor([[-25.]])
    """
    if metric != "l2" or (torch.is_grad_enabled() and x.requires_grad):
        return differentiable_scores(x, vectors, metric)
    return vectors.sub_(x[:, None]).square_().sum(-1).neg_()


def differentiable_scores(x: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """`exact_scores` without in-place operations, for every kind of derivative with respect to `x`."""
    if metric != "l2":
        return torch.einsum("qd,qkd->qk", x, vectors)
    return -(x[:, None] - vectors).square().sum(-1)


def distance_gradient(x: Tensor, vectors: Tensor, weights: Tensor, metric: str) -> Tensor:
    """The gradient (Q, d), with respect to queries x (Q, d), of the sum of `weights` (Q, K) times distances (Q, K).

    The distances are those of `to_distance`, of x to `vectors` (Q, K, d); x is float32 and not prepared.
    """
    if metric == "l2":
        return 2 * (weights[..., None] * (x[:, None] - vectors)).sum(1)
    gradient = torch.einsum("qk,qkd->qd", weights, vectors)
    if metric == "cosine":  # the gradient with respect to x / |x|, less its part along x, divided by |x|
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        unit = x / norm
        gradient = (gradient - (gradient * unit).sum(1, keepdim=True) * unit) / norm
    return gradient


def rounding(d: int) -> float:
    """A bound of the error of a float32 sum of d products, relative to the product of the norms.

    Half a unit in the last place for each addition: matrix product libraries add at most about 512 dimensions one after
    another, and then add these partial sums. 24 more for the rounding of the factors and of the bias.
    """
    return 2.0**-24 * (min(d, 512) + d // 512 + 24)


def _underflow(d: int) -> float:
    """No less than the error of a score by numbers below the smallest normal one, whose errors are not relative."""
    return (d + 4) * 2.0**-126


def needed_ranking(x: Tensor, origin: Tensor, score: Tensor, *, relative: bool = False) -> Tensor:
    """A lower bound (Q,) float32 of the rounded ranking score of every row whose exact l2 score exceeds `score` (Q,).

    x (Q, d) are the queries before the origin is subtracted. `relative` says that the stored vectors are relative to
    the origin too. The bound is -inf if scores may overflow, so that every row reaches it.
    """
    y, o = shift(x, origin, "l2").double(), torch.zeros_like(origin) if relative else origin
    o = o.double()
    square, distance = y.square().sum(1), -score.double()
    size = square.sqrt()
    # Such a row lies within `reach` of the origin, and its norm is at most reach + |o|.
    reach = size + distance.sqrt()
    error = rounding(x.shape[1]) * (size * (reach + torch.linalg.vector_norm(o)) + reach.square())
    error = error + _underflow(x.shape[1])
    needed = ((square - distance) / 2 + y @ o - error).float()
    unknown = overflowing(x, origin) | distance.isinf()
    return torch.nextafter(needed, torch.full_like(needed, -math.inf)).masked_fill(unknown, -math.inf)


def overflowing(x: Tensor, origin: Tensor) -> Tensor:
    """Queries x (Q, d) whose ranking scores may overflow float32: bool (Q,).

    A row whose squared distance is finite lies within 2^64 of the query.
    """
    size = torch.linalg.vector_norm((x - origin).double(), dim=1)
    return ~(size * (size + 2.0**64 + torch.linalg.vector_norm(origin.double())) < 2.0**126)


def uncertified(x: Tensor, origin: Tensor, lowest: Tensor, kth: Tensor, *, relative: bool = False) -> Tensor:
    """Queries x (Q, d) for which, by l2, a row that is no candidate may be nearer than the k-th result: bool (Q,).

    `lowest` (Q,) is an upper bound of the ranking scores of all rows that are no candidates, -inf if there are none;
    `kth` (Q,) is the exact score of the k-th result. (For ip and cosine the exact score is the same product in another
    order of summation, no more precise than the ranking score. There a second pass could not improve the answer.)
    """
    reached = (lowest > -math.inf) & (lowest >= needed_ranking(x, origin, kth, relative=relative))
    return reached | overflowing(x, origin)


def centrality(vectors: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """How likely a vector is a result of a query that probes its list, (N,); the orderings in ORDERING sort by it.

    vectors, centroids (N, d): each vector and the centroid of its list. l2: the negated squared distance of the two,
    since in many dimensions vectors far from the centroid are far from most queries too; ip, cosine: their product.
    """
    if metric == "l2":
        return (vectors - centroids).square().sum(1).neg()
    return (vectors * centroids).sum(1)


def to_distance(scores: Tensor, metric: str) -> Tensor:
    """Exact scores as users see them: squared L2 distance, inner product or cosine."""
    return -scores if metric == "l2" else scores


def to_score(distance: Tensor, metric: str) -> Tensor:
    """The exact score of a distance that users see, or of a radius: the results of a range search exceed it."""
    return -distance if metric == "l2" else distance


def range_threshold(x: Tensor, origin: Tensor, score: Tensor, rows: Tensor, metric: str) -> Tensor:
    """A lower bound (Q,) of the rounded ranking score of every one of the rows (N, ...) whose exact score exceeds
    `score` (Q,). x (Q, d) are the queries before the origin is subtracted.
    """
    if metric == "l2":
        return needed_ranking(x, origin, score)
    chunks = [chunk for chunk in rows.split(1 << 14) if chunk.shape[0]]
    norms = [torch.linalg.vector_norm(as_float(chunk, x.shape[1]).double(), dim=1).amax() for chunk in chunks]
    largest = torch.stack(norms).amax() if norms else origin.new_zeros((), dtype=torch.float64)
    slack = 2 * rounding(x.shape[1]) * largest * torch.linalg.vector_norm(x.double(), dim=1)
    return (score.double() - slack - _underflow(x.shape[1])).float()


def shift(x: Tensor, origin: Tensor, metric: str) -> Tensor:
    """The queries that a scan multiplies with the vectors: for l2 relative to the origin, else unchanged."""
    return x - origin if metric == "l2" else x
