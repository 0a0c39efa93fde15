"""A search sees all of a change or nothing of it, and does not wait for it, nor for packing or encoding."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch

from tests import stress_updates
from tests.datasets import PLAIN, normal
from tests.kinds import KINDS, each_kind
from tests.oracle import agree
from tests.problems import flat, ivf, shared
from tests.updates import PARAMS, Until, Workload
from torch_ivf_module import (
    IndexFlatL2,
    IndexIVFFlat,
    IndexIVFScalarQuantizer,
    IndexScalarQuantizer,
    SearchParams,
    native,
)
from torch_ivf_module.index import pending
from torch_ivf_module.index import store as store_module
from torch_ivf_module.index import version as version_module
from torch_ivf_module.index.store import ListStore
from torch_ivf_module.native.ops import NativeKernel

D = 16
SECONDS = 30  # within which what does not wait is done
INDEXES = {
    "ivf": lambda: IndexIVFFlat(D, nlist=16, nprobe=16, codes=None),
    "ivf with codes": lambda: IndexIVFFlat(D, nlist=16, nprobe=16, codes=8),
    "flat": lambda: IndexFlatL2(D),
    "ivf of codes": lambda: IndexIVFScalarQuantizer(D, nlist=16, nprobe=16),
    "flat codes": lambda: IndexScalarQuantizer(D),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_searches_see_all_of_a_change_or_nothing(kind):
    """Two threads change the index, two search it; small lists, so that they are packed again and again."""
    work, until, writers = Workload(INDEXES[kind](), 2, batch=300, filler=1500), Until(), 2
    steps = [0] * writers

    def write(writer: int) -> None:
        chance = random.Random(writer)
        while steps[writer] < 60 and not until.ended.is_set():
            steps[writer] += 1
            work.write(writer, chance)
            work.read(chance.choice(work.groups[writer]))  # the only thread that changes it: all of it is seen
        if all(count == 60 for count in steps):
            until.ended.set()

    def read(seed: int) -> None:
        chance, groups = random.Random(100 + seed), [group for own in work.groups for group in own]
        while not until.ended.is_set():
            work.read(chance.choice(groups), chance.choice(PARAMS))

    threads = [until.start(part, number) for part in (write, read) for number in range(2)]
    for thread in threads:
        thread.join(SECONDS)
    assert not until.errors, until.errors
    assert steps == [60, 60]
    assert work.index.ntotal == len(work.index.list_ids) == len(work.index.list_ids.unique())
    for group in (group for own in work.groups for group in own):
        work.read(group)


# --- what a search does not wait for ------------------------------------------------------------------------


class Stopped:
    """A function in place of another: it calls it after `go` is set, and sets `reached` before."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.reached, self.go = function, Event(), Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.reached.set()
        assert self.go.wait(SECONDS)
        return self.function(*args, **kwargs)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


def stopped_at(pool: Any, monkeypatch: Any, owner: Any, name: str, call: Callable[[], Any]) -> tuple[Stopped, Future]:
    """Run `call` in a thread up to the function `name` of `owner`."""
    stopped = Stopped(getattr(owner, name))
    replaced = stopped
    if isinstance(owner, type):  # a method

        def replaced(*args: Any, **kwargs: Any) -> Any:
            return stopped(*args, **kwargs)

    monkeypatch.setattr(owner, name, replaced)
    future = pool.submit(call)
    assert stopped.reached.wait(SECONDS)
    return stopped, future


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("read", [False, True], ids=["", "after reading the buffers"])
@pytest.mark.parametrize("at", [(store_module, "repacked"), (version_module, "derive")], ids=["packing", "deriving"])
@each_kind
def test_a_search_does_not_wait_for_packing(kind, at, read, counted, pool, monkeypatch):
    index, base, queries = KINDS[kind](PLAIN)
    params = SearchParams(max_codes=1 << 40) if counted else None
    index.search(queries, 5)
    index.remove_ids(torch.arange(9))
    if read:
        index.list_ids  # noqa: B018 - packs
    before = index.search(queries, 5)
    if read:
        index.list_ids  # noqa: B018 - from now on it may have been written to
    extra = normal(2 * len(base), PLAIN.d, seed=8)
    stopped, adding = stopped_at(pool, monkeypatch, *at, lambda: index.add(extra))
    for _ in range(2):
        found = pool.submit(index.search, queries, 5, params=params).result(SECONDS)
        agree(found, before, rtol=1e-6, atol=1e-6)
        assert index.ntotal == len(base) - 9
    assert not adding.done()
    stopped.go.set()
    adding.result(SECONDS)
    assert index.ntotal == 3 * len(base) - 9
    found = index.search(extra[-1:], 1)[1] if index.metric == "l2" else None
    assert found is None or int(found) == index.next_id - 1


def test_a_search_that_packs_does_not_keep_others_waiting(pool, monkeypatch):
    """Packed by the first search after large adds, since none had read the lists before them."""
    index, _, queries = ivf(PLAIN)
    expected = ivf(PLAIN).index
    for rows in (600, 700):
        index.add(normal(rows, PLAIN.d, seed=rows))
        expected.add(normal(rows, PLAIN.d, seed=rows))
    assert index.store._updates.rows == 700
    stopped, first = stopped_at(pool, monkeypatch, store_module, "repacked", lambda: index.search(queries, 5))
    second = pool.submit(index.search, queries, 5).result(SECONDS)
    assert not first.done()
    stopped.go.set()
    for found in (first.result(SECONDS), second):
        agree(found, expected.search(queries, 5), rtol=1e-5, atol=1e-5)
    assert not index.store._updates.rows


