"""Selectors, and a radius per query, against exhaustive search of the probed lists."""

from __future__ import annotations

import pytest
import torch

from tests.datasets import PLAIN, normal, problem
from tests.oracle import Probed, StoredRows, agree, check, check_range, probed, stored_rows
from tests.problems import each_flat_metric, each_metric, each_mode, each_problem, flat, shared
from tests.states import same_state, snapshot
from torch_ivf_module import IndexPreTransform, SearchParams
from torch_ivf_module.functional import lists as ragged


def ids_of(name: str, nb: int) -> torch.Tensor:
    """The ids of a case of NAMES, for an index with the ids below `nb`."""
    everything = torch.arange(nb)
    return {
        "all": everything,
        "half": everything[::2],
        "one in thirty": everything[::30],
        "one": everything[nb // 2 : nb // 2 + 1],
        "none": everything[:0],
        "unknown": torch.tensor([-7, nb + 5, 2**62]),
        "twice and some unknown": torch.cat([everything[::3].flip(0), everything[::3], torch.tensor([-9, 2**40])]),
    }[name]


NAMES = ("all", "half", "one in thirty", "one", "none", "unknown", "twice and some unknown")


def only(own: StoredRows, ids: torch.Tensor) -> StoredRows:
    """The rows of `own` that have these ids."""
    kept = torch.isin(own.ids, ids)
    return StoredRows(*(field[kept] for field in own))


def mask_of(ids: torch.Tensor, size: int) -> torch.Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[ids[(ids >= 0) & (ids < size)]] = True
    return mask


@pytest.mark.parametrize("chosen", NAMES)
@each_mode
@each_metric
def test_search_with_a_selector(chosen, mode, metric):
    index, base, queries = shared(PLAIN, metric, search_mode=mode)
    ids = ids_of(chosen, len(base))
    expected = only(stored_rows(index), ids)
    narrow = ids.int() if torch.equal(ids.int().long(), ids) else ids
    for selector in (ids, narrow, mask_of(ids, len(base)), mask_of(ids, len(base) + 100)):
        found = index.search(queries, 10, params=SearchParams(selector=selector))
        check(found, queries, expected, metric, 10, probed(index, queries))


@each_problem
@each_mode
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_selector_in_every_case(case, mode, metric):
    index, base, queries = shared(case, metric, search_mode=mode)
    selector = torch.arange(0, len(base), 3)
    found = index.search(queries, case.k, params=SearchParams(selector=selector))
    check(found, queries, only(stored_rows(index), selector), metric, case.k, probed(index, queries))


@each_mode
@each_metric
@pytest.mark.parametrize("copies", [True, False])
def test_answers_do_not_depend_on_copying_the_chosen_rows(copies, mode, metric, monkeypatch):
    """Few chosen rows are copied to new lists, many are masked; here few are masked and many copied too."""
    monkeypatch.setattr(ragged, "_COPY", 0 if copies else 10**9)
    monkeypatch.setattr(ragged, "_FEW", 1 if copies else 10**9)
    index, base, queries = shared(problem("wide"), metric, search_mode=mode)
    for step in (1, 2, 90):
        selector = torch.arange(0, len(base), step)
        for profile in ("speed", "exact"):
            found = index.search(queries, 21, params=SearchParams(selector=selector, profile=profile))
            check(found, queries, only(stored_rows(index), selector), metric, 21, probed(index, queries))
        params = SearchParams(selector=selector, max_codes=300)
        found = index.search(queries, 21, params=params)
        lists = probed(index, queries, max_codes=300)
        check(found, queries, only(stored_rows(index), selector), metric, 21, lists)


@pytest.mark.parametrize("chosen", NAMES)
@each_flat_metric
def test_a_selector_of_a_flat_index(chosen, metric):
    index, base, queries = flat(PLAIN, metric)
    ids = ids_of(chosen, len(base))
    for selector in (ids, mask_of(ids, len(base))):
        found = index.search(queries, 10, params=SearchParams(selector=selector))
        check(found, queries, only(stored_rows(index), ids), metric, 10)


@each_metric
def test_a_selector_of_ids_that_are_not_in_order(metric):
    index, base, queries = shared(PLAIN, metric)
    index.add_with_ids(base[:40] * 1.01, torch.tensor([-(2**63), 2**62, *range(-40, -21), *range(900, 919)]))
    index.add_with_ids(base[:3] * 0.99, torch.tensor([7, 7, -30]))
    selector = torch.tensor([2**62, 7, -30, 905, -(2**63), 3])
    found = index.search(queries, 20, params=SearchParams(selector=selector, nprobe=12))
    check(found, queries, only(stored_rows(index), selector), metric, 20)


@each_mode
def test_a_selector_applies_to_pending_rows(mode):
    index, base, queries = shared(PLAIN, search_mode=mode)
    index.add(base[:30] + 0.02)
    selector = torch.arange(490, 510)
    found = index.search(queries, 10, params=SearchParams(selector=selector, nprobe=12))
    check(found, queries, only(stored_rows(index), selector), "l2", 10)


def test_a_selector_with_a_transform_and_with_gradients():
    index, base, queries = shared(PLAIN)
    params = SearchParams(selector=torch.arange(0, 500, 2))
    expected = index.search(queries, 5, params=params)
    transformed = IndexPreTransform(16, torch.nn.Identity(), index)
    agree(transformed.search(queries, 5, params=params), expected)
    x = queries.clone().requires_grad_()
    D, I = index.search(x, 5, params=params)
    assert torch.equal(I, expected[1])
    D.sum().backward()
    slope = 2 * (5 * queries - base[I].sum(1))
    torch.testing.assert_close(x.grad, slope, rtol=1e-4, atol=1e-4)


def test_wrong_selectors_are_refused():
    index, _, queries = shared(PLAIN)
    before = snapshot(index)
    for selector, error in (
        (torch.zeros(3), TypeError),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError),
        (torch.zeros(3, 1, dtype=torch.bool), ValueError),
        (torch.zeros(3, dtype=torch.int64, device="meta"), ValueError),
    ):
        for search in (index.search, index.range_search):
            with pytest.raises(error, match="selector"):
                search(queries, 3, params=SearchParams(selector=selector))
    assert same_state(before, snapshot(index))


