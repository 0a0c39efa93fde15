"""The scan in Triton, on the grid of cases: on a GPU if there is one, else by Triton's interpreter on the CPU.

TRITON_INTERPRET=1 has to be set before Triton is imported, so the tests run in a process of their own without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.datasets import PROBLEMS, problem
from tests.oracle import Reach, agree, check, probed, stored_rows
from tests.problems import DTYPES, METRICS, each_bits, each_metric, each_problem, flat, shared
from torch_ivf_module import SearchParams, native
from torch_ivf_module.functional.kernels import SCANS

# The interpreter computes in NumPy, which warns where a float overflows.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
MISSING = importlib.util.find_spec("triton") is None
runs = pytest.mark.skipif(
    MISSING or (DEVICE == "cpu" and not INTERPRETED),
    reason="the package triton is not installed" if MISSING else "runs in a process of its own, with TRITON_INTERPRET=1",
)


@pytest.mark.skipif(MISSING, reason="the package triton is not installed")
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the other tests of this file run in this process")
def test_the_grid_by_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.fixture
def triton(monkeypatch):
    """The scan switched on, and no kernel for CPUs."""
    (scan,) = (scan for scan in SCANS if scan.name == "triton")
    monkeypatch.setattr(scan, "enabled", True)
    with native.disabled():
        yield


def search(index, queries, k, **params):
    """The answer on the CPU, and that the scan was used if there was anything to scan."""
    index = index.to(DEVICE)
    found = index.search(queries.to(DEVICE), k, params=SearchParams(debug_stats=True, **params))
    assert index.last_search_stats["mode"] in ("triton", None)
    index.to("cpu")
    return found[0].cpu(), found[1].cpu()


# Every case in float32 by l2; the other dtypes and metrics on some of the cases.
SOME = ("plain", "wide", "d=1", "huge norms", "overflowing distances", "bad queries", "empty lists", "no queries")
GRID = [(case, metric, torch.float32) for case in PROBLEMS for metric in ("l2", "ip")]
GRID += [(problem(name), metric, dtype) for name in SOME for metric in METRICS for dtype in DTYPES]
GRID = list(dict.fromkeys(GRID))


@runs
@pytest.mark.parametrize(("case", "metric", "dtype"), GRID, ids=lambda value: getattr(value, "name", str(value)))
def test_search(triton, case, metric, dtype):
    index, _, queries = shared(case, metric, dtype)
    found = search(index, queries, case.k)
    check(found, queries, stored_rows(index), metric, case.k, probed(index, queries))


@runs
@each_bits
@each_metric
def test_rows_of_codes(triton, bits, metric):
    case = problem("wide")
    index, _, queries = shared(case, metric, bits=bits)
    found = search(index, queries, case.k)
    check(found, queries, stored_rows(index), metric, case.k, probed(index, queries))
