"""Every field of SearchParams in every mode and metric, against plain loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.datasets import Problem, normal, problem
from tests.oracle import Probed, StoredRows, agree, check, list_scores, stored_rows
from tests.problems import each_metric, each_mode, few_training_rows, shared
from tests.states import snapshot
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, SearchParams, native
from torch_ivf_module.functional import scan_lists
from torch_ivf_module.functional.budget import Budget, row_limits

# Lists of about 200 rows, several blocks each; with 700 queries several prefixes per list.
LONG = Problem("long lists", nb=2400, d=8, nq=40, nlist=12, nprobe=6, k=10)


# --- the oracle ---------------------------------------------------------------------------------------------


@dataclass
class Limits:
    rows: list[int]  # of each list, nearest first
    clear: bool  # whether rounding cannot change `rows`


def plain_limits(scores: list[float], sizes: list[int], params: SearchParams) -> Limits:
    """Rows that a query reads of its lists, nearest first, as docs/search-params.md defines it."""
    budget, probes, clear = params.of("candidate_budget") or 0, len(sizes), True
    caps = [min(size, params.max_codes_cap_per_list or size) for size in sizes]
    even = math.ceil(budget / probes)
    if not budget:
        limits = caps
    else:
        if params.of("use_per_list_sizes"):
            caps = [min(cap, even) for cap in caps]
        least = [min(cap, params.min_codes_per_list, budget) for cap in caps]
        dynamic = params.dynamic_nprobe and params.budget_strategy == "distance_weighted"
        if dynamic:
            least = [n if sum(least[: i + 1]) <= budget else 0 for i, n in enumerate(least)]
        if params.budget_strategy == "uniform":
            wanted = [even] * probes
        else:
            weights, median = [], scores[(probes - 1) // 2]
            for score in scores:
                gap = scores[0] - median
                z = (scores[0] - score) / gap if gap > 0 else 0.0 if score == scores[0] else 8.0
                weights.append(math.exp(-3 * min(z, 8.0)))
            if dynamic:
                fits = [n > 0 or not params.min_codes_per_list for n in least]
                weights = [w * fit for w, fit in zip(weights, fits, strict=True)]
            left = budget - sum(least) if dynamic else budget
            parts = [256 * w / sum(weights) - 1e-3 for w in weights]
            clear = all(abs(part - round(part)) > 5e-4 for part in parts if part > 0)
            parts = [max(1, math.ceil(part)) if w else 0 for part, w in zip(parts, weights, strict=True)]
            wanted = [math.ceil(part * left / 256) for part in parts]
            if dynamic:
                wanted = [n + extra for n, extra in zip(least, wanted, strict=True)]
        limits = [min(max(w, n), cap) for w, n, cap in zip(wanted, least, caps, strict=True)]
        if params.strict_budget:
            left, base = budget, []
            for n in least:
                base.append(min(n, left))
                left -= base[-1]
            spare = [limit - n for limit, n in zip(limits, base, strict=True)]
            if sum(spare) > left:
                spare = [s * left // sum(spare) for s in spare]
            limits = [n + s for n, s in zip(base, spare, strict=True)]
        limits[0] = max(limits[0], min(1, caps[0]))
    if params.max_codes:
        total = 0
        for i, rows in enumerate(limits):
            total += rows
            if i and total > params.max_codes:
                limits = [*limits[:i], *[0] * (probes - i)]
                break
    return Limits(limits, clear)


def readable(index, queries, params) -> tuple[StoredRows, Probed]:
    """The stored rows, with each row as its own list, and the rows that each query must and may read."""
    own, (scores, apart) = stored_rows(index), list_scores(index, queries)
    offsets = index.list_offsets.tolist()
    probes = min(params.nprobe or index.nprobe, index.nlist)
    required = torch.zeros(len(queries), len(own.ids), dtype=torch.bool)
    allowed = required.clone()
    for q in range(len(queries)):
        ordered, order = scores[q].sort(descending=True)
        order = order[:probes].tolist()
        sizes = [offsets[l + 1] - offsets[l] for l in order]
        limits = plain_limits(ordered[:probes].tolist(), sizes, params)
        judged = limits.clear and bool((-ordered[: probes + 1].diff() > apart[q]).all())
        for number, rows, size in zip(order, limits.rows, sizes, strict=True):
            start = offsets[number]
            required[q, start : start + rows] = judged
            allowed[q, start : start + (rows if judged else size)] = True
    assert required.any(1).double().mean() > 0.6, "the lists of too many queries are tied to check this case"
    return own._replace(lists=torch.arange(len(own.ids))), Probed(required, allowed)


def judge(index, queries, params, k=10):
    found = index.search(queries, k, params=params)
    own, rows = readable(index, queries, params)
    if params.selector is not None:
        chosen = torch.zeros_like(own.ids, dtype=torch.bool)
        ids = params.selector if params.selector.dtype != torch.bool else params.selector.nonzero()[:, 0]
        chosen |= torch.isin(own.ids, ids)
        rows = Probed(rows.required & chosen, rows.allowed & chosen)
    check(found, queries, own, index.metric, k, rows)
    return found


# --- budgets ------------------------------------------------------------------------------------------------

FIELDS = [
    {"candidate_budget": 1},
    {"candidate_budget": 300},
    {"candidate_budget": 300, "use_per_list_sizes": True},
    {"candidate_budget": 333, "budget_strategy": "uniform"},
    {"candidate_budget": 300, "min_codes_per_list": 40},
    {"candidate_budget": 150, "min_codes_per_list": 40, "dynamic_nprobe": True},
    {"candidate_budget": 30, "min_codes_per_list": 40, "dynamic_nprobe": True},
    {"candidate_budget": 150, "dynamic_nprobe": True},
    {"candidate_budget": 400, "max_codes_cap_per_list": 70},
    {"max_codes_cap_per_list": 33},
    {"candidate_budget": 200, "strict_budget": True},
    {"candidate_budget": 100, "min_codes_per_list": 30, "strict_budget": True},
    {"candidate_budget": 500, "max_codes": 300},
    {"candidate_budget": 10**6},
    {"profile": "approx", "candidate_budget": 250},
    {"profile": "exact", "candidate_budget": 250},
    {"profile": "approx_fast", "candidate_budget": 250},
    {"profile": "approx_quality"},
    {"nprobe": 3, "candidate_budget": 200},
    {"candidate_budget": 250, "selector": torch.arange(0, 2400, 3)},
    {"max_codes": 500, "selector": torch.arange(0, 2400, 7)},
]


@pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: ", ".join(fields))
@each_mode
@each_metric
def test_a_search_reads_the_rows_that_the_fields_allow(fields, mode, metric):
    index, _, queries = shared(LONG, metric, search_mode=mode)
    params = SearchParams(**fields)
    judge(index, queries, params)


@pytest.mark.parametrize("name", ["plain", "wide", "empty lists", "one list holds everything", "huge norms", "d=1"])
@each_mode
@each_metric
def test_budgets_on_other_data(name, mode, metric):
    index, _, queries = shared(problem(name), metric, search_mode=mode)
    params = SearchParams(candidate_budget=100, strict_budget=True, debug_stats=True)
    found = index.search(queries, 10, params=params)
    finite = int((queries.isfinite()).all(1).sum())
    assert index.last_search_stats["rows_read"] <= 100 * finite
    index.search_mode = "matrix"
    other = index.search(queries, 10, params=params)
    agree(found, other, rtol=1e-5, atol=2e-6 * float(queries.norm(dim=1).max() ** 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_mode
@each_metric
def test_budgets_with_half_precision(dtype, mode, metric):
    index, _, queries = shared(LONG, metric, dtype, search_mode=mode)
    judge(index, queries, SearchParams(candidate_budget=300))


@each_mode
def test_a_budget_has_a_gradient(mode):
    index, base, queries = shared(LONG, search_mode=mode)
    x = queries.clone().requires_grad_()
    D, I = index.search(x, 5, params=SearchParams(candidate_budget=300))
    D.sum().backward()
    torch.testing.assert_close(x.grad, 2 * (5 * queries - base[I].sum(1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("visitors", [2, 7, 256])
@each_metric
def test_answers_do_not_depend_on_shared_prefixes(visitors, metric, monkeypatch):
    """The list-major mode groups queries that read a prefix of a list, `_VISITORS` per group."""
    monkeypatch.setattr(scan_lists, "_VISITORS", visitors)
    index, _, queries = shared(LONG, metric, search_mode="csr")
    for fields in ({"candidate_budget": 300}, {"candidate_budget": 700, "budget_strategy": "uniform"}):
        judge(index, queries, SearchParams(**fields))


def test_a_budget_in_long_lists_and_a_large_batch():
    """Lists longer than a section of the list-major scan, and products of many queries."""
    base, queries = normal(14_000, 4, seed=3), normal(700, 4, seed=4)
    index = IndexIVFFlat(4, nlist=2, nprobe=2)
    with few_training_rows():
        index.train(base[:100])
    index.add(base)
    for budget in (6000, 9000, 12_000):
        params = SearchParams(candidate_budget=budget)
        index.search_mode = "matrix"
        expected = index.search(queries[:60], 10, params=params)
        index.search_mode = "csr"
        D, I = index.search(queries, 10, params=params)
        agree((D[:60], I[:60]), expected, rtol=1e-5, atol=1e-9)
        own, rows = readable(index, queries[:60], params)
        check((D[:60], I[:60]), queries[:60], own, "l2", 10, rows)


@each_mode
def test_pending_rows_count_as_the_last_of_their_lists(mode):
    index, base, queries = shared(LONG, search_mode=mode)
    params = SearchParams(candidate_budget=900)
    index.add(base[:50] + 0.01)
    found = index.search(queries, 10, params=params)
    own, rows = readable(index, queries, params)  # reading the state packs them
    check(found, queries, own, "l2", 10, rows)
    agree(index.search(queries, 10, params=params), found)


@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=8),
    scores=st.lists(st.floats(-50, 0, width=32), min_size=8, max_size=8),
    rows=st.integers(1, 300),
    weighted=st.booleans(),
    even_cap=st.booleans(),
    drop_far=st.booleans(),
    least=st.integers(0, 40),
    most=st.integers(0, 40),
)
def test_row_limits_respect_every_cap(sizes, scores, rows, weighted, even_cap, drop_far, least, most):
    scores = torch.tensor([sorted(scores[: len(sizes)], reverse=True)])
    lengths = torch.tensor([sizes])
    loose = Budget(rows, weighted, even_cap, False, drop_far, least, most)
    strict = loose._replace(strict=True)
    for budget in (loose, strict):
        limits = row_limits(scores, lengths, budget)
        assert limits.dtype == torch.int64
        assert (limits >= 0).all()
        assert (limits <= lengths).all()
        assert (limits[:, 0] >= lengths[:, 0].clamp(max=1)).all()
        if most:
            assert int(limits.max()) <= most
        if even_cap:
            assert int(limits.max()) <= math.ceil(rows / len(sizes))
    assert int(limits.sum()) <= max(rows, 1)
    assert (limits <= row_limits(scores, lengths, loose)).all()
    more = row_limits(scores, lengths, loose._replace(rows=rows + 50))
    if not drop_far and not least:
        assert (more >= row_limits(scores, lengths, loose)).all()


# --- the order of lists -------------------------------------------------------------------------------------


@each_metric
@each_mode
def test_list_ordering_does_not_change_answers(metric, mode):
    index, _, queries = shared(LONG, metric, search_mode=mode)
    before = index.search(queries, 10)
    index.rebuild_lists()
    agree(index.search(queries, 10), before, atol=1e-5)
    judge(index, queries, SearchParams(candidate_budget=300))


@each_metric
def test_rows_are_sorted_as_list_ordering_says(metric):
    index, _, _ = shared(LONG, metric)
    index.rebuild_lists(ordering="residual_norm_asc" if metric == "l2" else "proj_desc")
    own = stored_rows(index)
    centroids = index.centroids.double()[own.lists]
    centrality = -(own.vectors - centroids).norm(dim=1) if metric == "l2" else (own.vectors * centroids).sum(1)
    same_list = own.lists.diff() == 0
    assert (own.lists.diff() >= 0).all()
    assert (centrality.diff()[same_list] <= 1e-6).all()
    assert index.list_ordering == ("residual_norm_asc" if metric == "l2" else "proj_desc")
    index.rebuild_lists()
    assert torch.equal(stored_rows(index).ids, own.ids)


def test_ordered_lists_find_more_with_the_same_budget():
    base, queries = normal(20_000, 32, seed=5), normal(200, 32, seed=6)
    index = IndexIVFFlat(32, nlist=32, nprobe=16)
    index.train(base[:2000], niter=4)
    index.add(base)
    truth = index.search(queries, 10)[1]
    params = SearchParams(candidate_budget=2000, debug_stats=True)

    def recall():
        found = index.search(queries, 10, params=params)[1]
        return float((found[:, :, None] == truth[:, None]).any(2).double().mean())

    before = recall()
    index.rebuild_lists()
    assert recall() > before + 0.1


def test_list_ordering_survives_copies_and_files(tmp_path):
    index, _, queries = shared(LONG)
    index.rebuild_lists()
    index.save(tmp_path / "index.pt")
    other = IndexIVFFlat.load(tmp_path / "index.pt")
    assert other.list_ordering == "residual_norm_asc"
    params = SearchParams(candidate_budget=200)
    agree(other.search(queries, 10, params=params), index.search(queries, 10, params=params))


def test_enough_added_rows_sort_the_lists_again():
    index, base, queries = shared(LONG)
    kept = SearchParams(rebuild_policy="auto_threshold", rebuild_threshold_adds=100)
    index.search(queries, 1, params=SearchParams(list_ordering="residual_norm_asc"))
    assert index.list_ordering == "none"  # "manual" is the default
    index.search(queries, 1, params=kept)
    assert index.list_ordering == "residual_norm_asc"
    ids = stored_rows(index).ids
    index.add(base[:99] * 0.5)
    index.search(queries, 1, params=kept)
    assert stored_rows(index).ids[stored_rows(index).ids < 2400].tolist() == ids.tolist()
    assert not _is_ordered(index)
    index.add(base[:1] * 0.5)
    index.search(queries, 1, params=kept)
    assert _is_ordered(index)


def _is_ordered(index):
    own = stored_rows(index)
    residual = (own.vectors - index.centroids.double()[own.lists]).norm(dim=1)
    return bool((residual.diff()[own.lists.diff() == 0] >= -1e-6).all())


def test_the_row_added_last_of_a_duplicate_id_stays_the_last():
    index, base, _ = shared(LONG)
    twice = torch.arange(2400, 2500).repeat(2)
    x = torch.cat([base[:100] * 0.9, base[:100] * 0.8])  # the later ones nearer to the middle
    index.add_with_ids(x, twice)
    last = [index.reconstruct(id) for id in range(2400, 2500)]
    index.rebuild_lists()
    assert all(torch.equal(index.reconstruct(id), x) for id, x in zip(range(2400, 2500), last, strict=True))
    assert torch.equal(torch.stack(last), base[:100] * 0.8)
    assert stored_rows(index).ids.sort().values.tolist() == [*range(2400), *sorted(twice.tolist())]


def test_new_centroids_and_a_loaded_state_reset_the_order():
    index, base, _ = shared(LONG)
    index.rebuild_lists()
    other, _, _ = shared(LONG)
    with few_training_rows():
        index.train(base, niter=1)
    assert index.list_ordering == "none"
    index.rebuild_lists()
    index.load_state_dict(other.state_dict())
    assert index.list_ordering == "none"
    assert torch.equal(stored_rows(index).ids, stored_rows(other).ids)


@pytest.mark.parametrize("emptied", ["by reset", "by a state", "by reset_parameters"])
def test_deleted_rows_do_not_count_as_added(emptied):
    index, base, queries = shared(LONG)
    kept = SearchParams(rebuild_policy="auto_threshold", rebuild_threshold_adds=100)
    index.rebuild_lists()
    state = snapshot(index)
    index.add(base[:300])
    if emptied == "by a state":
        index.remove_ids(index.list_ids)
        index.load_state_dict(state)
    elif emptied == "by reset":
        index.reset()
    else:
        index.reset_parameters()
        assert index.list_ordering == "none"
        with few_training_rows():
            index.train(base)
        index.rebuild_lists()
    assert index.list_ordering == "residual_norm_asc"
    index.add(base[:99] * 0.5)
    index.search(queries, 1, params=kept)
    assert not _is_ordered(index)
    index.add(base[:1] * 0.5)
    index.search(queries, 1, params=kept)
    assert _is_ordered(index)


def test_an_ordering_of_another_metric_is_refused():
    for metric, ordering in (("l2", "proj_desc"), ("ip", "residual_norm_asc")):
        index, _, queries = shared(LONG, metric)
        with pytest.raises(ValueError, match=ordering):
            index.rebuild_lists(ordering=ordering)
        with pytest.raises(ValueError, match=ordering):
            index.search(queries, 1, params=SearchParams(list_ordering=ordering))


# --- fields and statistics ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"candidate_budget": -1}, ValueError, "candidate_budget"),
        ({"candidate_budget": 2.5}, TypeError, "candidate_budget"),
        ({"budget_strategy": "fair"}, ValueError, "budget_strategy.*distance_weighted.*fair"),
        ({"list_ordering": "random"}, ValueError, "list_ordering.*residual_norm_asc.*random"),
        ({"rebuild_policy": "never"}, ValueError, "rebuild_policy.*auto_threshold.*never"),
        ({"rebuild_threshold_adds": -3}, ValueError, "rebuild_threshold_adds"),
        ({"min_codes_per_list": -3}, ValueError, "min_codes_per_list"),
        ({"max_codes_cap_per_list": "all"}, TypeError, "max_codes_cap_per_list"),
        ({"safe_pruning": 1}, TypeError, "safe_pruning"),
        ({"debug_stats": "yes"}, TypeError, "debug_stats"),
        ({"selector": {1, 2}}, TypeError, "selector.*set"),
        ({"use_per_list_sizes": True}, ValueError, "use_per_list_sizes.*candidate_budget"),
        ({"strict_budget": True}, ValueError, "strict_budget.*candidate_budget"),
        ({"dynamic_nprobe": True, "profile": "approx"}, ValueError, "dynamic_nprobe.*candidate_budget"),
    ],
)
def test_fields_that_are_refused(fields, error, words):
    with pytest.raises(error, match=words):
        SearchParams(**fields)


def test_explicit_fields_override_the_profile():
    for profile, rows in (("approx_fast", 32_768), ("approx_balanced", 65_536), ("approx_quality", 131_072)):
        params = SearchParams(profile=profile)
        assert params.of("candidate_budget") == rows
        assert params.of("use_per_list_sizes") is True
        assert SearchParams(profile=profile, candidate_budget=7).of("candidate_budget") == 7
        assert SearchParams(profile=profile, use_per_list_sizes=False).of("use_per_list_sizes") is False
    assert SearchParams().of("candidate_budget") is None


def test_settings_compare_by_value_and_selectors_by_identity():
    chosen = torch.arange(3)
    assert SearchParams(selector=chosen, nprobe=2) == SearchParams(selector=chosen, nprobe=2)
    assert hash(SearchParams(selector=chosen)) == hash(SearchParams(selector=chosen))
    assert SearchParams(selector=chosen) != SearchParams(selector=chosen.clone())
    assert SearchParams(nprobe=2) != SearchParams(nprobe=3)
    assert repr(SearchParams(nprobe=2, profile="exact")) == "SearchParams(profile='exact', nprobe=2)"


def test_0_means_no_limit():
    index, _, queries = shared(LONG)
    expected = index.search(queries, 10)
    index.max_codes = 5
    none = SearchParams(profile="approx_fast", candidate_budget=0, max_codes=0, use_per_list_sizes=False)
    agree(index.search(queries, 10, params=none), expected)


def test_statistics_of_an_empty_index():
    index = IndexFlatL2(8)
    index.search(normal(3, 8), 2, params=SearchParams(debug_stats=True))
    assert index.last_search_stats["rows_read"] == 0
    assert index.last_search_stats["mode"] is None


@each_mode
def test_statistics_count_the_rows_read(mode):
    index, _, queries = shared(LONG, search_mode=mode)
    index.search(queries, 10)
    assert index.last_search_stats is None
    index.search(queries, 10, params=SearchParams(debug_stats=True))
    stats = index.last_search_stats
    sizes = index.list_offsets.diff()
    nearest = list_scores(index, queries)[0].topk(index.nprobe, dim=1).indices
    assert stats["rows_read"] == int(sizes[nearest].sum())
    assert (stats["queries"], stats["nprobe"], stats["rows_left_out"]) == (len(queries), 6, 0)
    assert stats["lists_read"] == 6 * len(queries)
    taken = ("native",) if native.available() else ("csr", "matrix")
    assert stats["mode"] in (taken if mode == "auto" else (mode,))
    assert stats["mode"] == "native" or mode != "auto" or "ms" in stats["why"]
    params = SearchParams(candidate_budget=100, strict_budget=True, debug_stats=True)
    index.search(queries, 10, params=params)
    limited_stats = index.last_search_stats
    assert limited_stats is not stats
    assert 0 < limited_stats["rows_read"] <= 100 * len(queries)
    assert limited_stats["rows_read"] + limited_stats["rows_left_out"] == stats["rows_read"]
    index.search(queries, 10)
    assert index.last_search_stats is limited_stats


def test_a_flat_index_reads_everything_whatever_the_budget():
    index = IndexFlatL2(8)
    index.add(normal(300, 8))
    queries = normal(5, 8, seed=1)
    params = SearchParams(profile="approx_fast", candidate_budget=10, max_codes=5)
    agree(index.search(queries, 10, params=params), index.search(queries, 10))
