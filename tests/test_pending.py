"""Answers do not depend on pending and deleted rows that are not packed, for any search parameters."""

from __future__ import annotations

import functools
from copy import deepcopy

import pytest
import torch

from tests.datasets import normal
from tests.oracle import agree
from tests.problems import each_metric, each_mode, few_training_rows
from tests.states import same_state, snapshot
from torch_ivf_module import IndexIVFFlat, SearchParams
from torch_ivf_module.functional import metric as metrics

N, D, K = 1500, 12, 10
PARAMS = [
    None,
    SearchParams(profile="exact"),
    SearchParams(max_codes=150),
    SearchParams(candidate_budget=120),
    SearchParams(candidate_budget=200, budget_strategy="uniform", strict_budget=True),
    SearchParams(max_codes_cap_per_list=9),
    SearchParams(selector=torch.arange(0, 3 * N, 7)),
    SearchParams(selector=torch.arange(3 * N) % 2 == 0, max_codes=150),
    SearchParams(selector=torch.arange(0, 3 * N, 5), candidate_budget=120),
]


@functools.cache
def filled(metric: str, ordered: bool) -> IndexIVFFlat:
    """A trained index with N vectors."""
    index = IndexIVFFlat(D, nlist=16, nprobe=5, metric=metric)
    with few_training_rows():
        index.train(normal(N, D)).add(normal(N, D))
    if ordered:
        index.rebuild_lists()
    return index


def changed(metric: str, ordered: bool) -> IndexIVFFlat:
    """An index with pending rows, and with deleted rows that are not packed."""
    index = deepcopy(filled(metric, ordered))
    index.store.pack()
    index.remove_ids(torch.arange(0, 150, 3))
    index.add(normal(60, D, seed=4))
    index.update(torch.arange(200, 220), normal(20, D, seed=5))
    other = deepcopy(index)
    other.reset()
    other.add_with_ids(normal(30, D, seed=6), torch.arange(30) + 2 * N)
    index.merge_from(other)
    index.remove_ids(torch.arange(2 * N, 2 * N + 5))
    return index


@each_metric
@each_mode
@pytest.mark.parametrize("ordered", [False, True])
def test_answers_do_not_depend_on_packing(metric, mode, ordered):
    queries = normal(25, D, seed=9)
    for params in PARAMS:
        index = changed(metric, ordered)
        assert index.store._updates
        packed = deepcopy(index)
        assert not packed.store._updates
        index.search_mode = mode
        agree(index.search(queries, K, params=params), packed.search(queries, K, params=params), atol=1e-5)
        if params is None or params.selector is not None:
            radius = packed.search(queries, 8)[0][:, 7] + 1e-5
            lims = changed(metric, ordered).range_search(queries, radius, params=params)[0]
            assert lims.tolist() == packed.range_search(queries, radius, params=params)[0].tolist()
        assert index.ntotal == packed.ntotal == N - 50 + 60 + 25


def test_pending_rows_are_appended_in_order():
    """Rows that were sorted stay sorted, in front of the rows that were added later."""
    index = changed("l2", ordered=True)
    assert index.list_ordering == metrics.ORDERING["l2"]
    before = index.list_ids
    deleted = set(range(0, 150, 3)) | set(range(200, 220))
    for start, end in zip(index.list_offsets[:-1].tolist(), index.list_offsets[1:].tolist(), strict=True):
        old = [id < N and id not in deleted for id in before[start:end].tolist()]
        assert old == sorted(old, reverse=True)
    rebuilt = deepcopy(index)
    rebuilt.rebuild_lists()
    assert not same_state(snapshot(rebuilt), snapshot(index))
    assert rebuilt.list_ids.sort().values.equal(index.list_ids.sort().values)