@pytest.mark.skipif(not native.available(), reason="codes are for the kernel")
def test_a_search_does_not_wait_for_codes(pool, monkeypatch):
    index, base, queries = ivf(PLAIN, codes=None)
    expected = index.search(queries, 5)
    index.codes = 8
    stopped, first = stopped_at(pool, monkeypatch, NativeKernel, "encode", lambda: index.search(queries, 5))
    agree(pool.submit(index.search, queries, 5).result(SECONDS), expected, rtol=1e-6, atol=1e-6)
    pool.submit(index.add, base[:3] + 100).result(SECONDS)
    assert not first.done()
    stopped.go.set()
    agree(first.result(SECONDS), expected, rtol=1e-6, atol=1e-6)
    assert index.store.codes.bytes > 0


@pytest.mark.skipif(not native.available(), reason="codes are for the kernel")
def test_codes_that_are_not_wanted_any_more_are_not_kept(pool, monkeypatch):
    index, _, queries = ivf(PLAIN, codes=8)
    stopped, first = stopped_at(pool, monkeypatch, NativeKernel, "encode", lambda: index.search(queries, 5))
    index.codes = None
    stopped.go.set()
    first.result(SECONDS)
    assert index.store.codes.bytes == 0


@pytest.mark.parametrize("counted", [False, True])
@each_kind
def test_half_of_an_update_is_not_seen(kind, counted, pool, monkeypatch):
    """Stopped after the old rows were deleted, before the new ones are added."""
    index, base, _ = KINDS[kind](PLAIN)
    params = SearchParams(max_codes=1 << 40) if counted else None
    ids, queries = torch.arange(20), base[:20].float()
    index.add(base[:1])
    before = index.search(queries, 5, params=params)
    new = normal(20, PLAIN.d, seed=5)
    stopped, updating = stopped_at(pool, monkeypatch, ListStore, "add", lambda: index.update(ids, new))
    found = pool.submit(index.search, queries, 5, params=params).result(SECONDS)
    agree(found, before, rtol=1e-6, atol=1e-6)
    assert index.ntotal == len(base) + 1
    stopped.go.set()
    updating.result(SECONDS)
    assert index.ntotal == len(base) + 1
    other = index.search(queries, 5, params=params)
    assert not torch.equal(other[0], before[0])


def test_half_of_a_training_is_not_seen(pool, monkeypatch):
    """Stopped after the centroids were replaced, before the lists are."""
    index, _, queries = ivf(PLAIN)
    before = index.search(queries, 5)
    train = normal(40 * index.nlist, PLAIN.d, seed=5)
    stopped, fitting = stopped_at(pool, monkeypatch, ListStore, "replace_lists", lambda: index.fit(train))
    agree(pool.submit(index.search, queries, 5).result(SECONDS), before, rtol=1e-6, atol=1e-6)
    adding = pool.submit(index.add, queries)  # assigns its rows to lists of the old centroids first
    stopped.go.set()
    fitting.result(SECONDS)
    adding.result(SECONDS)
    index.nprobe = 1
    assert torch.equal(index.search(queries, 1)[0], torch.zeros(len(queries), 1))


# --- memory -------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collector")
@pytest.mark.parametrize("make", [ivf, flat])
def test_old_versions_are_freed_at_once(make):
    index, base, queries = make(PLAIN)
    if native.available():
        index.codes = 8
    index.search(queries, 5)
    coarse, (lists,) = index.store.segments()
    old = [weakref.ref(tensor) for tensor in (lists.packed, lists.bias, lists.sizes)]
    del coarse, lists
    index.add(normal(2 * len(base), PLAIN.d))
    assert [part() for part in old] == [None] * 3
    rows = weakref.ref(index.store.packed)
    index.search(queries, 5)
    del index
    assert rows() is None


@each_kind
def test_a_search_in_progress_keeps_its_version(kind):
    index, base, queries = KINDS[kind](PLAIN)
    version = index.store.versions.read()
    _, segments = version.lists()
    copies = [tensor.clone() for tensor in segments[0]]
    index.remove_ids(torch.arange(len(base) // 2))
    index.add(normal(2 * len(base), PLAIN.d))
    index.search(queries, 5)
    assert version.ntotal == len(base)
    assert all(map(torch.equal, segments[0], copies))


def test_changes_that_no_search_follows_are_not_prepared_for_searches(monkeypatch):
    """The first after a search is, for the next search not to wait."""
    index, _, queries = shared(PLAIN)
    index.search(queries, 5)
    sorted_rows = []
    made = pending.pack
    monkeypatch.setattr(pending, "pack", lambda x, *others: sorted_rows.append(len(x)) or made(x, *others))
    for step in range(30):
        index.add(normal(3, PLAIN.d, seed=step))
    assert sorted_rows == [3]
    index.search(queries, 5)
    assert sorted_rows == [3, 90]


def test_the_command_that_checks_every_answer(capsys):
    assert stress_updates.main(["--minutes", "0.05", "--rows", "2000", "--batch", "200", "--nlist", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| update |") == len(stress_updates.INDEXES)
    assert printed.endswith("no wrong answer\n")


def test_the_command_finds_wrong_answers(capsys, monkeypatch):
    """Where half of an update can be seen."""
    delete = ListStore.delete

    def published(self: ListStore, rows: Any) -> int:
        deleted = delete(self, rows)
        self.versions.publish()
        return deleted

    monkeypatch.setattr(ListStore, "delete", published)
    arguments = ["--minutes", "0.5", "--rows", "2000", "--batch", "200", "--nlist", "8", "--kind", "flat"]
    assert stress_updates.main(arguments) == 1
    assert "wrong: AssertionError" in capsys.readouterr().out
