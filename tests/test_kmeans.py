"""k-means: objective, determinism, empty clusters, degenerate data, input."""

from __future__ import annotations

import re

import pytest
import torch

from tests.datasets import normal
from tests.oracle import unit
from tests.problems import METRICS, each_metric
from torch_ivf_module.functional import kmeans


def blobs(count=12, each=50, d=8, seed=0):
    centres = normal(count, d, seed=seed) * 6
    return centres.repeat_interleave(each, 0) + normal(count * each, d, seed=seed + 1)


def objective_of(x, centroids, metric):
    """The objective of k-means in float64: a sum of squared distances, or of inner products."""
    x, centroids = x.double(), centroids.double()
    if metric == "l2":
        return float(
            torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1).sum()
        )
    return float((x @ centroids.T).amax(1).sum())


@pytest.mark.parametrize(
    "make", [lambda: normal(600, 8), blobs, lambda: blobs() + 1000], ids=["noise", "blobs", "far"]
)
@each_metric
def test_the_objective_never_gets_worse(make, metric):
    x = make()
    centroids, objective = kmeans(x, 12, niter=12, metric=metric)
    assert centroids.shape == (12, 8)
    assert centroids.dtype == objective.dtype == torch.float32
    assert objective.shape == (12,)
    steps = objective.double().diff() * (1 if metric == "l2" else -1)
    assert (steps <= 1e-5 * objective.double().abs().amax()).all()
    # The last value reported is from before the last update of the centroids, so the final one is no worse.
    final = objective_of(x, centroids, metric)
    assert (final - float(objective[-1])) * (1 if metric == "l2" else -1) <= 1e-5 * abs(final)


def test_the_reported_objective_is_the_true_one():
    x = blobs()
    for metric in METRICS:
        _, reported = kmeans(x, 12, niter=5, metric=metric)
        before, _ = kmeans(x, 12, niter=4, metric=metric)
        expected = objective_of(x, before, metric)
        assert float(reported[4]) == pytest.approx(expected, rel=1e-4)


@each_metric
def test_centroids_have_unit_length_for_ip_and_cosine(metric):
    for x in (blobs(), blobs() * 1e-15, blobs() * 1e12):
        norms = kmeans(x, 12, metric=metric)[0].norm(dim=1)
        if metric == "l2":
            assert (norms / x.norm(dim=1).mean() - 1).abs().max() > 0.01
        else:
            torch.testing.assert_close(norms, torch.ones(12), rtol=1e-5, atol=0)


def test_centroids_are_the_means_of_their_nearest_rows():
    x = blobs(count=6)
    centroids, _ = kmeans(x, 6, niter=30)
    nearest = torch.cdist(x, centroids).argmin(1)
    means = torch.stack([x[nearest == number].mean(0) for number in range(6)])
    torch.testing.assert_close(means, centroids, rtol=1e-4, atol=1e-4)


@each_metric
def test_the_same_seed_gives_the_same_centroids(metric):
    x = blobs()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = kmeans(x, 12, metric=metric, seed=5)
    second = kmeans(x, 12, metric=metric, seed=5)
    other = kmeans(x, 12, metric=metric, seed=6)
    given = kmeans(x, 12, metric=metric, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[0], given[0])


def test_a_generator_is_advanced():
    generator = torch.Generator().manual_seed(5)
    x = blobs()
    assert not torch.equal(kmeans(x, 12, generator=generator)[0], kmeans(x, 12, generator=generator)[0])


@each_metric
def test_empty_clusters_are_split(metric):
    """Most rows are equal, so most initial centroids are equal and their clusters empty."""
    x = torch.cat([normal(1, 8).expand(400, -1), blobs(count=16, each=10, seed=4)])
    centroids, _ = kmeans(x, 16, niter=15, metric=metric)
    rows = unit(x) if metric == "cosine" else x.double()
    scores = -torch.cdist(rows, centroids.double()) if metric == "l2" else rows @ centroids.double().T
    used = torch.bincount(scores.argmax(1), minlength=16)
    assert centroids.isfinite().all()
    assert len(centroids.unique(dim=0)) == 16
    assert (used > 0).sum() >= 10


