"""Removing and updating vectors, before and after deleted rows are packed."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from tests.datasets import PLAIN, normal, problem
from tests.kinds import KINDS, as_stored, each_empty, each_kind, pending_removals
from tests.oracle import agree, check, check_range, probed, stored_rows
from tests.problems import each_metric, each_mode, shared
from tests.states import unchanged
from tests.threads import together
from torch_ivf_module import SearchParams
from torch_ivf_module.index.pending import PendingUpdates

LAST = 2**63 - 1


def deepcopied(index):
    """A copy with the same updates pending as in `index`; deepcopy alone would pack them in both."""
    updates, index.store._updates = index.store._updates, PendingUpdates()
    other, index.store._updates = deepcopy(index), updates
    other.store._updates = deepcopy(updates)
    return other


# --- removing and updating ------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("how", ["ids", "mask"])
def test_remove(kind, how):
    index, base, queries = KINDS[kind]()
    removed = torch.zeros(len(base), dtype=torch.bool)
    removed[::3] = True
    given = removed if how == "mask" else removed.nonzero()[:, 0].flip(0)
    count = index.remove_ids(given)
    assert type(count) is int
    assert count == int(removed.sum())
    assert index.ntotal == len(base) - count
    ids, vectors, _ = stored_rows(index)
    assert torch.equal(ids.sort().values, (~removed).nonzero()[:, 0])
    assert torch.equal(vectors, as_stored(index, base).double()[ids])
    lists = probed(index, queries) if not index.store.flat else None
    check(index.search(queries, 10), queries, stored_rows(index), "l2", 10, lists)
    index.add(base[:1])
    assert int(index.list_ids.max()) == len(base)


@each_empty
def test_remove_ignores_unknown_ids_and_removes_every_duplicate(empty):
    index = empty()
    index.add_with_ids(normal(6, 8), torch.tensor([4, 9, 4, -7, 4, LAST]))
    with unchanged(index):
        assert index.remove_ids(torch.tensor([5, 1000, -(2**63)])) == 0
        assert index.remove_ids(torch.tensor([], dtype=torch.int64)) == 0
    assert index.remove_ids(torch.tensor([4, 4, 77])) == 3
    assert index.remove_ids(torch.tensor([LAST, -7])) == 2
    assert index.list_ids.tolist() == [9]
    assert index.remove_ids(torch.tensor([9])) == 1
    D, I = index.search(normal(3, 8), 2)
    assert (I == -1).all()
    assert (D == torch.inf).all()


@each_kind
def test_reset_removes_the_vectors_and_keeps_the_centroids(kind):
    index, base, queries = KINDS[kind]()
    centroids = index.centroids.clone()
    index.add(base[:2])
    index.reset()
    assert index.ntotal == 0
    assert torch.equal(index.centroids, centroids)
    assert index.is_trained
    assert (index.search(queries, 3)[1] == -1).all()
    assert index.range_search(queries, 100.0)[0].tolist() == [0] * (len(queries) + 1)
    index.add(base)
    assert index.ntotal == len(base)
    assert index.list_ids.sort().values.tolist() == list(range(len(base))), (
        "numbered from 0 again, as in faiss"
    )
    lists = probed(index, queries) if not index.store.flat else None
    check(index.search(queries, 10), queries, stored_rows(index), "l2", 10, lists)


@each_kind
def test_update_replaces_the_vectors_of_ids(kind):
    index, base, queries = KINDS[kind]()
    ids = torch.tensor([3, 499, 0, 250])
    new = normal(4, PLAIN.d, seed=77)
    numbering = int(index.next_id)
    index.update(ids, new)
    assert index.ntotal == len(base)
    assert int(index.next_id) == numbering
    expected = base.clone()
    expected[ids] = new
    expected = as_stored(index, expected)
    now = stored_rows(index)
    assert torch.equal(now.vectors, expected.double()[now.ids])
    lists = probed(index, queries) if not index.store.flat else None
    check(index.search(queries, 10), queries, now, "l2", 10, lists)
    if not index.store.flat:
        given = base.clone()
        given[ids] = new
        assert probed(index, given[now.ids], nprobe=1).allowed[torch.arange(len(base)), now.lists].all()
    index.update(ids[:0], new[:0])


@each_kind
def test_update_right_after_an_add(kind):
    index, base, _ = KINDS[kind]()
    index.add(base[:3])
    index.update(torch.tensor([len(base) + 1]), base[7:8])
    assert torch.equal(index.reconstruct(len(base) + 1), as_stored(index, base[7:8])[0])
    assert torch.equal(index.reconstruct(len(base) + 2), as_stored(index, base[2:3])[0])


# --- deleted rows before packing ------------------------------------------------------------------------------


@each_mode
@each_metric
@pytest.mark.parametrize(
    ("case", "dtype", "profile"),
    [
        (PLAIN, torch.float32, "speed"),
        (PLAIN, torch.float32, "exact"),
        (PLAIN, torch.float16, "speed"),
        (problem("wide"), torch.float32, "speed"),
    ],
)
def test_deleted_rows_are_not_found_before_packing(metric, mode, case, dtype, profile):
    index, base, queries = shared(case, metric, dtype, search_mode=mode)
    removed = torch.randperm(len(base), generator=torch.Generator().manual_seed(3))[: len(base) // 10]
    assert index.remove_ids(removed) == len(removed)
    index.add(normal(3, case.d, seed=4))
    index.remove_ids(torch.tensor([len(base)]))  # a pending row
    k, params = 12, SearchParams(profile=profile)
    found = index.search(queries, k, params=params)
    radius = float(found[0][found[1] != -1].median())
    near = index.range_search(queries, radius)
    assert pending_removals(index)
    reference = stored_rows(deepcopy(index))
    assert len(reference.ids) == index.ntotal == len(base) - len(removed) + 2
    assert not torch.isin(reference.ids, removed).any()
    check(found, queries, reference, metric, k, probed(index, queries))
    check_range(near, queries, reference, metric, radius, probed(index, queries))


@each_mode
def test_max_codes_does_not_count_deleted_rows(mode):
    index, base, queries = shared(PLAIN, search_mode=mode, nprobe=PLAIN.nlist)
    packed = deepcopy(index)
    for ids in torch.arange(len(base) // 10).split(10):
        index.remove_ids(ids)
        packed.remove_ids(ids)
        packed.list_ids  # noqa: B018 - packs
        assert pending_removals(index)
        for cap in (150, 200, 250, 300):
            params = SearchParams(max_codes=cap)
            agree(
                deepcopied(index).search(queries, 10, params=params),
                packed.search(queries, 10, params=params),
            )


@each_kind
def test_many_deleted_rows_are_packed_at_once(kind):
    index, base, _ = KINDS[kind](PLAIN)
    index.remove_ids(torch.arange(len(base) // 8 - 1))
    assert pending_removals(index)
    index.remove_ids(torch.arange(len(base) // 8 + 8))
    assert not pending_removals(index)
    assert index.store.packed.shape[0] == index.ntotal


@each_kind
def test_reading_the_buffers_packs_deleted_rows(kind):
    for read in (
        lambda index: index.state_dict()["list_ids"],
        lambda index: index.list_ids,
        lambda index: dict(index.named_buffers())["list_ids"],
        lambda index: deepcopy(index).list_ids,
    ):
        index, base, _ = KINDS[kind](PLAIN)
        index.remove_ids(torch.arange(5))
        assert pending_removals(index)
        assert sorted(read(index).tolist()) == list(range(5, len(base)))


def test_removing_twice_and_again_after_adding():
    index = KINDS["ivf"](PLAIN).index
    ids = torch.tensor([3, 4, 5])
    assert index.remove_ids(ids) == 3
    assert index.remove_ids(ids) == 0
    x = normal(3, PLAIN.d, seed=5)
    index.add_with_ids(x, ids)
    assert torch.equal(index.reconstruct_batch(ids.flip(0)), x.flip(0))
    assert index.remove_ids(ids[:1]) == 1
    assert index.remove_ids(ids[:1]) == 0
    with pytest.raises(KeyError, match="3"):
        index.reconstruct_batch(ids)
    with pytest.raises(KeyError, match="3"):
        index.update(ids, x)
    assert pending_removals(index)


def test_repeated_updates_keep_no_old_rows():
    index, base, queries = shared(PLAIN, nprobe=PLAIN.nlist)
    ids = torch.arange(40)
    for step in range(60):
        index.update(ids, normal(40, PLAIN.d, seed=step))
    assert index.store._updates._stored_rows < 1000
    assert index.ntotal == len(base)
    found = index.search(queries, 7)
    check(found, queries, stored_rows(deepcopy(index)), "l2", 7)
    assert torch.equal(index.reconstruct_n(0, 40), normal(40, PLAIN.d, seed=59))


def test_graphs_notice_a_removal_that_is_not_packed():
    index, _, queries = shared(PLAIN)
    graph = index.graph()
    index.remove_ids(torch.tensor([10**6]))
    graph(queries)
    index.remove_ids(torch.tensor([1]))
    assert pending_removals(index)
    with pytest.raises(RuntimeError, match="changed"):
        graph(queries)
    agree(index.graph()(queries), index.search(queries, index.k))


def test_removal_inside_and_outside_of_inference_mode():
    index, base, queries = shared(PLAIN)
    with torch.inference_mode():
        index.remove_ids(torch.arange(3))
        index.add(base[:4])
    index.remove_ids(torch.tensor([4, len(base)]))
    with torch.inference_mode():
        index.remove_ids(torch.tensor([5, len(base) + 1]))
    index.remove_ids(torch.tensor([6]))
    check(index.search(queries, 5), queries, stored_rows(deepcopy(index)), "l2", 5, probed(index, queries))


@each_kind
def test_threads_that_remove_and_search(kind):
    index, base, queries = KINDS[kind](PLAIN)
    rows = len(base) // 4

    def work(number):
        mine = torch.arange(number * rows, number * rows + rows // 2)
        for part in mine.split(5):
            assert index.remove_ids(part) == len(part)
            found = index.search(queries[:4], 5)[1]
            assert not torch.isin(found, part).any()

    together(work)
    left = torch.arange(4 * rows).view(4, rows)[:, rows // 2 :].flatten()
    assert index.list_ids.sort().values.tolist() == [*left.tolist(), *range(4 * rows, len(base))]


@each_metric
def test_removal_agrees_with_faiss(faiss, metric):
    index, base, queries = shared(PLAIN, metric)
    quantizer = faiss.IndexFlatL2(PLAIN.d) if metric == "l2" else faiss.IndexFlatIP(PLAIN.d)
    quantizer.add(index.centroids.numpy())
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    theirs = faiss.IndexIVFFlat(quantizer, PLAIN.d, index.nlist, kind)
    theirs.nprobe = index.nprobe
    rows = torch.nn.functional.normalize(base) if metric == "cosine" else base
    prepared = torch.nn.functional.normalize(queries) if metric == "cosine" else queries
    theirs.add(rows.numpy())
    generator = torch.Generator().manual_seed(11)
    for _ in range(6):
        ids = torch.randint(0, len(base), (len(base) // 40,), generator=generator)
        assert index.remove_ids(ids) == theirs.remove_ids(ids.numpy())
        D_, I = theirs.search(prepared.numpy(), 9)
        wanted = torch.from_numpy(np.asarray(D_)), torch.from_numpy(np.asarray(I))
        wanted[0][wanted[1] == -1] = torch.inf if metric == "l2" else -torch.inf
        agree(index.search(queries, 9), wanted, rtol=1e-4, atol=1e-4)
