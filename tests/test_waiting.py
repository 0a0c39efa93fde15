"""How often a search waits for an accelerator, counted on a simulated device: the numbers in docs/devices.md."""

from __future__ import annotations

import pytest

from tests.datasets import problem
from tests.oracle import check, probed, stored_rows
from tests.problems import flat, shared
from tests.simulated_device import SETTINGS, counted_waits
from tests.simulated_device import other_device as other_device

CASE = problem("wide")
# Waits of a search once the index has been searched: (mode, metric) and how many.
COUNTS = {("matrix", "l2"): 0, ("matrix", "ip"): 0, ("csr", "l2"): 3, ("csr", "ip"): 2}
each_count = pytest.mark.parametrize(("mode", "metric"), list(COUNTS))


@each_count
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["ivf", "flat"])
def test_waits_of_a_search(other_device, kind, setting, mode, metric):
    if (mode == "csr" and setting == "budget") or (kind == "flat" and setting in ("max_codes", "budget")):
        pytest.skip("csr divides lists by the budget, which waits; a flat index has one list")
    index, _, queries = (shared if kind == "ivf" else flat)(CASE, metric, search_mode=mode)
    names, _ = counted_waits(index, queries, CASE.k, **SETTINGS[setting])
    assert len(names) == COUNTS[mode, metric], names


@each_count
def test_many_scores_of_centroids_add_one(other_device, monkeypatch, mode, metric):
    monkeypatch.setattr("torch_ivf_module.functional.probe._CHUNK_SCORES", 1000)
    index, _, queries = shared(CASE, metric, search_mode=mode)
    names, _ = counted_waits(index, queries, CASE.k)
    assert len(names) == COUNTS[mode, metric] + 1, names


@pytest.mark.parametrize(("metric", "k"), [("l2", 5), ("ip", 5)])
def test_auto_waits_as_often_as_the_mode_it_takes(other_device, metric, k):
    index, _, queries = shared(CASE, metric)
    names, found = counted_waits(index, queries, k)
    assert len(names) in {count for (_, of), count in COUNTS.items() if of == metric}
    check(found, queries, stored_rows(index), metric, k, probed(index, queries))
