"""Reading vectors back by id, statistics of lists, memory."""

from __future__ import annotations

import pytest
import torch

from tests.datasets import PLAIN, normal
from tests.kinds import KINDS, as_stored, each_empty, each_kind, pending_removals, trained
from tests.oracle import comparable
from tests.problems import each_dtype, each_metric, flat, shared
from tests.states import unchanged
from torch_ivf_module import IndexFlatL2, IndexIVFFlat
from torch_ivf_module.functional.id_lookup import last_of, matches, order_of, rows_with

LAST = 2**63 - 1


# --- reconstruct ---------------------------------------------------------------------------------------------


@each_dtype
@each_metric
def test_reconstruct(dtype, metric):
    index, base, _ = shared(PLAIN, metric, dtype)
    expected = comparable(base, metric)
    step = dict(rtol=torch.finfo(dtype).eps, atol=1e-6)
    for id in (0, 7, len(base) - 1):
        row = index.reconstruct(id)
        assert row.shape == (PLAIN.d,)
        torch.testing.assert_close(row.double(), expected[id], **step)
    rows = index.reconstruct_n(10, 25)
    torch.testing.assert_close(rows.double(), expected[10:35], **step)
    if metric == "cosine":
        torch.testing.assert_close(rows.double().norm(dim=1), torch.ones(25).double(), rtol=1e-2, atol=0)
    assert torch.equal(index.reconstruct(torch.tensor(7)), index.reconstruct(7))
    assert index.reconstruct_n(0, index.ntotal).shape == (len(base), PLAIN.d)


@each_kind
def test_reconstructed_rows_are_copies(kind):
    index, _, _ = KINDS[kind]()
    with unchanged(index):
        index.reconstruct(3).zero_()
        index.reconstruct_n(0, 9).zero_()


@each_empty
def test_reconstruct_of_unknown_and_duplicate_ids(empty):
    index = empty()
    given = normal(9, 8)
    x = as_stored(index, given)
    with pytest.raises(KeyError, match="0"):
        index.reconstruct(0)
    index.add_with_ids(given[:4], torch.tensor([5, -3, 5, 5]))
    assert torch.equal(index.reconstruct(5), x[3])
    index.state_dict()
    index.add_with_ids(given[4:6], torch.tensor([5, 6]))
    assert torch.equal(index.reconstruct(5), x[4])
    index.state_dict()
    assert torch.equal(index.reconstruct(5), x[4])
    assert torch.equal(index.reconstruct(-3), x[1])
    for unknown in (4, -1, 7, LAST):
        with pytest.raises(KeyError, match=f"{unknown}"):
            index.reconstruct(unknown)
    with pytest.raises(KeyError):
        index.reconstruct_n(5, 3)


def test_the_last_added_row_of_an_id_may_be_in_any_list():
    """The row added last may be in an earlier list than the row added first."""
    index = trained()
    near = index.centroids.clone()
    for first in range(4):
        for last in range(4):
            index.reset()
            index.add_with_ids(near[first : first + 1], torch.tensor([1]))
            index.add_with_ids(near[last : last + 1], torch.tensor([1]))
            index.state_dict()
            assert torch.equal(index.reconstruct(1), near[last])
            assert torch.equal(index.reconstruct_n(1, 1)[0], near[last])


# --- search_and_reconstruct, statistics, memory ---------------------------------------------------------------


def test_search_and_reconstruct_returns_the_vectors_of_the_ids():
    """For a duplicate id the row of the result, not the one added last; NaN for padding; the storage dtype."""
    index = IndexFlatL2(2, dtype=torch.float16)
    index.add_with_ids(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([7, 7]))
    D_, I, R = index.search_and_reconstruct(torch.tensor([[1.0, 0.0]]), 3)
    assert D_.tolist() == [[1.0, 9.0, torch.inf]]
    assert I.tolist() == [[7, 7, -1]]
    assert R.dtype == torch.float16
    assert R[0, :2].tolist() == [[0.0, 0.0], [4.0, 0.0]]
    assert R[0, 2].isnan().all()
    assert index.search_and_reconstruct(torch.zeros(0, 2), 3)[2].shape == (0, 3, 2)
    index.reset()
    assert index.search_and_reconstruct(torch.zeros(1, 2), 2)[2].isnan().all()


def test_search_and_reconstruct_agrees_with_faiss(faiss):
    index, base, queries = flat(PLAIN)
    theirs = faiss.IndexFlatL2(PLAIN.d)
    theirs.add(base.numpy())
    _, I, R = theirs.search_and_reconstruct(queries.numpy(), 4)
    mine = index.search_and_reconstruct(queries, 4)
    same = mine[1] == torch.from_numpy(I)
    assert same.float().mean() > 0.99
    assert torch.equal(mine[2][same], torch.from_numpy(R)[same])


def test_reconstructing_does_not_pack():
    index, base, _ = shared(PLAIN)
    index.remove_ids(torch.tensor([0]))
    index.add(base[:2])
    assert torch.equal(index.reconstruct(len(base)), base[0])
    assert torch.equal(index.reconstruct_batch(torch.tensor([1, len(base) + 1, 1])), base[[1, 1, 1]])
    assert index.reconstruct_batch(torch.zeros(0, dtype=torch.int64)).shape == (0, PLAIN.d)
    assert pending_removals(index)


def test_list_statistics():
    index = IndexIVFFlat(2, nlist=4, nprobe=4)
    assert index.list_stats() == (0, 0, 0, 0.0, 0, 1.0)
    assert index.list_sizes().shape == (0,)
    index.centroids = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    index.list_offsets = torch.zeros(5, dtype=torch.int64)
    assert index.list_stats() == (4, 4, 0, 0.0, 0, 1.0)
    index.add(torch.tensor([[0.0, 0.0]] * 5 + [[10.0, 0.0]] * 2 + [[0.0, 10.0]]))
    assert index.list_sizes().tolist() == [5, 2, 1, 0]
    stats = index.list_stats()
    assert stats[:5] == (4, 1, 0, 1.5, 5)
    assert stats.imbalance == pytest.approx(4 * (25 + 4 + 1) / 64)
    index.remove_ids(torch.tensor([0]))
    assert index.list_sizes().tolist() == [4, 2, 1, 0]
    assert flat(PLAIN).index.list_stats()[:3] == (1, 0, PLAIN.nb)


def test_memory_bytes_counts_the_tensors():
    index = IndexFlatL2(8)
    empty = index.memory_bytes()
    index.add(torch.zeros(1000, 8))
    index.add(torch.zeros(10, 8))
    assert index.memory_bytes() - empty >= 1010 * (32 + 8)
    derived = index.memory_bytes()
    index.search(torch.zeros(1, 8), 1)
    assert index.memory_bytes() >= derived + 4000  # a bias for each row


# --- ids to rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_ids(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-4, 12, (seed * 7,), generator=generator)
    wanted = torch.randint(-6, 14, (6,), generator=generator).unique()
    expected = [
        (row, place)
        for place, id in enumerate(wanted.tolist())
        for row, other in enumerate(ids.tolist())
        if id == other
    ]
    rows, which = rows_with(ids, order_of(ids), wanted)
    assert list(zip(rows.tolist(), which.tolist(), strict=True)) == expected
    rows, which = matches(ids, wanted)
    assert list(zip(rows.tolist(), which.tolist(), strict=True)) == sorted(expected)
    last = last_of(rows, which, len(wanted)).tolist()
    assert last == [
        max([row for row, place in expected if place == at], default=-1) for at in range(len(wanted))
    ]
