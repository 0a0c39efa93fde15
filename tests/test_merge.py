"""merge_from and copy_subset, against faiss."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from tests.datasets import PLAIN
from tests.kinds import KINDS, each_kind
from tests.oracle import agree, check, probed, stored_rows
from tests.problems import few_training_rows, shared
from tests.states import same_state, snapshot, unchanged
from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat


def test_merging_agrees_with_faiss(faiss):
    index, base, queries = shared(PLAIN)
    other = deepcopy(index)
    half = len(base) // 2
    index.remove_ids(torch.arange(half, len(base)))
    other.remove_ids(torch.arange(half))
    quantizer = faiss.IndexFlatL2(PLAIN.d)
    quantizer.add(index.centroids.numpy())
    first, second = (faiss.IndexIVFFlat(quantizer, PLAIN.d, index.nlist) for _ in range(2))
    first.nprobe = index.nprobe
    first.add_with_ids(base[:half].numpy(), np.arange(half))
    second.add_with_ids(base[half:].numpy(), np.arange(half, len(base)))
    first.merge_from(second, 1000)
    index.merge_from(other, 1000)
    assert (index.ntotal, other.ntotal) == (first.ntotal, second.ntotal) == (len(base), 0)
    wanted = [torch.from_numpy(part) for part in first.search(queries.numpy(), 9)]
    agree(
        index.search(queries, 9),
        (wanted[0].masked_fill(wanted[1] == -1, torch.inf), wanted[1]),
        rtol=1e-4,
        atol=1e-4,
    )
    assert index.imbalance_factor() == pytest.approx(first.invlists.imbalance_factor())


def test_merging_keeps_which_duplicate_was_added_last():
    index = IndexIVFFlat(2, nlist=2, nprobe=2)
    with few_training_rows():
        index.train(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    other = deepcopy(index)
    for x in (9.0, 0.0, 9.0, 0.0):
        other.add_with_ids(torch.full((1, 2), x), torch.tensor([5]))
        other.list_ids  # noqa: B018 - packs
        merged, part = deepcopy(index), deepcopy(other)
        assert part.copy_subset(torch.tensor([5])).reconstruct(5).tolist() == [x, x]
        merged.merge_from(part)
        assert merged.reconstruct(5).tolist() == [x, x]
        merged.list_ids  # noqa: B018
        assert merged.reconstruct(5).tolist() == [x, x]


def test_merging_converts_the_dtype_and_refuses_overflow():
    half, full = IndexFlatL2(2, dtype=torch.float16), IndexFlatL2(2)
    full.add(torch.tensor([[1.0, 2.0], [1e6, 0.0]]))
    with unchanged(half), unchanged(full), pytest.raises(ValueError, match="row 1"):
        half.merge_from(full)
    full.remove_ids(torch.tensor([1]))
    half.merge_from(full)
    assert half.reconstruct(0).dtype == torch.float16


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda index: index, "another"),
        (lambda index: IndexIVFFlat(PLAIN.d + 1), "d ="),
        (lambda index: IndexIVFFlat(PLAIN.d, metric="ip"), "metric"),
        (lambda index: IndexIVFFlat(PLAIN.d), "centroids"),
        (lambda index: IndexFlatL2(PLAIN.d), "without a centroid"),
        (lambda index: _moved(index), "same centroids"),
    ],
)
def test_merging_different_indexes_names_the_difference(other, says):
    index = shared(PLAIN).index
    other = other(index)
    with unchanged(index), unchanged(other), pytest.raises(ValueError, match=says):
        index.merge_from(other)


def _moved(index):
    other = deepcopy(index)
    other.centroids = other.centroids + 1
    return other


def test_merging_other_objects_and_untrained_indexes():
    index = shared(PLAIN).index
    with unchanged(index), pytest.raises(TypeError, match="list"):
        index.merge_from([])
    with unchanged(index), pytest.raises(TypeError, match="add_id"):
        index.merge_from(deepcopy(index), 0.5)
    with pytest.raises(RuntimeError, match="train"):
        IndexIVFFlat(3).merge_from(IndexIVFFlat(3))


def test_merged_ids_are_not_assigned_again():
    one, two = IndexFlatIP(2), IndexFlatIP(2)
    one.add(torch.ones(2, 2))
    two.add(torch.ones(3, 2))
    one.merge_from(two, add_id=int(one.next_id))
    one.add(torch.ones(1, 2))
    two.add(torch.ones(1, 2))
    assert one.list_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert two.list_ids.tolist() == [0], "next_id is that after reset()"


@each_kind
def test_copy_subset_has_the_settings_and_own_tensors(kind):
    index, base, queries = KINDS[kind](PLAIN, k=3, search_mode="csr")
    before = snapshot(index)
    mask = torch.zeros(len(base), dtype=torch.bool)
    mask[::3] = True
    part = index.copy_subset(mask)
    assert type(part) is type(index)
    assert part.config() == index.config()
    assert part.next_id == index.next_id
    lists = probed(part, queries) if not index.store.flat else None
    check(part.search(queries, 4), queries, stored_rows(part), "l2", 4, lists)
    for buffer in part.buffers():
        buffer.zero_()
    assert same_state(snapshot(index), before)
