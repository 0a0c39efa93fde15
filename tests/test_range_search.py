"""Range search over the grid of cases, against the brute-force oracle."""

from __future__ import annotations

import pytest
import torch

from tests.datasets import PLAIN, problem
from tests.oracle import check_range, comparable, probed, scores_of, stored_rows
from tests.problems import each_dtype, each_flat_metric, each_metric, each_mode, flat, shared
from torch_ivf_module import SearchParams

RANGED = [
    "plain",
    "wide",
    "d=1",
    "one query",
    "no queries",
    "empty lists",
    "nothing added",
    "duplicates",
    "ties",
    "zero vectors",
    "huge norms",
    "tiny norms",
    "mixed norms",
    "overflowing distances",
    "translated",
    "far clumps",
    "bad queries",
]


def _radii(index, queries):
    """Radii with no, few, many, and all rows inside."""
    scores = scores_of(comparable(queries, index.metric), stored_rows(index).vectors, index.metric)
    scores = scores[scores.isfinite()]
    sign = -1 if index.metric == "l2" else 1
    middle = [float((sign * scores.quantile(q)).float()) for q in (0.5, 0.95)] if len(scores) else [1.0]
    return [*middle, *((0.0, 3e38) if index.metric == "l2" else (3e38, -3e38))]


def _check_radii(index, queries, lists=None):
    for radius in _radii(index, queries):
        check_range(index.range_search(queries, radius), queries, stored_rows(index), index.metric, radius, lists)


@pytest.mark.parametrize("name", RANGED)
@each_dtype
@each_metric
def test_range_search(name, dtype, metric):
    index, _, queries = shared(problem(name), metric, dtype)
    _check_radii(index, queries[:24], probed(index, queries[:24]))


@pytest.mark.parametrize("name", RANGED)
@each_dtype
@each_flat_metric
def test_flat_range_search(name, dtype, metric):
    index, _, queries = flat(problem(name), metric, dtype)
    _check_radii(index, queries[:24])


@pytest.mark.parametrize("kind", ["ivf", "flat"])
@each_flat_metric
def test_a_row_exactly_on_the_radius_is_outside(kind, metric):
    case = problem("ties")
    index, base, queries = shared(case, metric, nprobe=case.nlist) if kind == "ivf" else flat(case, metric)
    D = (queries[:, None] - base).square().sum(2) if metric == "l2" else queries @ base.T
    for radius in map(float, range(1, 12)):
        inside = D < radius if metric == "l2" else D > radius
        assert (radius == D).any()
        lims, found, ids = index.range_search(queries, radius)
        assert torch.equal(lims.diff(), inside.sum(1))
        for q in range(len(queries)):
            mine = slice(int(lims[q]), int(lims[q + 1]))
            assert torch.equal(ids[mine].sort().values, inside[q].nonzero()[:, 0])
            assert torch.equal(found[mine], D[q, ids[mine]])


@each_mode
@each_metric
def test_range_search_in_every_mode(mode, metric):
    index, _, queries = shared(problem("wide"), metric, search_mode=mode)
    radius = _radii(index, queries)[0]
    check_range(
        index.range_search(queries, radius), queries, stored_rows(index), metric, radius, probed(index, queries)
    )


@each_metric
def test_range_search_ignores_max_codes_and_respects_nprobe(metric):
    index, _, queries = shared(PLAIN, metric, nprobe=3)
    radius = _radii(index, queries)[0]
    plain = index.range_search(queries, radius)
    index.max_codes = 1
    for part, other in zip(index.range_search(queries, radius), plain, strict=True):
        assert torch.equal(part, other)
    fewer = index.range_search(queries, radius, params=SearchParams(nprobe=1))
    check_range(fewer, queries, stored_rows(index), metric, radius, probed(index, queries, nprobe=1))


@each_metric
def test_range_search_within_little_memory(metric):
    index, _, queries = shared(problem("wide"), metric)
    radius = _radii(index, queries)[0]
    index.max_bytes = 1 << 12
    lists = probed(index, queries)
    assert check_range(index.range_search(queries, radius), queries, stored_rows(index), metric, radius, lists) > 100
