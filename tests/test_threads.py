"""Concurrent searches give the answers of one thread, also right after an add."""

from __future__ import annotations

import pytest
import torch

from tests.datasets import normal, problem
from tests.kinds import KINDS, as_stored, each_kind
from tests.oracle import agree
from tests.problems import each_metric, each_mode, shared
from tests.threads import THREADS, together

CASE = problem("wide")


@each_mode
@each_metric
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
def test_searching_in_threads(mode, metric, warm):
    index, _, queries = shared(CASE, metric, search_mode=mode)
    parts = queries.chunk(THREADS)
    expected = [shared(CASE, metric, search_mode=mode).index.search(part, 10) for part in parts]
    if warm:
        index.search(queries, 10)
    for found, wanted in zip(together(lambda number: index.search(parts[number], 10)), expected, strict=True):
        agree(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 40, 2000])
@each_kind
def test_searching_in_threads_right_after_an_add(rows, kind):
    """The first readers after an add pack the pending rows at the same time."""
    index, _, queries = KINDS[kind](CASE)
    reference = KINDS[kind](CASE).index
    parts = queries.chunk(THREADS)
    for round in range(3):
        extra = normal(rows, CASE.d, seed=70 + round)
        index.add(extra)
        reference.add(extra)
        expected = [reference.search(part, 10) for part in parts]
        if round == 2:
            reference.state_dict()
        for found, wanted in zip(
            together(lambda number: index.search(parts[number], 10)), expected, strict=True
        ):
            agree(found, wanted, rtol=1e-6, atol=1e-6)
    assert index.ntotal == reference.ntotal


@each_kind
def test_different_readers_at_the_same_time(kind):
    index, _, queries = KINDS[kind](CASE)
    extra = normal(30, CASE.d, seed=3)
    index.add(extra)
    total = index.ntotal
    readers = [
        lambda: index.search(queries, 5)[1],
        lambda: index.state_dict()["list_ids"],
        lambda: index.range_search(queries[:5], 60.0)[0],
        lambda: index.reconstruct(total - 1),
    ]
    results = together(lambda number: readers[number]())
    assert results[0].shape == (len(queries), 5)
    assert len(results[1].unique()) == total
    assert torch.equal(results[3], as_stored(index, extra)[-1])
    agree(index.search(queries, 5), (index.search(queries, 5)[0], results[0]), rtol=1e-5)


def test_searching_while_others_add():
    """A search sees all rows of an add or none: every result is a stored row."""
    index, base, queries = shared(CASE, nprobe=CASE.nlist)

    def work(number):
        if number == 0:
            for round in range(20):
                index.add(normal(7, CASE.d, seed=round))
            return None
        return [index.search(queries[:9], 10) for _ in range(10)]

    answers = together(work)[1:]
    assert index.ntotal == len(base) + 140
    assert len(index.list_ids.unique()) == index.ntotal
    final = torch.cat([index.reconstruct(id)[None] for id in range(len(base), index.ntotal)])
    vectors = torch.cat([base, final])
    for D, I in (answer for several in answers for answer in several):
        assert (I >= 0).all()
        exact = (queries[:9, None] - vectors[I]).square().sum(2)
        torch.testing.assert_close(D, exact, rtol=1e-4, atol=0)


@each_kind
def test_threads_that_add_get_different_ids(kind):
    index, base, _ = KINDS[kind](CASE)

    def work(number):
        for round in range(20):
            if number % 2:
                index.add(normal(7, CASE.d, seed=round))
            else:
                ids = torch.arange(-7, 0) - 1_000 * (1 + number) - 7 * round
                index.add_with_ids(normal(7, CASE.d, seed=round), ids)

    together(work)
    assert index.ntotal == len(base) + THREADS * 140
    assert len(index.list_ids.unique()) == index.ntotal
    assert index.next_id > index.list_ids.max()
