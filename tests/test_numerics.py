"""Answers are right to float32 resolution: outliers, different magnitudes, large d, many equal rows.

Each case runs with the kernel, where it is built, and without; the expected values are computed in float64.
Q queries, N vectors, d dim, k results.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from tests.datasets import normal, problem
from tests.problems import each_dtype, each_metric, flat, shared
from torch_ivf_module import IndexFlat, IndexFlatIP, IndexFlatL2, IndexIVFFlat, SearchParams, native
from torch_ivf_module.functional.kernels import kernel_for
from torch_ivf_module.functional.metric import rounding
from torch_ivf_module.functional.probe import coarse_of, probe


@pytest.fixture(params=["kernel", "csr", "matrix"])
def mode(request):
    """The search mode, and the kernel switched off for modes that are not "auto"."""
    context = contextlib.nullcontext() if request.param == "kernel" else native.disabled()
    with context:
        yield "auto" if request.param == "kernel" else request.param


def squares(queries, base):
    """Squared distances (Q, N) in float64, by differences."""
    return torch.cdist(queries.double(), base.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def finds_itself(index, rows, first=0):
    """How many stored rows a search finds first."""
    found = index.search(rows, 1)[1][:, 0]
    return int((found == torch.arange(first, first + len(rows))).sum())


# --- the origin ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["first", "last", "among"])
@pytest.mark.parametrize("far", [1e6, 1e12, 1e18])
def test_an_outlier_does_not_change_other_results(far, place, mode):
    rows, outlier = normal(120, 8), torch.full((1, 8), far)
    index = IndexIVFFlat(8, nlist=4, nprobe=1, search_mode=mode).fit(rows.repeat(2, 1))
    before = {"first": 0, "among": 60, "last": 120}[place]
    for part in (rows[:before], outlier, rows[before:]):
        index.add(part)
        index.search(rows[:1], 1)  # the origin of the first rows must not be reused
    ids = torch.cat([torch.arange(before), torch.arange(before + 1, 121)])
    assert torch.equal(index.search(rows, 1)[1][:, 0], ids)
    assert index.search(outlier, 1)[1].item() == before
    plain = IndexFlatL2(8, search_mode=mode)
    plain.add(torch.cat([outlier, rows]))
    assert finds_itself(plain, rows, 1) == len(rows)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_assignment_and_probing_agree_for_every_order_of_adding(offset, mode):
    rows = normal(400, 6) + offset
    ordered = IndexIVFFlat(6, nlist=16, nprobe=1, search_mode=mode).fit(rows.repeat(2, 1))
    turned = IndexIVFFlat(6, nlist=16, nprobe=1, search_mode=mode)
    turned.load_state_dict(ordered.state_dict())
    ordered.add(rows)
    for part in rows.flip(0).split(23):
        turned.add(part)
        turned.search(part, 1)
    assert torch.equal(ordered.list_offsets, turned.list_offsets)
    assert finds_itself(ordered, rows) == len(rows)


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e5])
@pytest.mark.parametrize("d", [8, 200])
def test_the_nearest_lists_are_those_of_float64(d, offset, mode):
    centroids = offset + 0.01 * normal(128, d, seed=1)
    queries = offset + 0.012 * normal(300, d, seed=2)
    kernel = kernel_for(queries)
    assert (kernel is None) == (mode != "auto" or not native.available())
    scores, lists = probe(queries, coarse_of(centroids, "l2"), 5, "l2", kernel)
    exact = squares(queries, centroids)
    best = exact.sort(1).values[:, :5]
    torch.testing.assert_close(exact.gather(1, lists), best, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(-scores.double(), best, rtol=1e-5, atol=0.0)


def _mixed(n, d, top, sign):
    """Rows of magnitudes from 1e-3 to `top`."""
    magnitude = torch.logspace(-3, torch.tensor(top).log10().item(), n)[:, None]
    rows = normal(n, d, seed=3)
    return (rows.abs() if sign == "positive" else rows) * magnitude


@pytest.mark.parametrize("kind", ["flat", "ivf"])
@pytest.mark.parametrize("sign", ["positive", "both"])
@pytest.mark.parametrize("top", [1e9, 1e18, 1e19])
def test_very_different_magnitudes_in_one_index(top, sign, kind, mode):
    rows = _mixed(600, 8, top, sign)
    if kind == "flat":
        index = IndexFlatL2(8, search_mode=mode)
    else:
        index = IndexIVFFlat(8, nlist=12, nprobe=3, search_mode=mode).fit(torch.cat([rows, rows]))
    index.add(rows)
    assert finds_itself(index, rows) == len(rows)
    near = rows * (1 + 2e-4 * normal(600, 8, seed=4))
    D, I = index.search(near, 1, params=SearchParams(nprobe=12) if kind == "ivf" else None)
    exact = squares(near, rows)
    got = exact.gather(1, I)[:, 0]
    assert ((got / exact.amin(1) - 1) < 1e-5).all()
    torch.testing.assert_close(D[:, 0].double(), got, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("top", [1e9, 1e19])
def test_range_search_and_max_codes_with_very_different_magnitudes(top, mode):
    rows = _mixed(500, 8, top, "positive")
    index = IndexIVFFlat(8, nlist=8, nprobe=8, search_mode=mode).fit(torch.cat([rows, rows]))
    index.add(rows)
    exact = squares(rows, rows)
    radii = (exact.sort(1).values[:, 2] * 0.999).float()  # two rows are nearer, one of them the query itself
    lims, D, I = index.range_search(rows, radii)
    for query in range(len(rows)):
        inside = torch.nonzero(exact[query] < radii[query].double())[:, 0]
        assert set(I[lims[query] : lims[query + 1]].tolist()) == set(inside.tolist())
    assert (D < radii.repeat_interleave(lims.diff())).all()
    # One list is read: the nearest, which is the row's own.
    first = index.search(rows, 1, params=SearchParams(max_codes=1))[1][:, 0]
    assert torch.equal(first, torch.arange(len(rows)))


@each_metric
def test_a_query_far_from_all_vectors(metric, mode):
    rows = torch.cat([normal(50, 8), normal(3, 8, seed=9) * 1e19])
    index = IndexFlat(8, metric, search_mode=mode)
    index.add(rows)
    D, I = index.search(rows[50:], 1)
    if metric != "ip":  # the largest product is that with another enormous row, and overflows
        assert I[:, 0].tolist() == [50, 51, 52]
    assert (D.isfinite() | (I == -1)).all()


# --- large d ------------------------------------------------------------------------------------------------


@each_dtype
@each_metric
@pytest.mark.parametrize("d", [200, 1536, 8192])
def test_thousands_of_dimensions(d, metric, dtype, mode):
    # Rows with a large common part, so that small differences must be resolved in long sums of terms of one sign.
    rows = (1 + 1e-3 * normal(150, d, seed=1)).to(dtype)
    queries = 1.1 * (1 + 1e-3 * normal(20, d, seed=2))
    index = IndexFlat(d, metric, dtype=dtype, search_mode=mode)
    index.add(rows)
    D, I = index.search(queries, 10)
    stored = index.reconstruct_n(0, 150).double()
    unit = queries.double() / queries.double().norm(dim=1, keepdim=True) if metric == "cosine" else queries.double()
    scores = -squares(queries, stored) if metric == "l2" else unit @ stored.t()
    best, got = scores.topk(10, dim=1).values, scores.gather(1, I)
    assert ((best[:, -1] - got.amin(1)) <= 3e-6 * best[:, -1].abs()).all()
    torch.testing.assert_close(D.double().abs(), got.abs(), rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("d", [1536, 8192])
@pytest.mark.parametrize("queries", [3, 40])
def test_the_kernel_is_within_its_rounding_bound(d, queries):
    if not native.available():
        pytest.skip("no kernel: python -m torch_ivf_module build-native")
    rows, vectors = 1 + 1e-3 * normal(200, d, seed=3), 0.1 * (1 + 1e-3 * normal(queries, d, seed=4))
    offsets, probed = torch.tensor([0, 200]), torch.zeros(queries, 1, dtype=torch.int64)
    lists = torch.zeros(0), offsets, offsets.flip(0), probed
    scores, found = torch.ops.torch_ivf_module.scan(vectors, rows, *lists, None, 200, 1 << 26)
    exact = (vectors.double() @ rows.double().t()).gather(1, found)
    assert ((scores - exact).abs() <= rounding(d) * vectors.norm(dim=1, keepdim=True) * rows.norm(dim=1).amax()).all()


def _with_centroids(index, centroids):
    """Train an empty index to these centroids."""
    offsets = torch.zeros(len(centroids) + 1, dtype=torch.int64)
    index.load_state_dict({**index.state_dict(), "centroids": centroids, "list_offsets": offsets})


def _equal_numbers(n, d, offset, step):
    """Rows of d equal numbers: all terms of a product have one sign, and all additions may round the same way."""
    places = torch.randperm(n, generator=torch.Generator().manual_seed(6)).float() * step
    return (offset + places)[:, None].expand(-1, d).contiguous()


@pytest.mark.parametrize(("offset", "step"), [(1.0, 2.0**-17), (10.0, 2.0**-14), (1000.0, 2.0**-13)])
@pytest.mark.parametrize("d", [64, 192, 256, 512])
def test_rows_of_equal_numbers(d, offset, step, mode):
    rows = _equal_numbers(2000, d, offset, step)
    index = IndexFlatL2(d, search_mode=mode)
    index.add(rows)
    assert finds_itself(index, rows[:100]) == 100
    lims, D, _ = index.range_search(rows[:100], 1e-12)
    assert torch.equal(lims.diff(), torch.ones(100, dtype=torch.int64))
    assert (D == 0).all()


def test_lists_whose_centroids_are_of_equal_numbers(mode):
    centroids = 1000 + (torch.arange(256) * 2.0**-9)[:, None].expand(-1, 256).contiguous()
    index = IndexIVFFlat(256, nlist=256, nprobe=1, search_mode=mode)
    _with_centroids(index, centroids)
    index.add(centroids)
    assert torch.equal(index.list_offsets, torch.arange(257))
    assert finds_itself(index, centroids) == 256


@pytest.mark.parametrize(("offset", "spread"), [(1e21, 1e17), (3e20, 5e17)])
def test_rows_far_from_zero_whose_products_overflow(offset, spread, mode):
    rows = offset + spread * normal(300, 8, seed=8)
    index = IndexFlatL2(8, search_mode=mode)
    index.add(rows)
    found = index.search(rows[:50], 1)
    assert (found[0] == 0).all()
    assert torch.equal(rows[found[1][:, 0]], rows[:50])


def test_the_nearest_list_is_found_when_its_product_overflows(mode):
    centroids = torch.tensor([[0.7071, 0.7071], [1.0, 0.0], [0.0, 1.0]])
    index = IndexIVFFlat(2, nlist=3, nprobe=1, metric="ip", search_mode=mode)
    _with_centroids(index, centroids)
    index.add(centroids * 1e-5)
    assert index.search(torch.full((1, 2), 3e38), 1)[1].item() == 0


# --- many equal rows ----------------------------------------------------------------------------------------


def _crowded(n, d):
    """n / 2 equal rows and n / 2 random ones."""
    rows = normal(n, d)
    rows[1 : n // 2] = rows[0]
    return rows


def test_an_uncertified_query_takes_one_second_pass(mode):
    rows = _crowded(3000, 16)
    queries = rows[:1] + 1e-3 * normal(20, 16, seed=5)
    index = IndexIVFFlat(16, nlist=8, nprobe=8, search_mode=mode).fit(rows)
    index.add(rows)
    D, I = index.search(queries, 10, params=SearchParams(debug_stats=True))
    stats = index.last_search_stats
    assert stats["searched_again"] == 20  # queries, not passes
    assert stats["certified"] == 0
    exact = squares(queries, rows)
    torch.testing.assert_close(D.double(), exact.sort(1).values[:, :10], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(exact.gather(1, I), exact.sort(1).values[:, :10], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize(
    "fields",
    [{"max_codes": 900}, {"candidate_budget": 700}, {"selector": torch.arange(0, 3000, 3)}],
    ids=["max_codes", "budget", "selector"],
)
def test_a_second_pass_reads_what_the_first_may_read(fields, mode):
    rows = _crowded(3000, 16)
    queries = rows[:1] + 1e-3 * normal(20, 16, seed=5)
    index = IndexIVFFlat(16, nlist=8, nprobe=3, search_mode=mode).fit(rows)
    index.add(rows)
    params = SearchParams(**fields, debug_stats=True)
    exact = index.search(queries, 10, params=SearchParams(**fields, profile="exact"))
    found = index.search(queries, 10, params=params)
    torch.testing.assert_close(found[0], exact[0], rtol=1e-6, atol=0.0)
    if "selector" in fields:
        assert (found[1] % 3 == 0).all()


def test_a_second_pass_in_two_segments_is_counted_once():
    rows = _crowded(2000, 16)
    index = IndexFlatL2(16)
    index.add(rows)
    index.search(rows[:1], 1)
    index.add(rows[:100])  # pending
    index.search(rows[:7], 10, params=SearchParams(debug_stats=True))
    stats = index.last_search_stats
    assert stats["searched_again"] + stats["certified"] == 7
    assert stats["searched_again"] == 7


@each_metric
def test_queries_are_counted_equally_in_every_mode(metric, mode):
    index, _, queries = shared(problem("wide"), metric, search_mode=mode)
    index.search(queries, 5, params=SearchParams(debug_stats=True))
    assert index.last_search_stats["certified"] == len(queries)


def test_certified_queries_take_no_second_pass(mode):
    index, _, queries = shared(problem("wide"), search_mode=mode)
    index.search(queries, 5, params=SearchParams(debug_stats=True))
    assert index.last_search_stats["searched_again"] == 0
    assert index.last_search_stats["certified"] == len(queries)


# --- switching the kernel off -------------------------------------------------------------------------------


def test_disabled_is_a_context_that_nests():
    index, _, queries = flat(problem("wide"))
    with native.disabled():
        with native.disabled():
            assert not native.available()
        index.search(queries, 3, params=SearchParams(debug_stats=True))
        assert index.last_search_stats["mode"] in ("csr", "matrix")
    before = native.available()
    with pytest.raises(ZeroDivisionError), native.disabled():
        1 / 0  # noqa: B018
    assert native.available() == before


@pytest.mark.parametrize("queries", [1, 40])
def test_products_that_underflow_lose_no_result(queries, mode):
    generator = torch.Generator().manual_seed(40)
    magnitudes = 10.0 ** torch.randint(-25, 5, (3040, 1), generator=generator)
    x = torch.randn(3040, 31, generator=generator) * magnitudes
    index = IndexFlatL2(31, search_mode=mode)
    index.add(x[:3000])
    found, _ = index.search(x[3000 : 3000 + queries], 3)
    exact, _ = index.search(x[3000 : 3000 + queries], 3, params=SearchParams(profile="exact"))
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-37)


def test_products_that_overflow_take_no_place(mode):
    x = normal(300, 1, seed=0)
    x[::3] = 1e25 * x[::3].sign()
    index = IndexFlatIP(1, search_mode=mode)
    index.add(x)
    found, ids = index.search(torch.tensor([[1e25]]), 10)
    assert (ids >= 0).all()
    products = 1e25 * x[:, 0]
    expected = products[products.isfinite()].topk(10).values
    torch.testing.assert_close(found[0], expected)
