"""Search over the grid of cases, against the brute-force oracle; padding, max_codes and parameters."""

from __future__ import annotations

import math

import pytest
import torch

from tests.datasets import PLAIN, problem
from tests.oracle import agree, check, comparable, probed, stored_rows
from tests.problems import each_dtype, each_flat_metric, each_metric, each_mode, each_problem, flat, shared
from tests.states import unchanged
from torch_ivf_module import SearchParams

# --- the grid -------------------------------------------------------------------------------------------------


@each_problem
@each_mode
@each_dtype
@each_metric
def test_search_finds_the_best_of_the_probed_lists(case, mode, dtype, metric):
    index, _, queries = shared(case, metric, dtype, search_mode=mode)
    found = index.search(queries, case.k)
    check(found, queries, stored_rows(index), metric, case.k, probed(index, queries))


@each_problem
@each_mode
@each_dtype
@each_metric
def test_probing_every_list_is_exhaustive_search(case, mode, dtype, metric):
    index, _, queries = shared(case, metric, dtype, search_mode=mode, nprobe=case.nlist)
    check(index.search(queries, case.k), queries, stored_rows(index), metric, case.k)


@each_problem
@each_dtype
@each_flat_metric
def test_flat_search_is_exhaustive(case, dtype, metric):
    index, _, queries = flat(case, metric, dtype)
    check(index.search(queries, case.k), queries, stored_rows(index), metric, case.k)


@each_mode
@each_flat_metric
def test_flat_search_in_every_mode(mode, metric):
    index, _, queries = flat(problem("wide"), metric)
    index.search_mode = mode
    check(index.search(queries, 10), queries, stored_rows(index), metric, 10)


@each_problem
@each_dtype
@each_metric
def test_every_vector_is_stored_once_in_its_nearest_list(case, dtype, metric):
    index, base, _ = shared(case, metric, dtype)
    ids, vectors, lists = stored_rows(index)
    assert index.ntotal == len(base)
    assert torch.equal(ids.sort().values, torch.arange(len(base)))
    assert index.packed_embeddings.dtype == dtype
    expected = comparable(base, metric)[ids]
    kind = torch.finfo(dtype)
    relative = kind.eps + (4 * torch.finfo(torch.float32).eps if metric == "cosine" else 0)
    assert ((vectors - expected).abs() <= relative * expected.abs() + kind.tiny * kind.eps).all()
    if case.data == "overflow":  # the distances to all centroids overflow, so any list is right
        return
    nearest = probed(index, vectors.float(), nprobe=1)
    assert nearest.allowed[torch.arange(len(ids)), lists].all()


# --- padding, caps, parameters --------------------------------------------------------------------------------


@each_mode
@each_metric
def test_padding(mode, metric):
    index, base, queries = shared(problem("k above everything"), metric, search_mode=mode)
    D, I = index.search(queries, 50)
    n = len(base)
    assert (I[:, n:] == -1).all()
    assert (D[:, n:] == (math.inf if metric == "l2" else -math.inf)).all()
    assert torch.equal(I[:, :n].sort(1).values, torch.arange(n).expand(len(queries), -1))


@each_mode
@each_metric
def test_rows_with_different_numbers_of_candidates_are_padded_separately(mode, metric):
    """Some queries probe a full list, others an empty one: padding has both id -1 and an infinite distance."""
    index, _, queries = shared(PLAIN, metric, search_mode=mode, nprobe=1)
    ids, _, lists = stored_rows(index)
    index.remove_ids(ids[lists % 2 == 0])
    D, I = index.search(queries, 20)
    assert (I == -1).all(1).any()
    assert (I != -1).all(1).any()
    assert torch.equal(I == -1, D.isinf())
    check((D, I), queries, stored_rows(index), metric, 20, probed(index, queries))


@pytest.mark.parametrize("cap", [1, 60, 130, 10**9])
@each_mode
@each_metric
def test_max_codes_keeps_whole_lists_nearest_first(cap, mode, metric):
    index, _, queries = shared(PLAIN, metric, search_mode=mode, nprobe=6)
    expected = probed(index, queries, max_codes=cap)
    check(
        index.search(queries, 30, params=SearchParams(max_codes=cap)),
        queries,
        stored_rows(index),
        metric,
        30,
        expected,
    )
    index.max_codes = cap
    check(index.search(queries, 30), queries, stored_rows(index), metric, 30, expected)


@each_mode
def test_max_codes_reads_the_nearest_list_even_when_it_is_empty(mode):
    """An empty list does not count, so the lists after it are read as long as they fit."""
    index, _, queries = shared(PLAIN, "l2", search_mode=mode, nprobe=3)
    nearest = probed(index, queries[:1], nprobe=1).required[0]
    ids, _, lists = stored_rows(index)
    index.remove_ids(ids[nearest[lists]])
    query = queries[:1]
    for cap in (1, 10**6):
        expected = probed(index, query, max_codes=cap)
        found = index.search(query, 10, params=SearchParams(max_codes=cap))
        check(found, query, stored_rows(index), "l2", 10, expected)


@each_mode
def test_search_params_override_the_settings_of_the_index(mode):
    index, _, queries = shared(PLAIN, "l2", search_mode=mode, nprobe=2, max_codes=30)
    with unchanged(index):
        few = index.search(queries, 10)
        more = index.search(queries, 10, params=SearchParams(nprobe=5, max_codes=10**6))
    check(few, queries, stored_rows(index), "l2", 10, probed(index, queries, 2, 30))
    check(more, queries, stored_rows(index), "l2", 10, probed(index, queries, 5))


@each_mode
@each_metric
@pytest.mark.parametrize("name", ["gaussian", "far clumps"])
def test_profiles_exact_and_speed_give_the_same_results(mode, metric, name):
    index, _, queries = shared(PLAIN if name == "gaussian" else problem(name), metric, search_mode=mode)
    speed = index.search(queries, 10, params=SearchParams(profile="speed"))
    exact = index.search(queries, 10, params=SearchParams(profile="exact", debug_stats=True))
    agree(exact, speed, rtol=1e-6)
    assert index.last_search_stats["mode"] == "exact"
    assert index.last_search_stats["certified"] == 0  # the profile "exact" certifies nothing
