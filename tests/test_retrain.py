"""Training again on a filled index, and the ids of its vectors."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from tests.datasets import PLAIN, normal
from tests.oracle import agree, check, probed, stored_rows
from tests.problems import each_metric, few_training_rows, ivf
from tests.states import unchanged
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, SearchParams


@each_metric
def test_retraining_moves_vectors_to_their_new_lists(metric):
    index, _, queries = ivf(PLAIN, metric)
    drift = normal(300, PLAIN.d, seed=8) * 0.2 + 2
    index.add(drift)
    index.remove_ids(torch.arange(20))
    before, everything = deepcopy(index), SearchParams(nprobe=index.nlist)
    with few_training_rows():
        report = index.retrain(niter=3)
    assert 0 < report.moved <= report.total == index.ntotal == before.ntotal
    assert report.imbalance_before == before.imbalance_factor()
    assert report.imbalance == index.imbalance_factor()
    contents = (stored_rows(index), stored_rows(before))
    lists, old = (dict(zip(stored.ids.tolist(), stored.lists.tolist(), strict=True)) for stored in contents)
    assert report.moved == sum(lists[id] != old[id] for id in old)
    agree(index.search(queries, 9, params=everything), before.search(queries, 9, params=everything))
    check(index.search(queries, 9), queries, stored_rows(index), metric, 9, probed(index, queries))


def test_retraining_without_changes_moves_no_vector():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
    index = IndexIVFFlat(2, nlist=2)
    with few_training_rows():
        index.train(x, niter=10)
        index.add(x)
        assert index.retrain()[:2] == (0, 4)
        assert index.retrain(x[[0, 0, 0, 2]], niter=1)[:2] == (0, 4)
        far = torch.cat([x, x + 100])  # one centroid moves to the far rows, and its old rows are assigned to the other
        assert index.retrain(far).moved == 2
    with pytest.raises(RuntimeError, match="train"):
        IndexIVFFlat(2).retrain()
    with unchanged(index), pytest.raises(ValueError, match="at least 2"):
        index.retrain(x[:1])
    with unchanged(index), pytest.raises(TypeError, match="niter"):
        index.retrain(x, niter=1.5)


@pytest.mark.parametrize("seed", range(5))
def test_retraining_lists_with_few_rows(seed):
    """Clusters are split for empty ones until no cluster has a second distinct row."""
    generator = torch.Generator().manual_seed(seed)
    index = IndexIVFFlat(8, nlist=16)
    with few_training_rows():
        index.train(torch.randn(6, 8, generator=generator).repeat(3, 1))
        index.train(torch.randn(100, 8, generator=generator))
        index.add(torch.randn(16, 8, generator=generator) * 0.3)
        assert index.retrain().total == 16
    assert torch.isfinite(index.centroids).all()


def test_ids_assigned_before_a_merge_are_not_assigned_again():
    index, other = IndexFlatL2(2), IndexFlatL2(2)
    other.add(torch.ones(5, 2))
    other.remove_ids(torch.tensor([4]))
    index.merge_from(other, add_id=10)
    assert int(index.next_id) == 15


def test_updating_zero_rows_before_training_is_refused():
    with pytest.raises(RuntimeError, match="train"):
        IndexIVFFlat(2, nlist=2).update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2))


def test_list_ids_that_the_caller_replaces_are_returned():
    index = IndexFlatL2(2)
    index.add(torch.eye(2))
    index.search(torch.eye(2), 1)
    index.list_ids = index.list_ids + 100
    assert index.search(torch.eye(2), 1)[1].flatten().tolist() == [100, 101]
