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

from tests.datasets import PROBLEMS, normal, problem
from tests.oracle import agree, check, probed, stored_rows
from tests.problems import DTYPES, METRICS, each_bits, each_metric, shared
from tests.simulated_device import SETTINGS, counted_waits
from tests.simulated_device import other_device as other_device
from torch_ivf_module import IndexFlatL2, SearchParams, native
from torch_ivf_module.functional.kernels import SCANS

# The interpreter computes in NumPy, which warns where a float overflows.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
MISSING = importlib.util.find_spec("triton") is None
runs = pytest.mark.skipif(
    MISSING or (DEVICE == "cpu" and not INTERPRETED),
    reason="the package triton is not installed" if MISSING else "runs in a process with TRITON_INTERPRET=1",
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


@runs
@each_metric
@pytest.mark.parametrize("setting", SETTINGS)
def test_filters_and_limits(triton, setting, metric):
    """The scan reads the rows that PyTorch operations read, also of rows that are not packed yet."""
    index, base, queries = shared(problem("wide"), metric)
    index.add(base[:9])
    index.remove_ids(torch.arange(0, 40, 3))
    found = search(index, queries[:40], 8, **SETTINGS[setting])
    index.search_mode = "matrix"
    agree(found, index.search(queries[:40], 8, params=SearchParams(**SETTINGS[setting])), rtol=1e-4, atol=1e-5)


@runs
@pytest.mark.parametrize(("nb", "d", "nq"), [(9_001, 5, 2), (4_096, 3, 20), (300, 1_100, 18)])
def test_long_lists_and_long_rows(triton, nb, d, nq):
    base, queries = normal(nb, d), normal(nq, d, seed=1)
    index = IndexFlatL2(d)
    index.add(base)
    check(search(index, queries, 7), queries, stored_rows(index), "l2", 7)


@runs
def test_queries_in_chunks(triton):
    index, _, queries = shared(problem("wide"), max_bytes=100_000)
    check(search(index, queries, 21), queries, stored_rows(index), "l2", 21, probed(index, queries))


@pytest.mark.skipif(MISSING or not INTERPRETED, reason="the simulated device is a CPU, where the interpreter runs")
@pytest.mark.parametrize(("metric", "expected"), [("l2", 1), ("ip", 0)])
def test_waits_of_a_search(triton, other_device, metric, expected):
    index, _, queries = shared(problem("wide"), metric)
    names, found = counted_waits(index, queries, 21)
    assert len(names) == expected, names
    check(found, queries, stored_rows(index), metric, 21, probed(index, queries))


def test_without_triton_the_error_says_what_to_do(monkeypatch):
    (scan,) = (scan for scan in SCANS if scan.name == "triton")
    monkeypatch.setattr(scan, "enabled", True)
    monkeypatch.setattr(scan, "interpreted", True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with native.disabled(), pytest.raises(RuntimeError, match=r"TORCH_IVF_TRITON=1 needs the package triton"):
        shared().index.search(normal(1, 16), 1)


@pytest.mark.skipif(MISSING or INTERPRETED, reason="needs Triton's compiler")
@pytest.mark.parametrize(("backend", "arch", "warp"), [("cuda", 80, 32), ("cuda", 90, 32), ("hip", "gfx942", 64)])
@pytest.mark.parametrize(("dtype", "bits", "tile", "d"), [("fp32", 0, 64, 67), ("bf16", 0, 1, 600), ("u8", 4, 16, 33)])
def test_the_kernel_compiles_without_a_gpu(monkeypatch, tmp_path, backend, arch, warp, dtype, bits, tile, d):
    """For NVIDIA and AMD; what it computes is tested by the interpreter."""
    import triton
    from triton.backends.compiler import GPUTarget

    from torch_ivf_module.gpu import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    floats, names = ("x", "bias", "coarse", "fine"), kernels.kernel.arg_names
    values = kernels.constants(d, d if bits == 0 else -(-d * bits // 8) + 8, bits, has_bias=True, tile=tile, part=8)
    types = dict.fromkeys(names, "*i64") | dict.fromkeys(floats, "*fp32") | dict.fromkeys(("parts", "nlist"), "i32")
    types |= {"packed": f"*{dtype}"} | dict.fromkeys(values, "constexpr")
    source = triton.compiler.ASTSource(
        kernels.kernel, types, constexprs={(names.index(name),): value for name, value in values.items()}
    )
    made = triton.compile(source, target=GPUTarget(backend, arch, warp))
    assert made.metadata.shared <= 64 << 10
