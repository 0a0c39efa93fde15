"""How often a search waits for an accelerator, counted on a simulated device: the numbers in docs/devices.md."""

from __future__ import annotations

import pytest
import torch

from tests.datasets import problem
from tests.oracle import check, probed, stored_rows
from tests.problems import flat, shared
from tests.simulated_device import SETTINGS, counted_waits
from tests.simulated_device import other_device as other_device
from torch_ivf_module.functional.cost import cheapest
from torch_ivf_module.functional.lists import InvertedLists

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


@pytest.mark.parametrize(
    ("nq", "rows", "nlist", "nprobe", "mode"),
    [
        (1, 262_144, 512, 32, "matrix"),
        (19_600, 262_144, 512, 32, "csr"),
        (1, 10_000, 1, 1, "matrix"),  # a flat index
        (4_096, 1_000_000, 1, 1, "csr"),
    ],
)
def test_auto_counts_steps_without_values(nq, rows, nlist, nprobe, mode):
    """Tensors of the meta device have no values to read."""
    long = {"dtype": torch.int64, "device": "meta"}
    offsets, x = torch.empty(nlist + 1, **long), torch.empty(nq, 128, device="meta")
    packed = torch.empty(rows, 128, device="meta")
    lists = InvertedLists(packed, offsets, torch.empty(rows, **long), offsets, torch.empty(rows, device="meta"))
    found, why = cheapest(x, lists, torch.empty(nq, nprobe, **long), None, 33, rows * nprobe // nlist)
    assert found == mode
    assert why.startswith("steps: ")
