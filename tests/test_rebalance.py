"""Splitting long lists and dissolving short ones: `rebalance` and `auto_rebalance`.

Where all lists are probed, answers are those of brute force, whatever was moved.
"""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.datasets import normal
from tests.kinds import pending_removals
from tests.oracle import agree, check, stored_rows
from tests.problems import each_dtype, each_metric, few_training_rows
from tests.states import same_state, snapshot, unchanged
from torch_ivf_module import (
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexPreTransform,
    SearchParams,
    ShardedIndex,
    load,
)
from torch_ivf_module.functional import rebalance as planning
from torch_ivf_module.index import rebalancing
from torch_ivf_module.index.contents import Contents
from torch_ivf_module.index.rebalancing import Rebalanced

D, NLIST, N = 12, 24, 1200
EVERYTHING = SearchParams(nprobe=NLIST)
QUERIES = torch.cat([normal(15, D, seed=3), normal(15, D, seed=4) * 0.3 + 2])


@functools.cache
def _drifted(metric: str, dtype: torch.dtype, bits: int | None, drift: float) -> Any:
    kind = functools.partial(IndexIVFScalarQuantizer, bits=bits) if bits else IndexIVFFlat
    index = kind(D, nlist=NLIST, nprobe=4, metric=metric, dtype=dtype)
    with few_training_rows():
        index.train(normal(N, D).to(dtype))
    index.add(normal(300, D).to(dtype))
    index.add((normal(N, D, seed=2) * 0.3 + drift).to(dtype))
    index.store.pack()
    return index


def drifted(
    metric: str = "l2", dtype: torch.dtype = torch.float32, bits: int | None = None, drift: float = 2.0
) -> Any:
    """An index of which most vectors are in a few lists, since they are not distributed as those of the training."""
    return copy.deepcopy(_drifted(metric, dtype, bits, drift))


def contents(index: Any) -> Counter:
    """Ids and vectors, whatever list they are in."""
    stored = stored_rows(index)
    return Counter((id, tuple(x)) for id, x in zip(stored.ids.tolist(), stored.vectors.tolist(), strict=True))


def lists_of(index: Any) -> dict[int, int]:
    """The list of each id."""
    stored = stored_rows(index)
    return dict(zip(stored.ids.tolist(), stored.lists.tolist(), strict=True))


def exact(index: Any) -> None:
    """Assert that a search of all lists finds what brute force finds."""
    found = index.search(QUERIES, 9, params=EVERYTHING)
    check(found, QUERIES, stored_rows(index), index.metric, 9)


@each_metric
@each_dtype
def test_searches_of_all_lists_return_what_they_did_before(metric, dtype):
    index = drifted(metric, dtype)
    index.remove_ids(torch.arange(0, 100, 7))
    index.add((normal(20, D, seed=5) * 0.3 + 2).to(dtype))
    assert pending_removals(index)
    before, twin = index.search(QUERIES, 9, params=EVERYTHING), copy.deepcopy(index)
    report = index.rebalance()
    assert report.split >= 1
    assert report.merged >= 1
    agree(index.search(QUERIES, 9, params=EVERYTHING), before)
    exact(index)
    assert contents(index) == contents(twin)
    assert index.nlist == NLIST
    assert int(index.next_id) == int(twin.next_id)
    old, new = lists_of(twin), lists_of(index)
    assert report.moved == sum(old[id] != new[id] for id in old)
    assert report.total == index.ntotal == twin.ntotal
    assert report.imbalance_before == pytest.approx(twin.imbalance_factor())
    assert report.imbalance == pytest.approx(index.imbalance_factor())
    assert report.imbalance < report.imbalance_before


@each_metric
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_codes_are_moved_as_they_are(metric, bits):
    index = drifted(metric, bits=bits)
    index.remove_ids(torch.arange(0, 100, 7))
    index.add(normal(20, D, seed=5) * 0.3 + 2)
    twin = copy.deepcopy(index)
    assert index.rebalance().moved
    exact(index)
    assert contents(index) == contents(twin)


