"""A change that fails after it has begun, for lack of memory or since it is interrupted, is undone."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch

from tests.datasets import normal
from tests.oracle import agree
from tests.problems import few_training_rows
from tests.states import unchanged
from torch_ivf_module import IndexFlatL2, IndexIVFFlat, SearchParams
from torch_ivf_module.index import groups as packing
from torch_ivf_module.index import store as store_module
from torch_ivf_module.index import version as version_module

D = 8
X = normal(600, D)
EVERY = SearchParams(nprobe=16)


def ivf() -> IndexIVFFlat:
    with few_training_rows():
        index = IndexIVFFlat(D, nlist=16, nprobe=16).train(X)
    index.add(X, groups=torch.arange(600) % 3)
    index.add_with_ids(X[:40] + 1, torch.arange(40))  # of two rows each
    return index


def flat() -> IndexFlatL2:
    index = IndexFlatL2(D)
    index.add(X)
    return index


CHANGES = {
    "add": lambda index: index.add(normal(2000, D, seed=1)),
    "add_with_ids": lambda index: index.add_with_ids(normal(2000, D, seed=1), torch.arange(2000)),
    "update": lambda index: index.update(torch.arange(400), normal(400, D, seed=1)),
    "remove_ids": lambda index: index.remove_ids(torch.arange(100, 400)),
    "merge_from": lambda index: index.merge_from(copy.deepcopy(index), add_id=1000),
    "rebalance": lambda index: index.rebalance(),
}


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize(
    ("made", "change"), [*((ivf, name) for name in CHANGES), *((flat, name) for name in CHANGES if name != "rebalance")]
)
def test_a_change_that_cannot_pack_its_rows_is_undone(made, change, searched, error):
    index = made()
    index.state_dict()
    if change == "rebalance":
        index.add(normal(600, D, seed=2) * 0.1 + 3)
    before = copy.deepcopy(index)
    found = index.search(X[:20], 5) if searched else None
    with unchanged(index):
        with patch.object(store_module, "repacked", side_effect=error), pytest.raises(error):
            CHANGES[change](index)
        assert index.ntotal == before.ntotal
        if found is not None:
            agree(index.search(X[:20], 5), found)
        ids = torch.arange(0, 600, 7)
        assert torch.equal(index.reconstruct_batch(ids), before.reconstruct_batch(ids))
    CHANGES[change](index)
    CHANGES[change](before)
    assert torch.equal(index.list_ids, before.list_ids)


def test_a_removal_of_a_second_packing_is_undone_with_the_first():
    index = ivf()
    index.state_dict()
    before = index.reconstruct_batch(torch.arange(600))
    joined = patch.object(packing, "append_by_group", side_effect=MemoryError)
    with unchanged(index), joined, pytest.raises(MemoryError):
        index.update(torch.arange(600), normal(600, D, seed=1))  # packs once without the old rows
    assert torch.equal(index.reconstruct_batch(torch.arange(600)), before)


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError])
def test_what_a_change_computes_for_later_searches_may_fail(error):
    index = ivf()
    index.search(X[:1], 1)
    with patch.object(version_module, "derive", side_effect=error):
        index.add(normal(2000, D, seed=1))
        with pytest.raises(error):
            index.search(X[:1], 1)
    assert index.ntotal == 2640
    agree(index.search(X[:20], 5, params=EVERY), copy.deepcopy(index).search(X[:20], 5, params=EVERY))


def test_a_change_copies_no_list_of_pending_rows():
    """Else adding rows one by one to an index that nobody searches would take quadratic time."""
    index = IndexFlatL2(4)
    index.add(torch.zeros(100, 4))
    index.add(torch.ones(1, 4))
    columns = [getattr(index.store._updates, name) for name in ("_x", "_ids", "_assigned", "_groups")]
    for _ in range(3):
        index.add(torch.ones(1, 4))
    assert [len(column) for column in columns] == [4] * 4
