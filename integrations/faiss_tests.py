"""Runs faiss's own Python tests and tutorials of a checkout on faiss_compat, and holds the list of tests that pass.

    python faiss_tests.py CHECKOUT           fails if a test of faiss_tests.txt does not pass
    python faiss_tests.py CHECKOUT --write   adds the tests that pass to that list

The checkout is one of https://github.com/facebookresearch/faiss; of it `tests/*.py`, `contrib` and two tutorials
are used as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from torch_ivf_module import faiss_compat

LIST = Path(__file__).with_name("faiss_tests.txt")
FILES = (
    "build_blocks", "clone", "clustering", "clustering_initialization", "contrib", "documentation", "extra_distances",
    "factory", "index", "index_accuracy", "index_composite", "io", "ivflib", "merge_index", "meta_index",
    "omp_threads_py", "partition", "referenced_objects", "refine", "scalar_quantizer_correctness", "search_params",
    "standalone_codec", "swig_wrapper",
)  # fmt: skip
SECONDS = 60
TUTORIALS = ("1-Flat.py", "2-IVFFlat.py")
LEVELS = ("NONE", "AVX2", "AVX512", "AVX512_SPR", "ARM_NEON", "ARM_SVE", "RISCV_RVV")


class Passed:
    """Notes which tests pass and which do not."""

    def __init__(self) -> None:
        self.passed: set[str] = set()
        self.others: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: Any) -> Iterator[None]:
        """A test that waits for ever fails; the signal is repeated in case the first one is lost among threads."""
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"it takes more than {SECONDS} s"))
        signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
        try:
            return (yield)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for each phase of a test."""
        name = report.nodeid.split("/")[-1]
        if not report.passed:
            self.others.add(name)
        elif report.when == "call":
            self.passed.add(name)


def what_the_helpers_need(module: Any) -> None:
    """Names that the tests' own helpers import before any test runs: random vectors, and one level of SIMD."""
    for number, name in enumerate(LEVELS):
        setattr(module, f"SIMDLevel_{name}", number)
    module.SIMDConfig = SimpleNamespace(
        is_simd_level_available=lambda level: level == 0,
        set_level=lambda level: None,
        get_level=lambda: 0,
        get_dispatched_level=lambda: 0,
    )
    module.randn = lambda n, seed=12345: np.random.RandomState(seed).standard_normal(n).astype("float32")
    module.rand = lambda n, seed=12345: np.random.RandomState(seed).random_sample(n).astype("float32")
    module.randint = lambda n, seed=12345, vmax=None: np.random.RandomState(seed).randint(vmax or 2**31, size=n)


def run_tutorials(checkout: Path) -> None:
    """Run the tutorials of flat indexes and inverted files; an error of one of them is raised."""
    for name in TUTORIALS:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(str(checkout / "tutorial" / "python" / name), run_name="__main__")
        print(f"faiss's tutorial {name} runs")


def main() -> int:
    """Run the tests and compare with the list; 0 if none of it is missing."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("-k", default="", help="as in pytest")
    given = parser.parse_args()
    faiss_compat.install()
    if not given.k:
        run_tutorials(given.checkout)
    what_the_helpers_need(sys.modules["faiss"])
    sys.modules["faiss.contrib"].__path__.append(str(given.checkout / "contrib"))
    folder = given.checkout / "tests"
    sys.path.insert(0, str(folder))
    files = [str(path) for name in FILES if (path := folder / f"test_{name}.py").exists()]
    notes = Passed()
    settings = ["-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:warnings", "--continue-on-collection-errors"]
    pytest.main([*settings, "-k", given.k, f"--rootdir={folder}", *files], plugins=[notes])
    passed = notes.passed - notes.others
    before = set(LIST.read_text().split()) if LIST.exists() else set()
    missing = [] if given.k else sorted(before - passed)
    print(f"faiss's own tests: {len(passed)} passed, {len(notes.others)} did not; {len(before)} in the list")
    if given.write:
        LIST.write_text("\n".join(sorted(before | passed)) + "\n")
    elif missing:
        print("in the list, but did not pass:", *missing, sep="\n  ")
    return 1 if missing and not given.write else 0


if __name__ == "__main__":
    sys.exit(main())
