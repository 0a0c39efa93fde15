"""How often a search waits for an accelerator: the numbers that docs/devices.md states, counted on a simulated device."""

from __future__ import annotations

import pytest
import torch

from tests.datasets import problem
from tests.oracle import check, probed, stored_rows
from tests.problems import each_metric, flat, shared
from tests.simulated_device import away, back, moved, waits
from tests.simulated_device import other_device as other_device
from torch_ivf_module import SearchParams
from torch_ivf_module.functional import probe

CASE = problem("wide")
# Waits of a search once the index has been searched: (mode, metric) and how many.
COUNTS = {("matrix", "l2"): 0, ("matrix", "ip"): 0, ("csr", "l2"): 3, ("csr", "ip"): 2}
SETTINGS = {
    "plain": {},
    "mask": {"selector": torch.arange(2000) % 3 == 0},
    "ids": {"selector": torch.arange(0, 1500, 7)},
    "max_codes": {"max_codes": 300},
    "budget": {"candidate_budget": 200},
}
each_count = pytest.mark.parametrize(("mode", "metric"), list(COUNTS))


def counted(index, queries, k, **params):
    """The waits of a second search, and its answer."""
    if "selector" in params:
        params["selector"] = away(params["selector"])
    index, queries, params = moved(index), away(queries), SearchParams(**params)
    index.search(queries, k, params=params)
    with waits() as names:
        D, I = index.search(queries, k, params=params)
    return names, (back(D), back(I))


@each_count
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["ivf", "flat"])
def test_waits_of_a_search(other_device, kind, setting, mode, metric):
    if (mode == "csr" and setting == "budget") or (kind == "flat" and setting in ("max_codes", "budget")):
        pytest.skip("csr divides lists by the budget, which waits; a flat index has one list")
    index, _, queries = (shared if kind == "ivf" else flat)(CASE, metric, search_mode=mode)
    names, _ = counted(index, queries, CASE.k, **SETTINGS[setting])
    assert len(names) == COUNTS[mode, metric], names