@each_metric
def test_searches_of_few_lists_find_more_in_fewer_rows(metric):
    index = drifted(metric)
    truth = index.search(QUERIES, 5, params=EVERYTHING)[1]

    def recall_and_rows() -> tuple[float, float]:
        params = SearchParams(nprobe=6, debug_stats=True)
        found = index.search(QUERIES, 5, params=params)[1]
        sizes, lists = index.list_sizes(), index.store.coarse()
        near = torch.cdist(QUERIES, lists.centroids) if metric == "l2" else -(QUERIES @ lists.centroids.T)
        rows = sizes[near.topk(6, largest=False).indices].sum(1).double().mean().item()
        return (found[:, :, None] == truth[:, None]).any(2).double().mean().item(), rows

    before, rows_before = recall_and_rows()
    for _ in range(5):
        index.rebalance()
    after, rows_after = recall_and_rows()
    assert rows_after < 0.8 * rows_before
    assert after / rows_after > before / rows_before


@pytest.mark.parametrize("max_rows", [60, 200, 500, 10_000])
def test_a_call_reads_no_more_rows_than_it_may(max_rows):
    index, read = drifted(), 0
    rows, touched = Contents.rows, []

    def counted(self: Contents, at: Tensor) -> Tensor:
        touched.append(set(at.tolist()))
        return rows(self, at)

    for _ in range(8):
        touched.clear()
        with patch.object(Contents, "rows", counted):
            report = index.rebalance(max_rows=max_rows)
        assert len(set().union(*touched)) <= report.read <= max_rows
        assert report.moved <= report.read
        read += report.read
    assert read
    exact(index)


def test_a_list_above_the_limit_is_left():
    index = drifted()
    longest = index.list_sizes().argmax()
    before = int(index.list_sizes()[longest])
    centroid = index.centroids[longest].clone()
    assert index.rebalance(max_rows=before - 1).too_long == 1
    assert torch.equal(index.centroids[longest], centroid)
    assert int(index.list_sizes()[longest]) >= before


def test_calls_come_to_an_end():
    index = drifted()
    reports = [index.rebalance(max_rows=1400) for _ in range(100)]
    done = [report.moved == 0 for report in reports]
    assert any(done)
    assert all(done[-10:])
    assert reports[-1].imbalance < 2 < reports[0].imbalance_before
    assert reports[-1] == Rebalanced(0, 0, 0, reports[-1].read, N + 300, 0, *2 * (reports[-1].imbalance,))


def test_the_same_seed_moves_the_same_rows():
    one, other = drifted(), drifted()
    assert one.rebalance(seed=3) == other.rebalance(seed=3)
    assert same_state(snapshot(one), snapshot(other))


def test_of_a_repeated_id_the_last_vector_stays_the_last():
    """Rows of one id in several lists, packed and pending ones, in an index that was made here and in a loaded one."""
    generator = torch.Generator().manual_seed(7)
    for round in range(6):
        index = drifted()
        for batch in range(4):
            ids = torch.randint(0, 60, (50,), generator=generator)
            index.add_with_ids(torch.randn(50, D, generator=generator) * 0.4 + batch - 1, ids)
            if (round + batch) % 2:
                index.store.pack()
        wanted = torch.arange(60)
        before, whole = index.reconstruct_batch(wanted), contents(index)
        for _ in range(3):
            index.rebalance(max_rows=700, seed=round)
            assert torch.equal(index.reconstruct_batch(wanted), before)
            if round % 3 == 0:
                index.store.pack()
                assert torch.equal(index.reconstruct_batch(wanted), before)
        assert contents(index) == whole
        exact(index)
        index.add_with_ids(torch.zeros(60, D), wanted)
        assert not index.reconstruct_batch(wanted).any()
        assert index.remove_ids(wanted) == sum(count for (id, _), count in whole.items() if id < 60) + 60