# --- range search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", ["half", "one in thirty", "none"])
@each_mode
@each_metric
def test_range_search_with_a_selector(chosen, mode, metric):
    index, base, queries = shared(PLAIN, metric, search_mode=mode)
    radius = _radius(index, queries)
    ids = ids_of(chosen, len(base))
    for selector in (ids, mask_of(ids, len(base))):
        found = index.range_search(queries, radius, params=SearchParams(selector=selector))
        count = check_range(found, queries, only(stored_rows(index), ids), metric, radius, probed(index, queries))
        assert count > 0 or chosen == "none"


@each_mode
@each_metric
def test_a_radius_for_each_query(mode, metric):
    index, _, queries = shared(problem("bad queries"), metric, search_mode=mode)
    middle = _radius(index, queries)
    radii = torch.linspace(0.5, 1.5, len(queries)) * middle
    radii[2] = torch.inf if metric == "l2" else -torch.inf
    lims, D, I = index.range_search(queries, radii)
    own, lists = stored_rows(index), probed(index, queries)
    for q, radius in enumerate(radii.tolist()):
        part = slice(int(lims[q]), int(lims[q + 1]))
        one = torch.tensor([0, part.stop - part.start])
        rows = Probed(lists.required[q : q + 1], lists.allowed[q : q + 1])
        check_range((one, D[part], I[part]), queries[q : q + 1], own, metric, radius, rows)
    assert torch.equal(index.range_search(queries, radii.double())[0], lims)
    same = index.range_search(queries, torch.tensor(middle))
    assert torch.equal(same[0], index.range_search(queries, middle)[0])


def test_range_search_on_a_flat_index_with_all_parameters():
    index, base, queries = flat(problem("wide"))
    radii = normal(len(queries), seed=2).abs() * 100
    selector = torch.arange(0, len(base), 5)
    lims, _, _ = index.range_search(queries, radii, params=SearchParams(selector=selector))
    distances = torch.cdist(queries.double(), base[::5].double()).square()
    clear = ((distances - radii[:, None].double()).abs() > 1e-3).all(1)
    counts = (distances < radii[:, None].double()).sum(1)
    assert torch.equal(lims.diff()[clear], counts[clear])


def test_range_search_ignores_the_budget():
    index, _, queries = shared(PLAIN)
    radius = _radius(index, queries)
    expected = index.range_search(queries, radius)
    found = index.range_search(queries, radius, params=SearchParams(candidate_budget=20, max_codes=5))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("radius", [torch.ones(3), torch.ones(19, 1), float("nan"), torch.full((19,), torch.nan)])
def test_wrong_radii_are_refused(radius):
    index, _, queries = shared(PLAIN)
    with pytest.raises(ValueError, match="radius"):
        index.range_search(queries, radius)


def _radius(index, queries) -> float:
    D = index.search(queries, 20)[0]
    return float(D[D.isfinite()].median())
