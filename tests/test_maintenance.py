"""Removing, replacing, merging, copying parts and reading back, while changes wait and after they are packed."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import rule

from tests.problems import (
    METRICS,
    MODES,
    PLAIN,
    agree,
    check,
    check_range,
    few_training_rows,
    flat,
    held,
    ivf,
    lattice,
    normal,
    probed,
    problem,
    same_state,
    shared,
    snapshot,
    unchanged,
)
from tests.test_properties import IDS, SEEDS, SIZES, STEPS, D, Flat, InvertedFile
from tests.test_threads import together
from torch_ivf_module import IndexFlatIP, IndexFlatL2, IndexIVFFlat, SearchParams
from torch_ivf_module.functional.id_lookup import last_of, matches, rows_with
from torch_ivf_module.index.pending import PendingUpdates

KINDS = {"ivf": shared, "flat": flat}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("mode", MODES)
each_metric = pytest.mark.parametrize("metric", METRICS)


def waits(index) -> bool:
    """Whether removed rows are marked and not yet taken out."""
    return index._updates.gone_rows > 0


def deepcopied(index):
    """A copy in which removed rows wait as they do in `index`; deepcopy alone would take them out of both."""
    staging, index._updates = index._updates, PendingUpdates()
    other, index._updates = deepcopy(index), staging
    other._updates = deepcopy(staging)
    return other


# --- everything in any order, against a list of (id, vector) ------------------------------------------------


class _More:
    """Rules for what the machines of test_properties do not do."""

    @rule(size=SIZES, ids=st.lists(IDS, max_size=6), seed=SEEDS, add_id=st.integers(-3, 50))
    def merge(self, size, ids, seed, add_id):
        other = self.make()
        x, y = self.vectors(size, seed), self.vectors(len(ids), seed + 1)
        other.add(x)
        other.add_with_ids(y, torch.tensor(ids, dtype=torch.int64))
        moved = [(id + add_id, row) for id, row in zip([*range(size), *ids], [*x, *y], strict=True)]
        if any(id == -1 or not -(2**63) <= id < 2**63 for id, _ in moved):
            with pytest.raises(ValueError, match="add_id"):
                self.index.merge_from(other, add_id)
            assert other.ntotal == size + len(ids)
            return
        self.index.merge_from(other, add_id)
        assert other.ntotal == 0
        self.rows += moved
        self.next_id = max([self.next_id, *(id + 1 for id, _ in moved)])

    @rule(ids=st.lists(st.one_of(IDS, st.just(-1)), max_size=8))
    def copy_subset(self, ids):
        before = self.index.ntotal
        part = self.index.copy_subset(torch.tensor(ids, dtype=torch.int64))
        kept = [(id, x) for id, x in self.rows if id in ids]
        state = part.state_dict()
        stored = sorted(zip(state["list_ids"].tolist(), state["packed_embeddings"].tolist(), strict=True))
        assert stored == sorted((id, x.tolist()) for id, x in kept)
        assert self.index.ntotal == before
        part.remove_ids(torch.tensor(ids, dtype=torch.int64))
        assert part.ntotal == 0
        assert self.index.ntotal == before

    @rule(size=st.integers(1, 30), pick=st.integers(0, 10**6))
    def churn(self, size, pick):
        """Take some out and put the same ids in again, with nothing read in between."""
        if self.rows:
            ids = list(dict.fromkeys(self.rows[(pick + i) % len(self.rows)][0] for i in range(size)))
            self.remove(ids)
            self.add_with_ids(ids, pick % 1000)

    @rule(seed=SEEDS, k=st.integers(1, 12))
    def reconstruct_what_is_found(self, seed, k):
        queries = lattice(3, D, seed=seed, reach=5) + 0.5
        D_, I, R = self.index.search_and_reconstruct(queries, k)
        padding = I == -1
        assert torch.equal(R.isnan().all(2), padding)
        assert torch.equal((R - queries[:, None]).square().sum(2)[~padding], D_[~padding])
        for id, x in zip(I[~padding].tolist(), R[~padding], strict=True):
            assert any(id == other and torch.equal(x.float(), y) for other, y in self.rows)


class AnyInvertedFile(_More, InvertedFile):
    @rule()
    def retrain(self):
        if self.index.ntotal >= self.index.nlist:
            with few_training_rows():
                report = self.index.retrain(niter=1)
                assert 0 <= report.moved <= report.total == len(self.rows)
                self.index.train(lattice(60, D, seed=9, reach=4), niter=2)  # as `make` does: `merge` needs it


class AnyFlat(_More, Flat):
    pass


TestAnyInvertedFile = AnyInvertedFile.TestCase
TestAnyInvertedFile.settings = STEPS
TestAnyFlat = AnyFlat.TestCase
TestAnyFlat.settings = STEPS


# --- removal that waits -------------------------------------------------------------------------------------


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
def test_removed_rows_are_not_found_while_they_wait(metric, mode, case, dtype, profile):
    index, base, queries = shared(case, metric, dtype, search_mode=mode)
    gone = torch.randperm(len(base), generator=torch.Generator().manual_seed(3))[: len(base) // 10]
    assert index.remove_ids(gone) == len(gone)
    index.add(normal(3, case.d, seed=4))
    index.remove_ids(torch.tensor([len(base)]))  # one that was added a moment ago
    k, params = 12, SearchParams(profile=profile)
    found = index.search(queries, k, params=params)
    radius = float(found[0][found[1] != -1].median())
    near = index.range_search(queries, radius)
    assert waits(index)
    reference = held(deepcopy(index))
    assert len(reference.ids) == index.ntotal == len(base) - len(gone) + 2
    assert not torch.isin(reference.ids, gone).any()
    check(found, queries, reference, metric, k, probed(index, queries))
    check_range(near, queries, reference, metric, radius, probed(index, queries))


@each_mode
def test_a_cap_on_rows_does_not_count_removed_ones(mode):
    index, base, queries = shared(PLAIN, search_mode=mode, nprobe=PLAIN.nlist)
    packed = deepcopy(index)
    for some in torch.arange(len(base) // 10).split(10):
        index.remove_ids(some)
        packed.remove_ids(some)
        packed.list_ids  # noqa: B018 - packs
        assert waits(index)
        for cap in (150, 200, 250, 300):
            params = SearchParams(max_codes=cap)
            agree(deepcopied(index).search(queries, 10, params=params), packed.search(queries, 10, params=params))


@each_kind
def test_many_removed_rows_are_taken_out_at_once(kind):
    index, base, _ = KINDS[kind](PLAIN)
    index.remove_ids(torch.arange(len(base) // 8 - 1))
    assert waits(index)
    index.remove_ids(torch.arange(len(base) // 8 + 8))
    assert not waits(index)
    assert index._raw("packed_embeddings").shape[0] == index.ntotal


@each_kind
def test_reading_the_buffers_packs_what_was_removed(kind):
    for read in (
        lambda index: index.state_dict()["list_ids"],
        lambda index: index.list_ids,
        lambda index: dict(index.named_buffers())["list_ids"],
        lambda index: deepcopy(index).list_ids,
    ):
        index, base, _ = KINDS[kind](PLAIN)
        index.remove_ids(torch.arange(5))
        assert waits(index)
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
    assert waits(index)


def test_updating_the_same_ids_again_and_again_keeps_nothing_old():
    index, base, queries = shared(PLAIN, nprobe=PLAIN.nlist)
    ids = torch.arange(40)
    for step in range(60):
        index.update(ids, normal(40, PLAIN.d, seed=step))
    assert index._updates._held < 1000
    assert index.ntotal == len(base)
    found = index.search(queries, 7)
    check(found, queries, held(deepcopy(index)), "l2", 7)
    assert torch.equal(index.reconstruct_n(0, 40), normal(40, PLAIN.d, seed=59))


def test_graphs_notice_a_removal_that_waits():
    index, _, queries = shared(PLAIN)
    graph = index.graph()
    index.remove_ids(torch.tensor([10**6]))
    graph(queries)
    index.remove_ids(torch.tensor([1]))
    assert waits(index)
    with pytest.raises(RuntimeError, match="changed"):
        graph(queries)
    agree(index.graph()(queries), index.search(queries, index.k))


def test_removal_between_inference_mode_and_without():
    index, base, queries = shared(PLAIN)
    with torch.inference_mode():
        index.remove_ids(torch.arange(3))
        index.add(base[:4])
    index.remove_ids(torch.tensor([4, len(base)]))
    with torch.inference_mode():
        index.remove_ids(torch.tensor([5, len(base) + 1]))
    index.remove_ids(torch.tensor([6]))
    check(index.search(queries, 5), queries, held(deepcopy(index)), "l2", 5, probed(index, queries))


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
    asked = torch.nn.functional.normalize(queries) if metric == "cosine" else queries
    theirs.add(rows.numpy())
    generator = torch.Generator().manual_seed(11)
    for _ in range(6):
        ids = torch.randint(0, len(base), (len(base) // 40,), generator=generator)
        assert index.remove_ids(ids) == theirs.remove_ids(ids.numpy())
        D_, I = theirs.search(asked.numpy(), 9)
        wanted = torch.from_numpy(np.asarray(D_)), torch.from_numpy(np.asarray(I))
        wanted[0][wanted[1] == -1] = torch.inf if metric == "l2" else -torch.inf
        agree(index.search(queries, 9), wanted, rtol=1e-4, atol=1e-4)


# --- merging and copying ------------------------------------------------------------------------------------


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
        index.search(queries, 9), (wanted[0].masked_fill(wanted[1] == -1, torch.inf), wanted[1]), rtol=1e-4, atol=1e-4
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


def test_merging_converts_the_dtype_and_refuses_what_it_cannot_hold():
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
def test_merging_says_what_differs(other, says):
    index = shared(PLAIN).index
    other = other(index)
    with unchanged(index), unchanged(other), pytest.raises(ValueError, match=says):
        index.merge_from(other)


def _moved(index):
    other = deepcopy(index)
    other.centroids = other.centroids + 1
    return other


def test_merging_with_what_is_no_index_and_before_training():
    index = shared(PLAIN).index
    with unchanged(index), pytest.raises(TypeError, match="list"):
        index.merge_from([])
    with unchanged(index), pytest.raises(TypeError, match="add_id"):
        index.merge_from(deepcopy(index), 0.5)
    with pytest.raises(RuntimeError, match="train"):
        IndexIVFFlat(3).merge_from(IndexIVFFlat(3))


def test_merged_ids_are_not_given_out_again():
    one, two = IndexFlatIP(2), IndexFlatIP(2)
    one.add(torch.ones(2, 2))
    two.add(torch.ones(3, 2))
    one.merge_from(two, add_id=int(one.next_id))
    one.add(torch.ones(1, 2))
    two.add(torch.ones(1, 2))
    assert one.list_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert two.list_ids.tolist() == [0], "as after reset()"


@each_kind
def test_a_copied_subset_has_the_settings_and_shares_nothing(kind):
    index, base, queries = KINDS[kind](PLAIN, k=3, search_mode="csr")
    before = snapshot(index)
    mask = torch.zeros(len(base), dtype=torch.bool)
    mask[::3] = True
    part = index.copy_subset(mask)
    assert type(part) is type(index)
    assert part.config() == index.config()
    assert part.next_id == index.next_id
    lists = probed(part, queries) if kind == "ivf" else None
    check(part.search(queries, 4), queries, held(part), "l2", 4, lists)
    for buffer in part.buffers():
        buffer.zero_()
    assert same_state(snapshot(index), before)


# --- reading ------------------------------------------------------------------------------------------------


def test_found_vectors_are_the_ones_that_were_found():
    """Of a duplicate id the row that was found, not the last; NaN for padding; the storage dtype."""
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


def test_found_vectors_agree_with_faiss(faiss):
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
    assert waits(index)


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


def test_memory_is_what_the_tensors_take():
    index = IndexFlatL2(8)
    empty = index.memory_bytes()
    index.add(torch.zeros(1000, 8))
    index.add(torch.zeros(10, 8))
    assert index.memory_bytes() - empty >= 1010 * (32 + 8)
    derived = index.memory_bytes()
    index.search(torch.zeros(1, 8), 1)
    assert index.memory_bytes() >= derived + 4000  # a bias for each row


# --- training again -----------------------------------------------------------------------------------------


@each_metric
def test_retraining_moves_vectors_and_loses_none(metric):
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
    lists, old = (dict(zip(now.ids.tolist(), now.lists.tolist(), strict=True)) for now in (held(index), held(before)))
    assert report.moved == sum(lists[id] != old[id] for id in old)
    agree(index.search(queries, 9, params=everything), before.search(queries, 9, params=everything))
    check(index.search(queries, 9), queries, held(index), metric, 9, probed(index, queries))


def test_retraining_where_nothing_changes_moves_nothing():
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 9.0], [9.0, 8.0]])
    index = IndexIVFFlat(2, nlist=2)
    with few_training_rows():
        index.train(x, niter=10)
        index.add(x)
        assert index.retrain()[:2] == (0, 4)
        assert index.retrain(x[[0, 0, 0, 2]], niter=1)[:2] == (0, 4)
        far = torch.cat([x, x + 100])  # one centroid goes to the far ones, and leaves its rows to the other
        assert index.retrain(far).moved == 2
    with pytest.raises(RuntimeError, match="train"):
        IndexIVFFlat(2).retrain()
    with unchanged(index), pytest.raises(ValueError, match="at least 2"):
        index.retrain(x[:1])
    with unchanged(index), pytest.raises(TypeError, match="niter"):
        index.retrain(x, niter=1.5)


@pytest.mark.parametrize("seed", range(5))
def test_retraining_lists_that_have_few_rows(seed):
    """Splitting a cluster for an empty one, again and again, until no row is left to spare."""
    generator = torch.Generator().manual_seed(seed)
    index = IndexIVFFlat(8, nlist=16)
    with few_training_rows():
        index.train(torch.randn(6, 8, generator=generator).repeat(3, 1))
        index.train(torch.randn(100, 8, generator=generator))
        index.add(torch.randn(16, 8, generator=generator) * 0.3)
        assert index.retrain().total == 16
    assert torch.isfinite(index.centroids).all()


def test_ids_given_out_before_a_merge_are_not_given_again():
    index, other = IndexFlatL2(2), IndexFlatL2(2)
    other.add(torch.ones(5, 2))
    other.remove_ids(torch.tensor([4]))
    index.merge_from(other, add_id=10)
    assert int(index.next_id) == 15


def test_updating_nothing_before_training_is_refused_as_adding_is():
    with pytest.raises(RuntimeError, match="train"):
        IndexIVFFlat(2, nlist=2).update(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2))


def test_ids_that_were_exchanged_are_the_ones_that_are_found():
    index = IndexFlatL2(2)
    index.add(torch.eye(2))
    index.search(torch.eye(2), 1)
    index.list_ids = index.list_ids + 100
    assert index.search(torch.eye(2), 1)[1].flatten().tolist() == [100, 101]


# --- ids to rows --------------------------------------------------------------------------------------------


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
    rows, which = rows_with(ids, torch.argsort(ids, stable=True), wanted)
    assert list(zip(rows.tolist(), which.tolist(), strict=True)) == expected
    rows, which = matches(ids, wanted)
    assert list(zip(rows.tolist(), which.tolist(), strict=True)) == sorted(expected)
    last = last_of(rows, which, len(wanted)).tolist()
    assert last == [max([row for row, place in expected if place == at], default=-1) for at in range(len(wanted))]