def test_changes_in_any_order():
    """Additions, removals and updates between calls, against a dictionary of what is stored."""
    generator = torch.Generator().manual_seed(11)
    index = drifted()
    model = {id: tuple(x) for id, x in contents(index)}
    for step in range(40):
        center = torch.randn(1, D, generator=generator)
        match step % 5:
            case 0 | 3:
                x = center + 0.3 * torch.randn(80, D, generator=generator)
                first = int(index.next_id)
                index.add(x)
                model.update({first + i: tuple(row) for i, row in enumerate(x.tolist())})
            case 1:
                ids = torch.tensor(sorted(model))[torch.randperm(len(model), generator=generator)[:60]]
                index.remove_ids(ids)
                for id in ids.tolist():
                    del model[id]
            case 2:
                ids = torch.tensor(sorted(model))[torch.randperm(len(model), generator=generator)[:50]]
                x = center + 0.3 * torch.randn(50, D, generator=generator)
                index.update(ids, x)
                model.update(zip(ids.tolist(), map(tuple, x.tolist()), strict=True))
            case 4:
                index.rebalance(max_rows=600)
        assert index.ntotal == len(model)
        if step % 5 == 4:
            found = index.search(QUERIES, 9, params=EVERYTHING)
            exact_ids = torch.tensor(list(model))
            truth = IndexFlatL2(D)
            truth.add_with_ids(torch.tensor(list(model.values())), exact_ids)
            agree(found, truth.search(QUERIES, 9))
    assert contents(index) == Counter(model.items())


def test_centroids_follow_without_new_biases_and_codes():
    """Where few rows move, the packed rows are neither copied nor read by searches that follow."""
    index = drifted()
    index.codes = 8
    index.search(QUERIES, 3)
    packed = index.store.packed
    version = index.store.versions.current()
    report = index.rebalance(max_rows=150)
    after = index.store.versions.current()
    assert 0 < report.moved
    assert index.store.packed is packed
    assert after.packed.derived().lists.bias is version.packed.derived().lists.bias
    assert after.packed.codes is version.packed.codes
    assert after.packed.derived().coarse.centroids is not version.packed.derived().coarse.centroids
    exact(index)


def test_a_search_that_has_begun_reads_the_version_before():
    index = drifted()
    version = index.store.versions.read()
    coarse, segments = version.lists()
    kept = [tensor.clone() for tensor in (coarse.centroids, *(part.ids for part in segments))]
    index.rebalance()
    again = version.lists()
    assert all(map(torch.equal, kept, (again[0].centroids, *(part.ids for part in again[1]))))


def test_searches_in_other_threads_see_one_version():
    index, stop, wrong = drifted(), threading.Event(), []
    expected = index.search(QUERIES, 9, params=EVERYTHING)

    def ask() -> None:
        try:
            while not stop.is_set():
                agree(index.search(QUERIES, 9, params=EVERYTHING), expected)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for seed in range(30):
        index.rebalance(max_rows=300 + 20 * seed, seed=seed)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


STEPS = [(planning, "kmeans"), (planning, "probe"), (rebalancing, "nearest_lists"), (rebalancing, "last_of")]


@pytest.mark.parametrize(("where", "fails"), [*STEPS, *((Contents, name) for name in ("of_lists", "rows", "with_ids"))])
def test_a_failure_changes_nothing(where, fails):
    index = drifted()
    index.remove_ids(torch.arange(20))
    index.add_with_ids(normal(400, D, seed=9), torch.arange(100, 500))
    before, whole = index.search(QUERIES, 9), contents(copy.deepcopy(index))
    version = index.store.version
    with patch.object(where, fails, side_effect=MemoryError), pytest.raises(MemoryError):
        index.rebalance()
    assert index.store.version is version
    agree(index.search(QUERIES, 9), before)
    assert contents(copy.deepcopy(index)) == whole
    assert index.rebalance().moved


