"""A selector and exclusions for each query, against exhaustive search of the rows that pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.datasets import PLAIN, Problem, problem
from tests.fuzz.filters import passing
from tests.kinds import KINDS
from tests.oracle import Reach, agree, check, check_range, probed, stored_rows
from tests.problems import each_metric, each_mode, each_problem, flat, shared
from tests.states import same_state, snapshot
from torch_ivf_module import IndexFlatL2, IndexPreTransform, SearchParams, native
from torch_ivf_module.functional import filtered_search
from torch_ivf_module.functional.filters import Filter, id_lists, rows_as_lists, rows_in_mask
from torch_ivf_module.functional.lists import offsets_of

FILTERS = ("masks", "few masks", "lists", "few ids", "exclude", "masks, exclude", "few ids, exclude", "nothing")
each_filter = pytest.mark.parametrize("name", FILTERS)


def settings(name: str, queries: int, n: int) -> dict[str, Any]:
    """Fields of SearchParams for an index with ids below n: different filters for the queries, one of them empty."""
    generator = torch.Generator().manual_seed(7)
    share = 0.02 if "few" in name else 0.5
    mask = torch.rand(queries, n + 5, generator=generator) < share
    mask[queries // 2 : queries // 2 + 1] = False
    lists = [torch.nonzero(row)[:, 0] for row in mask]
    unknown = torch.tensor([-7, n + 9, 2**62])
    lists[:1] = [torch.cat([ids.flip(0), ids, unknown]) for ids in lists[:1]]  # in any order, twice, and some unknown
    chosen: dict[str, Any] = {}
    if "masks" in name or name == "nothing":
        chosen["selector"] = mask[:, :0] if name == "nothing" else mask
    if "lists" in name or "few ids" in name:
        chosen["selector"] = lists
    if "exclude" in name:
        chosen["exclude"] = torch.randint(-1, n, (queries, 30), generator=generator)
        chosen["exclude"][:1] = -1
    return chosen


def reach(index: Any, queries: Tensor, allowed: Tensor, **limits: Any) -> Reach:
    """The rows that each query must and may find, of those `allowed` (Q, N)."""
    if index.store.flat:
        return Reach(allowed, allowed)
    lists, own = probed(index, queries, **limits), stored_rows(index).lists
    return Reach(lists.required[:, own] & allowed, lists.allowed[:, own] & allowed)


def checked(index: Any, queries: Tensor, k: int, chosen: dict[str, Any], **limits: Any) -> None:
    own = stored_rows(index)
    rows = reach(index, queries, passing(own.ids, len(queries), **chosen), **limits)
    found = index.search(queries, k, params=SearchParams(**chosen, **limits))
    check(found, queries, own, index.metric, k, rows)


@each_filter
@each_mode
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_index(kind, mode, name):
    index, base, queries = KINDS[kind](PLAIN, search_mode=mode)
    checked(index, queries, 10, settings(name, len(queries), len(base)))


@each_filter
@each_metric
@pytest.mark.parametrize("codes", [None, 8])
@pytest.mark.parametrize("lookup", [0, 10**9])
def test_lists_are_looked_up_or_read(codes, lookup, metric, name, monkeypatch):
    monkeypatch.setattr(filtered_search, "_LOOKUP_ROWS", {True: lookup, False: lookup})
    monkeypatch.setattr(filtered_search, "_CALLS_ROWS", 0)
    index, base, queries = shared(PLAIN, metric, codes=codes)
    checked(index, queries, 10, settings(name, len(queries), len(base)))


@each_problem
@each_mode
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_every_case(case, mode, metric):
    index, base, queries = shared(case, metric, search_mode=mode)
    for name in ("masks, exclude", "few masks", "few ids"):
        checked(index, queries, case.k, settings(name, len(queries), len(base)))


@each_filter
@pytest.mark.parametrize("codes", [None, 8])
@pytest.mark.parametrize("data", ["gaussian", "translated", "clumps", "lattice", "mixed"])
def test_many_queries_of_each_list(data, codes, name):
    """Rows are then multiplied in panels, and on some of these data many queries take a second pass."""
    index, base, queries = shared(Problem("many", data, 3_000, 24, 200, 12, 3, 9), codes=codes)
    checked(index, queries, 9, settings(name, len(queries), len(base)))


@each_filter
def test_answers_do_not_depend_on_the_kernel(name):
    index, base, queries = shared(problem("wide"))
    chosen = settings(name, len(queries), len(base))
    found = index.search(queries, 21, params=SearchParams(**chosen))
    with native.disabled():
        agree(index.search(queries, 21, params=SearchParams(**chosen)), found)
    agree(index.search(queries, 21, params=SearchParams(**chosen, profile="exact")), found)


@each_filter
@each_mode
@pytest.mark.parametrize(
    "limits",
    [
        {"max_codes": 120},
        {"candidate_budget": 90},
        {"candidate_budget": 90, "strict_budget": True, "use_per_list_sizes": True},
        {"profile": "exact", "nprobe": 2},
    ],
    ids=str,
)
def test_limits_count_rows_that_do_not_pass(limits, mode, name):
    """The rows that a query reads are those that it reads without a filter."""
    index, base, queries = shared(PLAIN, search_mode=mode)
    chosen = settings(name, len(queries), len(base))
    D, I = index.search(queries, len(base), params=SearchParams(**limits))
    allowed = passing(torch.arange(len(base)), len(queries), **chosen)
    dropped = (I < 0) | ~allowed.gather(1, I.clamp(min=0))
    order = dropped.byte().argsort(stable=True, dim=1)[:, :10]
    expected = D.masked_fill(dropped, torch.inf).gather(1, order), I.masked_fill(dropped, -1).gather(1, order)
    agree(index.search(queries, 10, params=SearchParams(**limits, **chosen)), expected)


@each_mode
@each_metric
def test_pending_deleted_and_repeated_rows(mode, metric):
    index, base, queries = shared(PLAIN, metric, search_mode=mode)
    index.add(base[:30] * 1.01)
    index.remove_ids(torch.arange(0, 60, 3))
    index.add_with_ids(base[100:140] * 0.99, torch.arange(200, 240))
    index.add_with_ids(base[:4], torch.tensor([-5, -5, 2**62, -(2**63)]))
    for name in FILTERS:
        chosen = settings(name, len(queries), len(base) + 30)
        if "exclude" in chosen:
            chosen["exclude"][:, :3] = torch.tensor([-5, 2**62, 210])
        expected = SearchParams(**chosen)
        found = index.search(queries, 15, params=expected)  # before stored_rows packs what is pending
        own = stored_rows(index)
        check(found, queries, own, metric, 15, reach(index, queries, passing(own.ids, len(queries), **chosen)))
        agree(index.search(queries, 15, params=expected), found)


@each_metric
def test_exclusions_of_everything_and_of_nothing(metric):
    index, base, queries = shared(PLAIN, metric)
    everything = torch.arange(len(base)).expand(len(queries), -1)
    D, I = index.search(queries, 5, params=SearchParams(exclude=everything))
    assert (I == -1).all()
    assert D.isinf().all()
    for nothing in (torch.full((len(queries), 3), -1), torch.empty(len(queries), 0, dtype=torch.int64)):
        agree(index.search(queries, 5, params=SearchParams(exclude=nothing)), index.search(queries, 5))
    found = index.search(queries, 5, params=SearchParams(exclude=everything[:, 1:], nprobe=12))[1]
    assert set(found.flatten().tolist()) == {0, -1}


def test_a_selector_of_all_queries_with_exclusions():
    index, base, queries = shared(PLAIN)
    exclude = torch.randint(0, len(base), (len(queries), 9))
    for selector in (torch.arange(0, len(base), 2), torch.arange(len(base)) % 3 > 0, torch.arange(3)):
        lists = [selector if selector.dtype != torch.bool else torch.nonzero(selector)[:, 0]] * len(queries)
        expected = index.search(queries, 8, params=SearchParams(selector=lists, exclude=exclude))
        agree(index.search(queries, 8, params=SearchParams(selector=selector, exclude=exclude)), expected)


@each_mode
def test_little_memory(mode):
    index, base, queries = shared(problem("wide"), search_mode=mode, max_bytes=1 << 14)
    for name in ("few ids, exclude", "masks, exclude"):
        checked(index, queries, 10, settings(name, len(queries), len(base)))


def test_queries_that_are_not_finite_and_no_queries():
    index, base, queries = shared(problem("bad queries"))
    for name in FILTERS:
        checked(index, queries, 5, settings(name, len(queries), len(base)))
    none = {"selector": torch.empty(0, 9, dtype=torch.bool), "exclude": torch.empty(0, 2, dtype=torch.int64)}
    assert index.search(queries[:0], 5, params=SearchParams(**none))[1].shape == (0, 5)
    empty = IndexFlatL2(2)
    for chosen in ({"exclude": [[1]]}, {"selector": [[3]]}, {"selector": [[True]]}):
        assert empty.search(torch.ones(1, 2), 2, params=SearchParams(**chosen))[1].tolist() == [[-1, -1]]


def test_arrays_and_lists_are_taken():
    index = IndexFlatL2(1)
    index.add(torch.arange(5.0)[:, None])
    x = torch.tensor([[0.0], [4.0]])
    for selector in ([[1, 2], [0]], [torch.tensor([1, 2]), torch.tensor([0])], (range(1, 3), [0])):
        assert index.search(x, 2, params=SearchParams(selector=selector))[1].tolist() == [[1, 2], [0, -1]]
    masks = [[False, True, True], [True, False, False]]
    assert index.search(x, 2, params=SearchParams(selector=masks))[1].tolist() == [[1, 2], [0, -1]]
    exclude = torch.tensor([[0], [4]]).int().numpy()
    assert index.search(x, 2, params=SearchParams(exclude=exclude))[1].tolist() == [[1, 2], [3, 2]]


# --- range search -------------------------------------------------------------------------------------------


@each_filter
@each_mode
@each_metric
def test_range_search(metric, mode, name):
    index, base, queries = shared(PLAIN, metric, search_mode=mode)
    index.add(base[:20] * 1.01)
    radius = float(index.search(queries, 20)[0].median())
    chosen = settings(name, len(queries), len(base) + 20)
    found = index.range_search(queries, radius, params=SearchParams(**chosen))
    own = stored_rows(index)
    rows = reach(index, queries, passing(own.ids, len(queries), **chosen))
    assert (check_range(found, queries, own, metric, radius, rows) > 0) == (name != "nothing")


# --- gradients, transforms, vectors -------------------------------------------------------------------------


@each_filter
def test_with_vectors_a_transform_and_gradients(name):
    index, base, queries = shared(PLAIN)
    params = SearchParams(**settings(name, len(queries), len(base)))
    expected = index.search(queries, 5, params=params)
    D, I, R = index.search_and_reconstruct(queries, 5, params=params)
    agree((D, I), expected)
    assert torch.equal(R[I >= 0], base[I[I >= 0]])
    agree(IndexPreTransform(16, torch.nn.Identity(), index).search(queries, 5, params=params), expected)
    x = queries.clone().requires_grad_()
    D, I = index.search(x, 5, params=params)
    agree((D.detach(), I), expected)
    torch.where(I < 0, 0, D).sum().backward()
    slope = 2 * (queries[:, None] - base[I.clamp(min=0)]) * (I >= 0)[..., None]
    torch.testing.assert_close(x.grad, slope.sum(1), rtol=1e-4, atol=1e-4)


@each_filter
def test_the_queries_of_all_entries_of_a_batch_have_the_same_filters(name):
    index, base, queries = shared(PLAIN)
    params = SearchParams(**settings(name, 6, len(base)))
    batch = torch.stack([queries[:6], queries[6:12], queries[12:18]])
    found = torch.func.vmap(lambda x: index.search(x, 4, params=params))(batch)
    expected = [index.search(x, 4, params=params) for x in batch]
    agree([part.flatten(0, 1) for part in found], [torch.cat(parts) for parts in zip(*expected, strict=True)])
    nested = torch.func.vmap(torch.func.vmap(lambda x: index.search(x, 4, params=params)))(batch[None])
    assert torch.equal(nested[1][0], found[1])


def test_filters_that_a_transform_batches_are_refused():
    index, _, queries = shared(PLAIN)
    with pytest.raises(ValueError, match=r"exclude is transformed by torch\.func"):
        torch.func.vmap(lambda x, e: index.search(x, 3, params=SearchParams(exclude=e)))(
            queries[:4, None], torch.ones(4, 1, 2, dtype=torch.int64)
        )


# --- errors -------------------------------------------------------------------------------------------------

Q = 19
WRONG = [
    ({"selector": torch.ones(3, 20, dtype=torch.bool)}, ValueError, r"selector must have a row for each of the 19"),
    ({"selector": torch.ones(Q, 2, 2, dtype=torch.bool)}, ValueError, r"selector must have shape \(n,\) or \(19, n\)"),
    ({"selector": torch.ones(Q, 2, dtype=torch.int64)}, ValueError, r"selector .* ids for each query are a list of 19"),
    ({"selector": torch.ones(Q, 2)}, TypeError, r"selector must be bool masks"),
    ({"selector": [[1], [2, 3]]}, ValueError, r"selector must have a list of ids for each of the 19 queries, got 2"),
    ({"selector": [[1]] * (Q - 1) + [torch.ones(2)]}, TypeError, r"selector\[18\] must be int64"),
    ({"selector": [[1]] * (Q - 1) + [[[1]]]}, ValueError, r"selector\[18\] must have shape \(n,\)"),
    ({"exclude": torch.ones(Q, dtype=torch.int64)}, ValueError, r"exclude must have shape \(19, m\), got \(19,\)"),
    ({"exclude": torch.ones(4, 2, dtype=torch.int64)}, ValueError, r"exclude must have a row for each of the 19"),
    ({"exclude": torch.ones(Q, 2)}, TypeError, r"exclude must be int64"),
    ({"exclude": torch.ones(Q, 2, dtype=torch.int64, device="meta")}, ValueError, r"exclude is on meta"),
]


@pytest.mark.parametrize(("chosen", "error", "match"), WRONG)
def test_wrong_filters_are_refused(chosen, error, match):
    index, _, queries = shared(PLAIN)
    assert len(queries) == Q
    before = snapshot(index)
    for search in (index.search, index.range_search, index.search_and_reconstruct):
        with pytest.raises(error, match=match):
            search(queries, 3, params=SearchParams(**chosen))
    assert same_state(before, snapshot(index))


def test_params_with_filters_compare_by_identity():
    lists, exclude = (torch.arange(3), torch.arange(2)), torch.ones(2, 1, dtype=torch.int64)
    one, other = (SearchParams(selector=lists, exclude=exclude) for _ in range(2))
    assert one == other
    assert hash(one) == hash(other)
    assert one != SearchParams(selector=lists, exclude=exclude.clone())
    assert one.per_query
    assert not SearchParams(selector=[1, 2]).per_query


def test_the_stats_say_how_filters_were_applied():
    index, base, queries = flat(PLAIN)
    kernel = "native" if native.available() else "rows"
    chosen = {"few ids": kernel if native.available() else "ids", "masks": kernel}
    for name, mode in chosen.items():
        params = SearchParams(debug_stats=True, **settings(name, len(queries), len(base)))
        index.search(queries, 3, params=params)
        assert index.last_search_stats["mode"] == mode


# --- the parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_membership_in_lists_and_masks(seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 5, (40 * seed,), generator=generator).sort().values
    ids = torch.randint(-9, 9, (40 * seed,), generator=generator)
    lists, wanted = id_lists(ids, offsets_of(numbers, 5)), torch.randint(-12, 12, (7, 30), generator=generator)
    of = torch.randint(0, 5, (7,), generator=generator)
    expected = torch.stack([torch.isin(row, ids[numbers == number]) for row, number in zip(wanted, of, strict=True)])
    assert torch.equal(Filter(of, allowed=lists).passes(wanted), expected)
    assert torch.equal(Filter(of, excluded=lists).passes(wanted), ~expected)
    kept = [part.tolist() for part in lists.ids.tensor_split(lists.last[:-1])]
    assert kept == [sorted(set(ids[numbers == number].tolist())) for number in range(5)]
    rows = torch.randint(-3, 9, (5, seed), generator=generator)
    expected = torch.stack([torch.isin(row, rows[number]) for row, number in zip(wanted, of, strict=True)])
    assert torch.equal(Filter(of, excluded=rows_as_lists(rows)).passes(wanted), ~expected)
    mask = torch.rand(5, 9, generator=generator) < 0.5
    passed = Filter(of, mask=mask).passes(wanted)
    assert passed.tolist() == [
        [0 <= id < 9 and bool(mask[number, id]) for id in row.tolist()] for row, number in zip(wanted, of, strict=True)
    ]
    at = torch.arange(30).expand(7, -1)
    assert torch.equal(rows_in_mask(mask[of], wanted[0], at), Filter(of, mask=mask).passes(wanted[0][at]))
