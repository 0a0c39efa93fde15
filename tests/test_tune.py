"""tune: what it finds reaches the recall, is the least that does, and leaves the index alone."""

from __future__ import annotations

import pytest
import torch

from tests.datasets import normal
from tests.problems import few_training_rows, flat
from tests.states import unchanged
from torch_ivf_module import IndexIVFFlat, SearchParams, tune
from torch_ivf_module.tune import recall

K = 10


@pytest.fixture(scope="module", params=["l2", "ip"])
def case(request):
    """An index and queries that are not in it."""
    x = normal(3100, 8, seed=2)
    index = IndexIVFFlat(8, nlist=24, nprobe=3, metric=request.param)
    with few_training_rows():
        index.train(x[:3000], niter=3)
    index.add(x[:3000])
    return index, x[3000:]


def share(index, queries, **settings):
    """The recall of one search, counted here."""
    every = index.search(queries, K, params=SearchParams(nprobe=index.nlist))[1]
    found = index.search(queries, K, params=SearchParams(**settings))[1]
    hits = sum(len({*a} & {*b}) for a, b in zip(every.tolist(), found.tolist(), strict=True))
    return hits / every.numel()


@pytest.mark.parametrize("target", [0.5, 0.9, 0.97, 1.0])
def test_tune_finds_the_smallest_nprobe(case, target):
    index, queries = case
    with unchanged(index):
        found = tune(index, queries, target_recall=target, k=K, budget=None)
    assert found.reached
    assert found.budget is None
    assert found.recall == pytest.approx(share(index, queries, nprobe=found.nprobe))
    assert found.recall >= target
    assert found.nprobe == 1 or share(index, queries, nprobe=found.nprobe - 1) < target
    assert found.params == SearchParams(nprobe=found.nprobe)
    assert found.seconds > 0
    assert [point.nprobe for point in found.curve] == sorted({point.nprobe for point in found.curve})
    assert all(point.recall == pytest.approx(share(index, queries, nprobe=point.nprobe)) for point in found.curve)


def test_tune_finds_a_budget(case):
    index, queries = case
    found = tune(index, queries, target_recall=0.9, k=K)
    assert share(index, queries, nprobe=found.nprobe, max_codes=found.budget) >= 0.9
    limited = [point for point in found.curve if point.budget is not None]
    for point in limited:
        assert point.nprobe == found.nprobe
        measured = share(index, queries, nprobe=point.nprobe, max_codes=point.budget)
        assert point.recall == pytest.approx(measured)
    # The smallest budget that reaches the recall was tried; with 1/64 less the recall is too low.
    unit = -(-int(index.list_sizes().topk(found.nprobe).values.sum()) // 64)
    least = min(point.budget for point in limited if point.recall >= 0.9)
    assert share(index, queries, nprobe=found.nprobe, max_codes=max(1, least - unit)) < 0.9 or least == unit
    assert found.budget in (None, least)


def test_a_budget_of_candidates_reaches_the_recall(case):
    index, queries = case
    found = tune(index, queries, target_recall=0.9, k=K, budget="candidate_budget")
    assert found.reached
    assert share(index, queries, nprobe=found.nprobe, candidate_budget=found.budget) >= 0.9
    assert any(point.budget for point in found.curve)


def test_an_index_with_a_cap_of_its_own(case):
    index, queries = case
    free = tune(index, queries, target_recall=0.9, k=K, budget=None)
    index.max_codes = 1
    try:
        with unchanged(index):
            found = tune(index, queries, target_recall=0.9, k=K, budget=None)
        ids = index.search(queries, K, params=found.params)[1]
        assert found.params.max_codes == 0, "0 is no limit, also after more vectors are added"
    finally:
        index.max_codes = None
    assert (found.nprobe, found.recall) == (free.nprobe, free.recall)
    assert torch.equal(ids, index.search(queries, K, params=free.params)[1])


def test_apply(case):
    index, queries = case
    before = index.nprobe
    try:
        found = tune(index, queries, target_recall=0.8, k=K, apply=True)
        assert (index.nprobe, index.max_codes) == (found.nprobe, found.budget)
    finally:
        index.nprobe, index.max_codes = before, None


def test_a_recall_that_cannot_be_reached(case):
    index, queries = case
    truth = torch.full((len(queries), K), 10**6)
    truth[:, :4] = index.search(queries, 4, params=SearchParams(nprobe=index.nlist))[1]
    with unchanged(index):
        found = tune(index, queries, truth, target_recall=0.5, k=K, apply=True)
    assert not found.reached
    assert found.nprobe == index.nlist
    assert found.recall == pytest.approx(0.4)


def test_ground_truth_of_more_columns_and_with_padding(case):
    index, queries = case
    truth = index.search(queries, 3 * K, params=SearchParams(nprobe=index.nlist))[1]
    assert tune(index, queries, truth, 1.0, K, budget=None).recall == 1.0
    truth[:, 2:] = -1
    assert (
        tune(index, queries, truth, 1.0, K, budget=None).nprobe <= tune(index, queries, k=K, target_recall=1.0).nprobe
    )


def test_progress(case, capsys):
    pytest.importorskip("tqdm")
    index, queries = case
    tune(index, queries, k=K, verbose=True)
    assert "recall" in capsys.readouterr().err


def test_recall():
    assert recall(torch.tensor([[1, 2], [3, -1]]), torch.tensor([[2, 9], [3, -1]])) == pytest.approx(2 / 3)
    assert recall(torch.tensor([[-5, -1]]), torch.tensor([[-5, -1]])) == 1
    assert recall(torch.tensor([[-1]]), torch.tensor([[-1]])) == 1
    assert recall(torch.zeros(0, 3), torch.zeros(0, 3)) == 1


def test_wrong_arguments_of_tune_are_refused(case):
    index, queries = case
    for error, says, call in (
        (TypeError, "IndexFlatL2", lambda: tune(flat().index, queries)),
        (ValueError, "queries", lambda: tune(index, queries[:, :3])),
        (ValueError, "queries", lambda: tune(index, queries[:0])),
        (ValueError, "target_recall", lambda: tune(index, queries, target_recall=0.0)),
        (ValueError, "target_recall", lambda: tune(index, queries, target_recall=1.01)),
        (ValueError, "k must", lambda: tune(index, queries, k=0)),
        (ValueError, "budget", lambda: tune(index, queries, budget="nprobe")),
        (TypeError, "ground_truth", lambda: tune(index, queries, torch.zeros(len(queries), K))),
        (ValueError, "ground_truth", lambda: tune(index, queries, torch.zeros(3, K, dtype=torch.int64), k=K)),
        (RuntimeError, "empty", lambda: tune(IndexIVFFlat(8, nlist=2), queries)),
    ):
        with unchanged(index), pytest.raises(error, match=says):
            call()
