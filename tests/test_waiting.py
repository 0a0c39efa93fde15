"""How often a search waits for an accelerator, counted on a simulated device: the numbers in docs/devices.md."""

from __future__ import annotations

import pytest

from tests.datasets import problem
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