def test_what_is_refused():
    with pytest.raises(RuntimeError, match=r"rebalance needs a trained index"):
        IndexIVFFlat(D, nlist=4).rebalance()
    index = drifted()
    for wrong in (0, -5):
        with unchanged(index), pytest.raises(ValueError, match="max_rows"):
            index.rebalance(max_rows=wrong)
    with pytest.raises(TypeError, match="max_rows"):
        index.rebalance(max_rows=2.5)
    for wrong in (0.99, 0, True, "1.5", float("nan"), -2):
        with pytest.raises(ValueError, match="auto_rebalance must be None or an imbalance factor >= 1"):
            index.auto_rebalance = wrong
    with pytest.raises(ValueError, match="auto_rebalance"):
        IndexIVFFlat(D, auto_rebalance=0.9)
    assert index.auto_rebalance is None
    assert not hasattr(IndexFlatL2(D), "rebalance")


def test_indexes_with_nothing_to_do():
    with few_training_rows():
        empty = IndexIVFFlat(D, nlist=4).train(normal(40, D))
        assert empty.rebalance() == Rebalanced(0, 0, 0, 0, 0, 0, 1.0, 1.0)
        one = IndexIVFFlat(D, nlist=1).train(normal(40, D))
        one.add(normal(50, D))
        report = one.rebalance()
        assert report[:3] == (0, 0, 0)
        few = IndexIVFFlat(D, nlist=30).train(normal(40, D))
    few.add(normal(3, D))
    few.rebalance()
    assert few.search(normal(3, D), 1, params=SearchParams(nprobe=30))[1].flatten().tolist() == [0, 1, 2]
    only_pending = IndexIVFFlat(D, nlist=8)
    with few_training_rows():
        only_pending.train(normal(100, D))
    only_pending.add(normal(200, D) * 0.1 + 1)
    only_pending.rebalance()
    assert only_pending.ntotal == 200


def test_lists_of_equal_vectors_are_not_split():
    with few_training_rows():
        index = IndexIVFFlat(D, nlist=8, nprobe=8).train(normal(200, D))
    index.add(torch.ones(500, D))
    index.add(normal(40, D))
    for _ in range(5):
        report = index.rebalance()
        assert report.split == 0
    assert index.search(torch.ones(1, D), 500)[0].count_nonzero() == 0


@pytest.mark.parametrize("data", ["huge", "tiny", "far"])
def test_extreme_vectors(data):
    x = {"huge": 1e18, "tiny": 1e-30, "far": 1.0}[data] * normal(400, D) + (1e4 if data == "far" else 0)
    with few_training_rows():
        index = IndexIVFFlat(D, nlist=8, nprobe=8).train(x[:100])
    index.add(x)
    index.add(x[:1] + 0.01 * (x - x[:1]))
    before = index.search(x[:9], 5)
    for _ in range(3):
        index.rebalance()
    assert torch.isfinite(index.centroids).all()
    agree(index.search(x[:9], 5), before)


def test_lists_in_order_are_no_longer_said_to_be():
    index = drifted()
    index.rebuild_lists()
    index.rebalance()
    assert index.list_ordering == "none"
    params = SearchParams(candidate_budget=200, list_ordering="residual_norm_asc", rebuild_policy="auto_threshold")
    index.search(QUERIES, 3, params=params)
    assert index.list_ordering == "residual_norm_asc"


def test_graphs_are_marked_as_outdated():
    index = drifted()
    graph = index.graph(k=3)
    index.rebalance()
    with pytest.raises(RuntimeError, match="the index has changed"):
        graph(QUERIES)
    agree(index.graph(k=3)(QUERIES), index.search(QUERIES, 3))


def test_a_copy_or_a_file_has_what_was_moved(tmp_path):
    index = drifted()
    index.rebalance(max_rows=500)
    index.auto_rebalance = 1.25
    index.save(tmp_path / "index.pt")
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index)), load(tmp_path / "index.pt")):
        assert other.auto_rebalance == 1.25
        assert contents(other) == contents(index)
        other.rebalance(max_rows=500)
        exact(other)
    assert "auto_rebalance=1.25" in repr(index)
    assert "auto_rebalance" not in repr(drifted())