@each_metric
@pytest.mark.parametrize("kind", ["identical", "zero", "as many as centroids", "two values"])
def test_degenerate_data_gives_finite_centroids(metric, kind):
    x = {
        "identical": normal(1, 8).expand(40, -1),
        "zero": torch.zeros(40, 8),
        "as many as centroids": normal(7, 8),
        "two values": normal(2, 8).repeat(20, 1),
    }[kind]
    centroids, objective = kmeans(x, 7, metric=metric)
    assert centroids.shape == (7, 8)
    assert centroids.isfinite().all()
    assert objective.isfinite().all()


def repeated(kind):
    """Distinct rows (m, d), and how often to repeat each (m,)."""
    times = torch.randint(1, 60, (64,), generator=torch.Generator().manual_seed(1))
    return {
        "normal": lambda: (normal(64, 8), times),
        "one more often than all others": lambda: (normal(64, 8), torch.tensor([3000] + [2] * 63)),
        "means at zero": lambda: (torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 6), times),
        "far from zero": lambda: (normal(64, 8) + 1000, times),
        "large": lambda: (normal(64, 8) * 1e15, times),
    }[kind]()


KINDS = ["normal", "one more often than all others", "means at zero", "large"]


# Far from zero the rows have the same direction within float32 rounding, so this case is for l2 only.
@pytest.mark.parametrize(
    ("metric", "kind"), [("l2", "far from zero"), *((metric, kind) for metric in METRICS for kind in KINDS)]
)
@pytest.mark.parametrize("nlist", [64, 90])
def test_every_distinct_row_gets_a_centroid(metric, nlist, kind):
    distinct, times = repeated(kind)
    distinct = distinct if metric == "l2" else unit(distinct).float()
    centroids, _ = kmeans(distinct.repeat_interleave(times, 0), nlist, niter=20, metric=metric)
    nearest = torch.cdist(distinct.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert (nearest <= 1e-6 * distinct.double().norm(dim=1)).all()


def test_rows_of_one_direction_count_as_equal_on_the_sphere():
    directions = unit(normal(8, 4)).float()
    lengths = torch.rand(400, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    x = directions.repeat(50, 1) * lengths
    for metric in ("ip", "cosine"):
        centroids, _ = kmeans(x, 20, metric=metric)
        assert (torch.cdist(directions, centroids).amin(1) < 1e-5).all()


@each_metric
def test_the_draws_for_empty_clusters_do_not_grow_with_their_number(metric, monkeypatch):
    """All but four of 4,096 clusters are empty at first; the rows are distinct."""
    draws = []
    drawn = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda *args, **kwargs: draws.append(1) or drawn(*args, **kwargs))
    x = normal(8192, 4) + 0.1
    centroids, objective = kmeans(x, 4096, niter=6, metric=metric, start=x[:4].repeat(1024, 1))
    assert 1 <= len(draws) <= 6 * 20
    assert centroids.isfinite().all()
    assert objective[-1] < 0.1 * objective[0] if metric == "l2" else objective[-1] > objective[0]
    draws.clear()
    centroids, _ = kmeans(torch.ones(8192, 4), 4096, niter=2, metric=metric)
    assert draws == []  # equal rows are not split
    assert torch.equal(centroids, centroids[:1].expand_as(centroids))


def test_halves_are_around_the_mean_and_large_clusters_are_split_most():
    """One iteration with 2 clusters, one of them 20 times as large, and 20 empty ones."""
    large, small = normal(2000, 8) * 0.01 + 1, normal(100, 8, seed=1) * 0.01 - 1
    start = torch.cat([torch.ones(1, 8), -torch.ones(1, 8), torch.full((20, 8), 50.0)])
    centroids, _ = kmeans(torch.cat([large, small]), 22, niter=1, start=start)
    of_large = centroids[:, 0] > 0
    assert 15 <= int(of_large.sum()) <= 21
    assert len(centroids.unique(dim=0)) == 22
    for rows, parts in ((large, centroids[of_large]), (small, centroids[~of_large])):
        assert ((parts - rows.mean(0)).abs() < 6 / 1024 * rows.std() * 8**0.5).all()


def test_translating_the_rows_translates_the_centroids():
    x = (blobs() * 64).round() / 64
    near, far = kmeans(x, 12)[0], kmeans(x + 1000, 12)[0]
    assert objective_of(x, far - 1000, "l2") == pytest.approx(objective_of(x, near, "l2"), rel=1e-3)


def test_rows_are_sampled_where_there_are_many():
    x = normal(5000, 4)
    few = kmeans(x, 4, max_points_per_centroid=20)
    assert float(few[1][0]) < objective_of(x, few[0], "l2") / 10
    assert objective_of(x, few[0], "l2") < 1.3 * objective_of(x, kmeans(x, 4)[0], "l2")
    # The sample depends on the seed alone.
    assert torch.equal(few[0], kmeans(x, 4, max_points_per_centroid=20)[0])


def test_rows_of_any_floating_type_and_stride():
    x = (blobs() * 8).round() / 8
    expected = kmeans(x, 12)[0]
    for same in (x.double(), x.t().contiguous().t(), torch.cat([x, x], 1)[:, 8:]):
        found = kmeans(same, 12)[0]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert kmeans(x.half(), 12)[0].dtype == torch.float32


@pytest.mark.parametrize("make", [torch.Tensor.numpy, torch.Tensor.tolist, lambda x: list(x.numpy())])
def test_rows_in_arrays_and_lists(make):
    x = blobs()
    found, objective = kmeans(make(x), 12, start=make(x[:12]))
    expected, same = kmeans(x, 12, start=x[:12])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(objective, same)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (blobs().to_sparse(), TypeError, r"x must be a dense tensor.*x\.to_dense\(\)"),
        (blobs().long(), TypeError, r"x must be float16.*got int64; cast it with x\.float\(\)"),
        (blobs().to(torch.complex64), TypeError, r"complex vectors are not supported"),
        (blobs()[0], ValueError, r"x must have shape \(n, d\), got \(8,\)"),
        ([], ValueError, r"x must have shape \(n, d\), got \(0,\)"),
        (blobs()[:, :0], ValueError, r"x must have shape \(n, d\), got \(600, 0\)"),
        (blobs().index_fill(0, torch.tensor([7]), torch.nan), ValueError, "x must be finite, but row 7 holds NaN"),
        (blobs().index_fill(0, torch.tensor([5]), -torch.inf), ValueError, "x must be finite, but row 5 holds"),
        (blobs().double() * 1e300, ValueError, r"beyond 3\.403e\+38, the largest that float32 holds"),
        (blobs().numpy().astype(object), TypeError, "got an array of dtype object"),
    ],
)
def test_rows_that_are_refused(x, error, says):
    with pytest.raises(error, match=says):
        kmeans(x, 4)
    with pytest.raises(error, match=re.sub(r"\bx\b", "start", says)):
        kmeans(blobs(), 4, start=x)


def test_kmeans_does_not_change_the_rows():
    x = blobs()
    before = x.clone()
    for metric in METRICS:
        kmeans(x, 12, metric=metric)
    assert torch.equal(x, before)


@each_metric
def test_objective_as_faiss(faiss, metric):
    x = normal(4000, 16, seed=11)
    if metric == "cosine":
        x = unit(x).float()
    theirs = faiss.Kmeans(16, 32, niter=10, seed=1234, spherical=metric != "l2")
    theirs.train(x.numpy())
    ours, _ = kmeans(x, 32, niter=10, metric=metric)
    best = objective_of(x, torch.from_numpy(theirs.centroids), metric)
    mine = objective_of(x, ours, metric)
    assert mine <= 1.01 * best if metric == "l2" else mine >= 0.99 * best
