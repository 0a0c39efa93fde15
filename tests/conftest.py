"""Settings shared by every test. The cases are in problems.py and datasets.py, the oracle in oracle.py."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("tests.oracle", "tests.states")

# The same examples at every run, and no folder of examples on disk.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def faiss():
    """faiss, one thread, or a skip where it is not installed."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its SWIG wrappers raise some on import
        module = pytest.importorskip("faiss")
    module.omp_set_num_threads(1)
    return module