class TestAuto:
    def calls(self, index: Any) -> list[Rebalanced]:
        """The reports of the calls that changes of the index make from now on."""
        reports: list[Rebalanced] = []

        def noted(**settings: Any) -> Rebalanced:
            reports.append(type(index).rebalance(index, **settings))
            return reports[-1]

        index.rebalance = noted
        return reports

    def test_never_is_the_default(self):
        index = drifted()
        reports = self.calls(index)
        index.add(normal(2000, D) * 0.1 + 3)
        assert not reports

    @each_metric
    def test_changes_keep_the_lists_even(self, metric):
        index, twin = drifted(metric), drifted(metric)
        index.auto_rebalance = 1.5
        reports = self.calls(index)
        for part in range(30):
            x = normal(100, D, seed=part) * 0.3 + part / 10
            index.add(x)
            twin.add(x)
        assert reports
        assert index.imbalance_factor() < 2 < twin.imbalance_factor()
        agree(index.search(QUERIES, 9, params=EVERYTHING), twin.search(QUERIES, 9, params=EVERYTHING))

    @pytest.mark.parametrize("how", ["add", "add_with_ids", "update", "remove_ids", "merge_from"])
    def test_every_change_of_rows_counts(self, how):
        index = drifted()
        other = copy.deepcopy(index)
        index.auto_rebalance = 1.01
        reports, x = self.calls(index), normal(400, D, seed=8)
        ids = torch.arange(400)
        arguments = {"add": (x,), "add_with_ids": (x, ids), "update": (ids, x), "remove_ids": (ids,)}
        getattr(index, how)(*arguments.get(how, (other,)))
        assert len(reports) == 1

    def test_few_changes_wait(self):
        index = drifted()
        index.auto_rebalance = 1.01
        reports = self.calls(index)
        for count in range(1, 90):
            index.add(normal(1, D, seed=count))
            assert len(reports) == (count >= 24) + (count >= 49) + (count >= 74)

    def test_a_failure_leaves_the_change(self):
        index, x = drifted(), normal(400, D, seed=8)
        index.auto_rebalance = 1.01
        before, lists = index.ntotal, lists_of(copy.deepcopy(index))
        text = "auto_rebalance failed, and the lists are unchanged: no memory"
        fails = patch.object(rebalancing, "nearest_lists", side_effect=MemoryError("no memory"))
        with fails, pytest.warns(RuntimeWarning, match=text):
            index.add(x)
        assert index.ntotal == before + 400
        assert lists.items() <= lists_of(copy.deepcopy(index)).items()
        exact(index)

    def test_a_change_that_is_refused_does_not_count(self):
        index = drifted()
        index.auto_rebalance = 1.01
        reports = self.calls(index)
        with pytest.raises(KeyError):
            index.update(torch.tensor([10**6]), normal(1, D))
        with pytest.raises(ValueError, match="finite"):
            index.add(torch.full((900, D), torch.nan))
        assert not reports

    def test_even_lists_are_left(self):
        with few_training_rows():
            index = IndexIVFFlat(D, nlist=8, auto_rebalance=3.0).train(normal(500, D))
        reports = self.calls(index)
        index.add(normal(500, D))
        assert not reports


def test_behind_a_transform():
    index = IndexPreTransform(D, torch.nn.Identity(), drifted())
    assert index.rebalance().split
    index.auto_rebalance = 2.0
    assert index.index.auto_rebalance == 2.0


def test_a_sharded_index_keeps_its_centroids(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="auto_rebalance = None to be sharded"):
            ShardedIndex(IndexIVFFlat(D, nlist=4, auto_rebalance=1.5))
    finally:
        torch.distributed.destroy_process_group()
