"""Scores, where higher is better for every metric. The only file that branches on the metric.

Q queries, N vectors, K candidates of one query, d dim.

Two kinds of score appear:

* the *ranking score* of a scan, ``<x - origin, v> + bias(v)``: one product and one addition. For l2 it is
  ``(|x - origin|^2 - |x - v|^2) / 2`` less a term that depends on the query alone, so it orders the vectors as
  the distance does. Taking the origin inside the data keeps the cancellation of the expanded square away from
  data that lies far from zero.
* the *exact score* of the few vectors that survive, computed from differences for l2; it is what users see.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

METRICS = ("l2", "ip", "cosine")
ORDERING = {"l2": "residual_norm_asc", "ip": "proj_desc", "cosine": "proj_desc"}  # see `centrality`
_SAMPLE = 256  # rows that decide the origin; a median of so many is within a tenth of a spread


def check_metric(metric: str) -> str:
    """Return `metric`, or raise ValueError naming the ones there are."""
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    return metric


def prepare(x: Tensor, metric: str) -> Tensor:
    """What is compared: `x` itself, or for cosine `x` at unit length, at least float32 (a zero row stays zero)."""
    if metric != "cosine":
        return x
    x = x if x.dtype == torch.float64 else x.float()
    # Dividing by the largest entry first keeps the square from overflowing or vanishing.
    largest = x.detach().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_ones(1)
    x = x / torch.where(largest > 0, largest, torch.ones_like(largest))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def on_sphere(centroids: Tensor, metric: str) -> Tensor:
    """Centroids as training keeps them: at unit length unless the metric is l2."""
    return centroids if metric == "l2" else prepare(centroids, "cosine")


def clustering_objective(shifted: Tensor, best: Tensor, metric: str) -> Tensor:
    """What k-means improves: the sum of squared distances (l2), or of products, to the assigned centroids.

    `best` (N,) are the ranking scores of rows `shifted` (N, d) against centroids relative to the same origin.
    """
    if metric != "l2":
        return best.sum()
    return (shifted.square().sum(1) - 2 * best).clamp(min=0).sum()


def origin_of(vectors: Tensor, metric: str) -> Tensor:
    """The origin (d,) of distances: a median, which outliers do not move; zero for ip and cosine."""
    if metric != "l2" or vectors.shape[0] == 0:
        return torch.zeros(vectors.shape[1], dtype=torch.float32, device=vectors.device)
    # Of an expanded tensor, whose rows share their memory, torch's median is garbage now and then.
    return vectors[:: origin_step(vectors.shape[0])].float().contiguous().median(dim=0).values


def origin_step(count: int) -> int:
    """The origin is that of every so many of `count` vectors, and of those alone is the same again."""
    return max(1, count // _SAMPLE)


def row_bias(vectors: Tensor, origin: Tensor, metric: str) -> Tensor:
    """The part of the ranking score that a vector brings along, (N,) float32; empty where there is none."""
    if metric != "l2":
        return torch.zeros(0, dtype=torch.float32, device=vectors.device)
    parts = [
        torch.cdist(part.float(), origin[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        for part in vectors.split(1 << 16)
    ]
    # -inf marks a row that a filter excludes. A square that overflows becomes the lowest finite number: a score that is
    # too high hides no row.
    return torch.cat(parts).square_().mul_(-0.5).clamp_(min=torch.finfo(torch.float32).min)


def by_differences(metric: str) -> bool:
    """Whether exact scores come from differences of vectors, and not from products."""
    return metric == "l2"


def exact_scores(x: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """Exact scores of `vectors` (Q, K, d) for `x` (Q, d): (Q, K), differentiable in `x`.

    l2: the negated squared distance. ip, cosine: the inner product. May overwrite `vectors`: fresh memory for the
    differences would cost a CPU more than the arithmetic.

    >>> exact_scores(torch.zeros(1, 2), torch.tensor([[[3.0, 4.0]]]), "l2")
    tensor([[-25.]])
    """
    if metric != "l2" or (torch.is_grad_enabled() and x.requires_grad):
        return differentiable_scores(x, vectors, metric)
    return vectors.sub_(x[:, None]).square_().sum(-1).neg_()


def differentiable_scores(x: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """`exact_scores` that overwrites nothing, for every kind of derivative with respect to `x`."""
    if metric != "l2":
        return torch.einsum("qd,qkd->qk", x, vectors)
    return -(x[:, None] - vectors).square().sum(-1)


def rounding(d: int) -> float:
    """No less than the error of a float32 sum of d products, relative to the product of the norms.

    Half a unit in the last place for each addition of a chain: libraries of matrix products sum at most about 512
    dimensions in one chain, and then such parts. Some more for the roundings of the factors and the bias.
    """
    return 2.0**-24 * (min(d, 512) + d // 512 + 24)


def needed_ranking(x: Tensor, origin: Tensor, score: Tensor, *, relative: bool = False) -> Tensor:
    """The ranking score (Q,) float32 that a row reaches if its exact l2 score exceeds `score` (Q,), with rounding.

    x (Q, d) are the queries before the origin is subtracted; `relative` says that the vectors were multiplied relative
    to the origin too. -inf where nothing can be said, so that every row counts.
    """
    y, o = shift(x, origin, "l2").double(), torch.zeros_like(origin) if relative else origin
    o = o.double()
    square, distance = y.square().sum(1), -score.double()
    size = square.sqrt()
    # Such a row lies within `reach` of the origin, and its norm is at most reach + |o|.
    reach = size + distance.sqrt()
    error = rounding(x.shape[1]) * (size * (reach + torch.linalg.vector_norm(o)) + reach.square())
    needed = ((square - distance) / 2 + y @ o - error).float()
    unknown = overflowing(x, origin) | distance.isinf()
    return torch.nextafter(needed, torch.full_like(needed, -math.inf)).masked_fill(unknown, -math.inf)


def overflowing(x: Tensor, origin: Tensor) -> Tensor:
    """Queries x (Q, d) whose ranking scores may overflow float32: bool (Q,).

    A row whose squared distance is finite lies within 2^64 of the query.
    """
    size = torch.linalg.vector_norm((x - origin).double(), dim=1)
    return ~(size * (size + 2.0**64 + torch.linalg.vector_norm(origin.double())) < 2.0**126)


def doubtful(x: Tensor, origin: Tensor, lowest: Tensor, kth: Tensor, *, relative: bool = False) -> Tensor:
    """Queries x (Q, d) for which, by l2, a row that a scan left out may be nearer than the k-th kept: bool (Q,).

    `lowest` (Q,) is what no ranking score left out exceeds, -inf where all rows were kept, and `kth` (Q,) the exact
    score of the k-th result. (For ip and cosine the exact score is the same product in another order of summation: it
    tells no more than the ranking score, and nothing is settled.)
    """
    reached = (lowest > -math.inf) & (lowest >= needed_ranking(x, origin, kth, relative=relative))
    return reached | overflowing(x, origin)


def centrality(vectors: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """How likely a vector is a result for whoever visits its list, (N,): what ORDERING names sorts by it.

    vectors, centroids (N, d): each vector and the centroid of its list. l2: less for one that lies farther from it,
    for in many dimensions the far ones are far from queries too; ip, cosine: the product with it.
    """
    if metric == "l2":
        return (vectors - centroids).square().sum(1).neg()
    return (vectors * centroids).sum(1)


def to_distance(scores: Tensor, metric: str) -> Tensor:
    """Exact scores to what users see: squared L2, inner product or cosine."""
    return -scores if metric == "l2" else scores


def to_score(distance: Tensor, metric: str) -> Tensor:
    """Exact scores of what users see; of radii, those that the results of a range search must exceed."""
    return -distance if metric == "l2" else distance


def range_threshold(x: Tensor, origin: Tensor, score: Tensor, vectors: Tensor, metric: str) -> Tensor:
    """The ranking score (Q,) that every row of `vectors` (N, d) reaches whose exact score exceeds `score` (Q,).

    Rounding is allowed for. x (Q, d) are the queries before the origin is subtracted.
    """
    if metric == "l2":
        return needed_ranking(x, origin, score)
    norms = [torch.linalg.vector_norm(part.double(), dim=1).amax() for part in vectors.split(1 << 14) if part.shape[0]]
    largest = torch.stack(norms).amax() if norms else origin.new_zeros((), dtype=torch.float64)
    slack = 2 * rounding(x.shape[1]) * largest * torch.linalg.vector_norm(x.double(), dim=1)
    return (score.double() - slack).float()


def shift(x: Tensor, origin: Tensor, metric: str) -> Tensor:
    """The queries as the scan multiplies them: relative to the origin for l2."""
    return x - origin if metric == "l2" else x
